"""Parts of a model: whose a parameter is, what is frozen, at which rate a part learns."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training.runs import make_trainer, rows, step_gradient, weights
from training.test_invariance import SGD, TOLERANCE, in_processes, relative
from transformers.training_args import ParallelMode
from zoo import TEXT_FAMILIES, VLM_FAMILIES, build

from taid_vlm import DistillationConfig, DistillationTrainer
from taid_vlm.errors import TaidError
from taid_vlm.models.parts import (
    PARTS,
    TrainedParts,
    count_parameters,
    is_reentrant,
    parts_of,
    settle_unused,
)

# Where the parts of the families lie. A tower's parameters that stand in the second column are the
# projector's.
PLACES = {
    "llava": ("model.vision_tower", "model.multi_modal_projector"),
    "llava_next": ("model.vision_tower", "model.multi_modal_projector model.image_newline"),
    "llava_onevision": ("model.vision_tower", "model.multi_modal_projector model.image_newline"),
    "fast_vlm": ("model.vision_tower", "model.multi_modal_projector"),
    "perception_lm": ("model.vision_tower", "model.multi_modal_projector"),
    "internvl": ("model.vision_tower", "model.multi_modal_projector"),
    "gemma3": ("model.vision_tower", "model.multi_modal_projector"),
    "gemma4": ("model.vision_tower", "model.embed_vision"),
    "paligemma": ("model.vision_tower", "model.multi_modal_projector"),
    "mistral3": ("model.vision_tower", "model.multi_modal_projector"),
    "lfm2_vl": ("model.vision_tower", "model.multi_modal_projector"),
    "smolvlm": ("model.vision_model", "model.connector"),
    "idefics3": ("model.vision_model", "model.connector"),
    "qwen2_vl": ("model.visual", "model.visual.merger"),
    "qwen2_5_vl": ("model.visual", "model.visual.merger"),
    "qwen3_vl": ("model.visual", "model.visual.merger model.visual.deepstack_merger_list"),
    "qwen3_vl_moe": ("model.visual", "model.visual.merger model.visual.deepstack_merger_list"),
    "hy_v4_vl": ("model.vision_tower", "model.vision_tower.patch_merger"),
    "qwen3_5": ("model.visual", "model.visual.merger"),
    "ovis2": ("model.vision_tower", "model.vision_tower.head_linear model.vision_tower.head_norm "
                                    "model.visual_embeddings_table"),
}
ALIGN = ["tower", "language_model", "head"]  # all but the projector


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def under(name: str, prefixes: str) -> bool:
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes.split())


# ----- whose a parameter is -----------------------------------------------------------------


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_every_parameter_of_a_vlm_has_its_part(family: str) -> None:
    parts = parts_of(build(family).model)
    tower, projector = PLACES[family]
    for name, part in parts.items():
        expected = ("head" if under(name, "lm_head") else
                    "projector" if under(name, projector) else
                    "tower" if under(name, tower) else "language_model")
        assert part == expected, name
    assert set(parts.values()) == set(PARTS)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_text_model_has_two_parts(family: str, tied: bool) -> None:
    model = build(family, tied=tied).model
    parts = parts_of(model)
    assert parts.keys() == dict(model.named_parameters()).keys()
    heads = [name for name, part in parts.items() if part == "head"]
    assert heads == ([] if tied else ["lm_head.weight"])
    assert set(parts.values()) == {"language_model"} | ({"head"} if heads else set())


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "smolvlm"])
def test_a_tied_head_belongs_to_the_language_model(family: str) -> None:
    model = build(family, tied=True).model
    parts = parts_of(model)
    assert "head" not in parts.values()
    embedding = model.get_input_embeddings().weight
    assert [parts[name] for name, p in model.named_parameters() if p is embedding] == [
        "language_model"]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_an_adapter_belongs_to_what_it_adapts(family: str) -> None:
    peft = pytest.importorskip("peft")
    model = build(family).model
    before = parts_of(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(
        r=2, target_modules="all-linear", modules_to_save=["lm_head"]))
    parts = parts_of(wrapped)
    assert parts.keys() == dict(wrapped.named_parameters()).keys()
    adapted = {name: part for name, part in parts.items() if "lora_" in name}
    assert {"tower", "projector", "language_model"} <= set(adapted.values())
    for name, part in adapted.items():
        plain = name.removeprefix("base_model.model.").partition(".lora_")[0]
        assert part == before[f"{plain}.weight"], name
    saved = [part for name, part in parts.items() if ".modules_to_save." in name]
    assert set(saved) == {"head"}


def test_parameters_are_counted() -> None:
    model = build("llava").model
    for p in model.model.vision_tower.parameters():
        p.requires_grad_(False)
    counts = count_parameters(model)
    assert sum(part["parameters"] for part in counts.values()) == model.num_parameters()
    assert counts["tower"]["trained"] == 0
    assert counts["tower"]["parameters"] > 0
    assert all(counts[part]["trained"] == counts[part]["parameters"] for part in PARTS[1:])
    assert list(count_parameters(build("llama", tied=True).model)) == ["language_model"]


# ----- what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "told"), [
    ({"freeze": "tower"}, "freeze = 'tower', but it must be a list"),
    ({"freeze": ["towr"]}, "freeze: a model has no part 'towr'. Did you mean 'tower'"),
    ({"freeze": [True]}, "freeze: a model has no part True"),
    ({"learning_rates": [1e-3]}, "must be a mapping"),
    ({"learning_rates": {"projectr": 1e-3}}, "Did you mean 'projector'"),
    ({"learning_rates": {"tower": 0}}, "learning_rates.tower = 0"),
    ({"learning_rates": {"tower": -1e-3}}, "above 0"),
    ({"learning_rates": {"tower": "fast"}}, "learning_rates.tower = 'fast'"),
    ({"learning_rates": {"tower": True}}, "learning_rates.tower = True"),
    ({"learning_rates": {"tower": float("nan")}}, "above 0"),
    ({"freeze": ["tower"], "learning_rates": {"tower": 1e-3}}, "'tower' is frozen"),
])
def test_wrong_arguments(arguments: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(TaidError) as caught:
        DistillationConfig(str(tmp_path), report_to="none", use_cpu=True, **arguments)
    assert told in str(caught.value)


def trained(family: str = "llava", tied: bool = False, lora: str = "", **arguments: Any) -> Any:
    """TrainedParts of a fresh student."""
    model = build(family, tied=tied).model
    if lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=lora))
    return TrainedParts(model, DistillationConfig(
        "unused", report_to="none", use_cpu=True, **arguments))


@pytest.mark.parametrize(("options", "told"), [
    ({"family": "llama", "freeze": ["tower"]}, "no 'tower'. It has: language_model, head."),
    ({"family": "llama", "learning_rates": {"projector": 1e-3}}, "no 'projector'"),
    ({"tied": True, "freeze": ["head"]}, "tied"),
    ({"tied": True, "learning_rates": {"head": 1e-3}}, "'language_model'"),
    ({"freeze": list(PARTS)}, "nothing is left to train"),
    ({"family": "llama", "freeze": ["head", "language_model"]}, "nothing is left to train"),
    ({"lora": r".*language_model.*q_proj", "freeze": ["language_model"]}, "nothing is left"),
    ({"lora": r".*language_model.*q_proj", "learning_rates": {"tower": 1e-3}},
     "nothing of 'tower' is trained. Trained: language_model."),
])
def test_what_a_model_cannot_do(options: dict[str, Any], told: str) -> None:
    with pytest.raises(TaidError) as caught:
        trained(**options)
    assert told in str(caught.value)


# ----- frozen -------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "freeze"), [
    ("llava", ["tower"]), ("llava", ALIGN), ("llava", ["language_model"]), ("llava", ["head"]),
    ("qwen2_5_vl", ALIGN), ("qwen2_5_vl", ["projector"]),
])
def test_only_what_is_not_frozen_moves(student: str, freeze: list[str], tmp_path: Path) -> None:
    plain = "plain" if student != "llava" else "permuted"
    trainer = make_trainer(tmp_path, student=student, tokenizer=plain, freeze=freeze, max_steps=2,
                           weight_decay=0.1)
    parts, before = parts_of(trainer.model), weights(trainer)
    trainer.train()
    moved = {parts[name] for name, after in weights(trainer).items()
             if not torch.equal(before[name], after)}
    assert moved == set(PARTS) - set(freeze)


def watched(trainer: DistillationTrainer) -> list[tuple[bool, bool]]:
    """(features require a gradient, tower is in training mode) of every training forward."""
    seen: list[tuple[bool, bool]] = []
    tower = trainer.model.model.vision_tower

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            seen.append((output.last_hidden_state.requires_grad, module.training))

    tower.register_forward_hook(note)
    return seen


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_tower_has_no_graph(
    frozen: bool, checkpointing: bool | None, tmp_path: Path
) -> None:
    """`checkpointing`: none, or whether in torch's reentrant way."""
    options = {} if checkpointing is None else {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    trainer = make_trainer(tmp_path, freeze=["tower"] if frozen else None, max_steps=1, **options)
    seen = watched(trainer)
    trainer.train()
    assert seen == [(not frozen, not frozen)]


def test_a_frozen_tower_is_in_evaluation_mode(tmp_path: Path) -> None:
    """No dropout, and BatchNorm's statistics stay; where it is trained, both are at work."""
    for freeze in (["tower"], ["head"]):
        built = build("llava", seed=1)
        layer = built.model.model.vision_tower.encoder.layers[0]
        norm, dropout = nn.BatchNorm1d(16), nn.Dropout(0.5)  # one channel per patch
        layer.mlp.fc2 = nn.Sequential(layer.mlp.fc2, norm, dropout)
        config = DistillationConfig(
            str(tmp_path), objective="ce", freeze=freeze, max_steps=2, report_to="none",
            save_strategy="no", use_cpu=True, disable_tqdm=True)
        trainer = DistillationTrainer(
            built.model, None, config, rows(16), None, built.processor)
        trainer.train()
        frozen = freeze == ["tower"]
        assert torch.equal(norm.running_mean, torch.zeros(16)) == frozen
        assert int(norm.num_batches_tracked) == (0 if frozen else 2)
        assert dropout.training != frozen


@pytest.mark.parametrize("freeze", [ALIGN, ["tower"]])
def test_gradients_reach_through_recomputed_layers(freeze: list[str], tmp_path: Path) -> None:
    plain = step_gradient(tmp_path, freeze=freeze)
    for reentrant in (False, True):
        recomputed = {"gradient_checkpointing": True,
                      "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        assert relative(plain, step_gradient(tmp_path, freeze=freeze, **recomputed)) < TOLERANCE


def test_frozen_layers_are_recomputed_too(tmp_path: Path) -> None:
    """Activations of a frozen language model are the ones that there are to be saved."""
    trainer = make_trainer(tmp_path, freeze=ALIGN, max_steps=1, gradient_checkpointing=True)
    layer, calls = trainer.model.model.language_model.layers[0], []
    layer.mlp.register_forward_pre_hook(
        lambda *_: calls.append(layer.mlp.training) if torch.is_grad_enabled() else None)
    trainer.train()
    assert calls == [False, False]  # forward and again for backward, without dropout


@pytest.mark.parametrize("lora", [False, True])
def test_a_batch_without_images_trains_no_projector(lora: bool, tmp_path: Path) -> None:
    """Nothing that is trained has a share in it: no error, and no step."""
    options = {"max_steps": 2, "optim": "sgd", "lr_scheduler_type": "constant",
               "max_grad_norm": 0.0, "kinds": ["text"]}
    if lora:
        peft = pytest.importorskip("peft")
        built, teacher = build("llava", seed=1), build("internvl")
        config = peft.LoraConfig(r=2, target_modules=r".*multi_modal_projector.*linear_\d")
        trainer = DistillationTrainer(
            built.model, teacher.model,
            DistillationConfig(str(tmp_path), max_steps=2, report_to="none", save_strategy="no",
                               use_cpu=True, disable_tqdm=True, optim="sgd"),
            rows(8, text_only=True), None, built.processor, teacher.processor, peft_config=config)
    else:
        trainer = make_trainer(tmp_path, freeze=ALIGN, **options)
    before = weights(trainer)
    trainer.train()
    assert all(torch.equal(before[name], after) for name, after in weights(trainer).items())
    assert trainer.state.global_step == 2


# ----- learning rates -----------------------------------------------------------------------


RATES = {"tower": 0.125, "projector": 0.5}


def test_each_part_moves_at_its_rate(tmp_path: Path) -> None:
    """One step of plain gradient descent is rate x gradient, part by part."""
    gradient = step_gradient(tmp_path)
    trainer = make_trainer(tmp_path, **{**SGD, "learning_rate": 0.25}, learning_rates=RATES)
    before, parts = weights(trainer), parts_of(trainer.model)
    trainer.train()
    moved = {name: (before[name] - after) / RATES.get(parts[name], 0.25)
             for name, after in weights(trainer).items()}
    assert relative(gradient, moved) < TOLERANCE


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_groups_keep_the_weight_decay_of_trainer(optim: str, tmp_path: Path) -> None:
    options = {"weight_decay": 0.3, "optim": optim}
    plain, split = (make_trainer(tmp_path, **options, learning_rates=rates)
                    for rates in (None, {**RATES, "head": 2e-3}))
    decay: list[dict[str, float]] = []
    for trainer in (plain, split):
        names = {id(p): name for name, p in trainer.model.named_parameters()}
        groups = trainer.create_optimizer().param_groups
        decay.append({names[id(p)]: group["weight_decay"] for group in groups
                      for p in group["params"]})
    assert decay[0] == decay[1]
    assert len(decay[0]) == len(list(plain.model.parameters()))
    assert set(decay[0].values()) == {0.0, 0.3}
    groups = split.optimizer.param_groups
    assert [g["part"] for g in groups] == [
        "language_model", "language_model", "tower", "tower", "projector", "projector", "head"]
    rates = {"language_model": 1e-3, **RATES, "head": 2e-3}
    assert all(g["lr"] == rates[g["part"]] for g in groups)
    again = [id(g) for g in split.create_optimizer().param_groups]
    assert again == [id(g) for g in groups]


def test_the_schedule_scales_every_rate_and_the_log_tells(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, learning_rates=RATES, learning_rate=1e-2, max_steps=4,
                           logging_steps=1, lr_scheduler_type="linear", freeze=["head"])
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    for index, row in enumerate(logs):
        left = 1 - index / 4
        assert row["learning_rate"] == pytest.approx(1e-2 * left)
        shown = {key: rate for key, rate in row.items() if key.startswith("learning_rate/")}
        assert shown == pytest.approx({
            "learning_rate/tower": 0.125 * left, "learning_rate/projector": 0.5 * left,
            "learning_rate/language_model": 1e-2 * left})


def test_without_rates_nothing_is_split_or_logged(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, logging_steps=1)
    trainer.train()
    assert len(trainer.optimizer.param_groups) == 2
    assert not [key for key in trainer.state.log_history[0] if key.startswith("learning_rate/")]


def test_an_optimizer_without_groups_is_refused() -> None:
    parts = trained(learning_rates={"tower": 1e-3})
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    with pytest.raises(TaidError, match="SGD does not update by groups"):
        parts.split_groups(dummy, build("llava").model)


def test_an_optimizer_from_elsewhere_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As DeepSpeed's, which Trainer takes without asking `create_optimizer`."""
    trainer = make_trainer(tmp_path, learning_rates=RATES)
    monkeypatch.setattr(trainer, "create_optimizer", lambda model=None: None)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-3)
    with pytest.raises(TaidError, match="not made by the trainer"):
        trainer.train()


def test_a_run_with_groups_resumes_bit_for_bit(tmp_path: Path) -> None:
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "dropout": 0.1,
               "per_device_train_batch_size": 4, "freeze": ["head"], "weight_decay": 0.1,
               "learning_rates": {"tower": 1e-4, "projector": 3e-3}, "logging_steps": 1}
    whole, resumed = (make_trainer(tmp_path / name, **options) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    rates = [[row["learning_rate/projector"] for row in trainer.state.log_history if "loss" in row]
             for trainer in (whole, resumed)]
    assert rates[0] == rates[1]


# ----- several processes --------------------------------------------------------------------

# One process has rows without images wherever the other has some; in the last round of "mixed" it
# is only texts, when gradients are exchanged.
MIXED = {"kinds": ["text", "one", "turns", "text", "two", "one", "text", "text"],
         "train_sampling_strategy": "sequential"}
RECOMPUTED = {"gradient_checkpointing": True}
IN_TWO = {
    "mixed": MIXED,
    "aligned": {**MIXED, **RECOMPUTED, "freeze": ALIGN},
    # the last layer of the tower has no share in any batch
    "earlier-features": {**MIXED, **RECOMPUTED, "student_config": {"vision_feature_layer": -2}},
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    in_processes(2, folder, **{name: {**SGD, **split, **options}
                               for name, options in IN_TWO.items()})
    return folder


@pytest.mark.parametrize("name", IN_TWO)
def test_batches_without_images_in_one_of_two_processes(
    name: str, two_processes: Path, tmp_path: Path
) -> None:
    expected = step_gradient(tmp_path, **IN_TWO[name])
    before = weights(make_trainer(tmp_path))
    after = load_file(two_processes / name / "final.safetensors")
    found: dict[str, Tensor] = {name: before[name] - after[name] for name in before}
    assert relative(expected, found) < TOLERANCE


def settled(family: str, processes: ParallelMode, **arguments: Any) -> bool | None:
    args = SimpleNamespace(**{
        "ddp_find_unused_parameters": None, "gradient_checkpointing": False,
        "gradient_checkpointing_kwargs": None, "parallel_mode": processes, **arguments})
    settle_unused(args, build(family).model)
    return args.ddp_find_unused_parameters


def test_unused_parameters_are_looked_for_where_there_is_a_tower() -> None:
    one, many = ParallelMode.NOT_DISTRIBUTED, ParallelMode.DISTRIBUTED
    reentrant = {"gradient_checkpointing": True,
                 "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    assert settled("llava", many) is True
    assert settled("llava", many, gradient_checkpointing=True) is True
    assert settled("llava", many, ddp_find_unused_parameters=False, **reentrant) is False
    assert settled("llava", one, **reentrant) is True
    assert settled("llama", many, **reentrant) is None
    with pytest.raises(TaidError, match="use_reentrant: false"):
        settled("llava", many, **reentrant)


@pytest.mark.parametrize(("kwargs", "reentrant"), [
    (None, False), ({}, False), ({"every_n_layers": 2, "offload": True}, False),
    ({"use_reentrant": False, "preserve_rng_state": True}, False), ({"use_reentrant": True}, True),
    ({"preserve_rng_state": True}, True),
])
def test_the_reentrant_way_is_torchs_default(kwargs: Any, reentrant: bool) -> None:
    args = SimpleNamespace(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    assert is_reentrant(args) == reentrant
    args.gradient_checkpointing = False
    assert not is_reentrant(args)
