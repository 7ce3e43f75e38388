"""A teacher that is the base model of a LoRA student: one copy says what two copies said."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.recipes import (
    Checkpoints,
    Outcome,
    loaded,
    pairs,
    picture_rows,
    write_jsonl,
    write_recipe,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from taid_vlm.config.recipe import parse_recipe
from taid_vlm.errors import TaidError
from taid_vlm.models.lora import attach_adapter
from taid_vlm.plan import ledger as kinds
from taid_vlm.plan.plan import plan_recipe
from taid_vlm.runs import run
from taid_vlm.teachers import SharedTeacher, TeacherInStudent

peft = pytest.importorskip("peft")

Cli = Callable[..., Outcome]
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.2,
        "init_lora_weights": False}
SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # family, peft, train
    "fused, dropout": ("llama", LORA, {}),
    "reference": ("llama", LORA, {"loss_implementation": "reference"}),
    "checkpointing": ("llama", LORA, {"gradient_checkpointing": True}),
    "reentrant": ("llama", LORA, {"gradient_checkpointing": True,
                                  "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "head": ("llama", {**LORA, "target_modules": ["q_proj", "lm_head"]}, {}),
    "embeddings": ("llama", {**LORA, "target_modules": ["q_proj", "embed_tokens"]}, {}),
    "DoRA": ("llama", {**LORA, "use_dora": True, "init_lora_weights": True}, {}),
    "bf16": ("llama", LORA, {"bf16": True}),
    "noise": ("llama", LORA, {"neftune_noise_alpha": 5.0}),
    "images": ("llava", LORA, {"freeze": ["tower"]}),
    "images, checkpointing": ("llava", LORA, {"gradient_checkpointing": True}),
    "experts": ("qwen3_moe", {**LORA, "target_modules": "all-linear", "lora_dropout": 0.0}, {}),
}


def tree(
    folder: Path, base: str, peft: Mapping[str, Any] | None, sees: bool = False, **train: Any
) -> dict[str, Any]:
    rows = {side: picture_rows(folder, 8, seed) if sees else pairs(8, seed)
            for seed, side in enumerate(("train", "eval"))}
    return {
        "teacher": base,
        "student": {"model_name_or_path": base, **({"peft": dict(peft)} if peft else {})},
        "data": {side: str(write_jsonl(folder / f"{side}.jsonl", part))
                 for side, part in rows.items()},
        "train": {"max_steps": 4, "learning_rate": 5e-2, "use_cpu": True, "disable_tqdm": True,
                  "per_device_train_batch_size": 2, "logging_steps": 1, "eval_strategy": "steps",
                  "eval_steps": 2, **train},
        "evaluate": {"examples": 1, "max_new_tokens": 3},
        "output_dir": str(folder / "out"),
    }


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those of the runs, in order."""
    made: list[Any] = []
    make = run._make_trainer

    def noted(*args: Any) -> Any:
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(run, "_make_trainer", noted)
    return made


def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on two copies are loaded."""
    monkeypatch.setattr(run, "sharing", lambda recipe, found: None)


def assert_as_two_copies(
    cli: Cli, folder: Path, base: dict[str, Any], trainers: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A recipe carried out with one copy (to `out`), and with two (to `two`): the same weights."""
    assert cli("distill", write_recipe(folder, base)).status == 0
    assert isinstance(trainers[0].teacher, SharedTeacher)
    apart(monkeypatch)
    assert cli("distill", write_recipe(
        folder, {**base, "output_dir": str(folder / "two")})).status == 0
    assert same(weights(folder / "out"), weights(folder / "two"))


def figures(folder: Path, *without: str) -> Any:
    """All that was logged, measured and answered, but for times."""
    results = loaded(folder / "results.json")
    times = ("per_second", "runtime", "time_share", *without)
    history = [{key: value for key, value in line.items()
                if not any(name in key for name in times)} for line in results["history"]]
    return history, results["eval"], results["canary"], results["examples"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student/adapter_model.safetensors")


def same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("setting", SETTINGS)
def test_one_copy_is_two_copies_bit_for_bit(
    setting: str, cli: Cli, checkpoints: Checkpoints, tmp_path: Path, trainers: list[Any],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    """Weights, every logged figure, held-out figures, canary and answers."""
    family, config, train = SETTINGS[setting]
    base = tree(tmp_path, checkpoints(family), config, family == "llava", **train)
    assert cli("distill", write_recipe(tmp_path, base)).status == 0
    count = sum(p.numel() for name, p in trainers[0].model.named_parameters()
                if "lora_" not in name)
    assert f"Teacher and student share {count:,} parameters" in caplog.text
    assert isinstance(trainers[0].teacher, SharedTeacher)
    apart(monkeypatch)
    assert cli("distill", write_recipe(
        tmp_path, {**base, "output_dir": str(tmp_path / "two")})).status == 0
    assert not isinstance(trainers[1].teacher, SharedTeacher)
    assert same(weights(tmp_path / "out"), weights(tmp_path / "two"))
    assert figures(tmp_path / "out") == figures(tmp_path / "two")
    one, two = (loaded(tmp_path / name / "results.json")["models"] for name in ("out", "two"))
    assert one["teacher"].pop("shared_parameters") == count == one["teacher"]["parameters"]
    assert two["teacher"].pop("shared_parameters") is None
    assert one == two


@pytest.fixture
def adapter(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """A teacher's own, on layers that the student's does not touch, too."""
    torch.manual_seed(3)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(checkpoints("llama")), peft.LoraConfig(
            r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = checkpoints("llama")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("train", [{}, {"gradient_checkpointing": True},
                                   {"loss_implementation": "reference"}],
                         ids=["fused", "checkpointing", "reference"])
def test_a_teacher_with_an_adapter_is_a_second_one_on_the_same_base(
    train: dict[str, Any], cli: Cli, checkpoints: Checkpoints, tmp_path: Path, adapter: Path,
    trainers: list[Any], monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit as on a copy of the base; merged into one, but for rounding. It is not saved."""
    base = {**tree(tmp_path, checkpoints("llama"), LORA, save_steps=2, **train),
            "teacher": str(adapter)}
    assert cli("distill", write_recipe(tmp_path, base)).status == 0
    assert isinstance(trainers[0].teacher, SharedTeacher)
    files = {path.name for path in (tmp_path / "out").rglob("*")}
    assert "checkpoint-2" in files
    assert "teacher" not in files
    assert not any(".teacher." in name for name in weights(tmp_path / "out"))
    apart(monkeypatch)
    assert cli("distill", write_recipe(
        tmp_path, {**base, "output_dir": str(tmp_path / "merged")})).status == 0
    load = run.load_model
    monkeypatch.setattr(run, "load_model", lambda spec, role, *half: load(
        spec, role, *half) if role == "student" else attach_adapter(
            AutoModelForCausalLM.from_pretrained(checkpoints("llama")), adapter, role))
    assert cli("distill", write_recipe(
        tmp_path, {**base, "output_dir": str(tmp_path / "two")})).status == 0
    assert same(weights(tmp_path / "out"), weights(tmp_path / "two"))
    one, two = (figures(tmp_path / name, "total_flos") for name in ("out", "two"))
    assert one == two  # transformers counts operations by the parameters of both adapters
    models = loaded(tmp_path / "out/results.json")["models"]
    assert models["student"] == loaded(tmp_path / "two/results.json")["models"]["student"]
    assert models["teacher"]["parameters"] > models["teacher"]["shared_parameters"]
    kl, merged = (figures(tmp_path / name)[1]["before"]["kl"] for name in ("out", "merged"))
    assert kl == pytest.approx(merged, rel=1e-4)


def test_a_run_with_a_shared_base_goes_on_bit_for_bit(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path, adapter: Path
) -> None:
    for teacher in (checkpoints("llama"), str(adapter)):
        base = {**tree(tmp_path, checkpoints("llama"), LORA, save_steps=2), "teacher": teacher}
        assert cli("distill", write_recipe(tmp_path, base), "--overwrite").status == 0
        whole = weights(tmp_path / "out")
        shutil.rmtree(tmp_path / "out/checkpoint-4")
        shutil.rmtree(tmp_path / "out/student")
        (tmp_path / "out/results.json").unlink()
        assert cli("distill", tmp_path / "recipe.yaml", "--resume").status == 0
        assert loaded(tmp_path / "out/results.json")["train"]["resumed_from"] == "checkpoint-2"
        assert same(whole, weights(tmp_path / "out"))


def test_freeze_and_random_state_are_left_alone(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path, trainers: list[Any]
) -> None:
    """A pass of the teacher draws nothing and gives no gradient back to what was frozen."""
    base = tree(tmp_path, checkpoints("llava"), {**LORA, "target_modules": "all-linear"}, True,
                freeze=["tower", "projector"])
    assert cli("distill", write_recipe(tmp_path, base)).status == 0
    trainer = trainers[0]
    trainer.model.train()
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and "language_model" in name for name in trained)
    modes = {name: module.training for name, module in trainer.model.named_modules()}
    batch = trainer.data_collator([trainer.train_dataset[0]])
    state = torch.get_rng_state()
    first = trainer.teacher.logits(batch)
    signal = trainer.teacher.hidden(batch)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.allclose(signal.head.open().logits(signal.hidden), first, atol=1e-5)
    assert not first.requires_grad
    assert trained == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert modes == {name: module.training for name, module in trainer.model.named_modules()}
    assert not torch.equal(trainer.model(**batch["student_inputs"]).logits[batch["student_mask"]],
                           first)


def changed(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A recipe with other values, at "key.key"."""
    for path, value in changes.items():
        section, key = path.split("__")
        inner = base[section] if isinstance(base[section], dict) else {
            "model_name_or_path": base[section]}
        base = {**base, section: {**inner, key: value}}
    return base


@pytest.mark.parametrize(("changes", "words"), [
    ({"teacher__dtype": "bfloat16"}, "the teacher's weights are bfloat16, the student's float32"),
    ({"teacher__attn_implementation": "eager"}, "teacher.attn_implementation = 'eager'"),
    ({"student__peft": {**LORA, "modules_to_save": ["norm"]}}, "student.peft has modules_to_save"),
    ({"student__peft": {**LORA, "bias": "all"}}, "student.peft has bias"),
    ({"student__peft": {**LORA, "init_lora_weights": "pissa"}}, "init_lora_weights = 'pissa'"),
])
def test_where_it_would_not_hold_two_copies_are_loaded_and_the_reason_is_told(
    changes: dict[str, Any], words: str, cli: Cli, checkpoints: Checkpoints, tmp_path: Path,
    trainers: list[Any], caplog: pytest.LogCaptureFixture,
) -> None:
    base = changed(tree(tmp_path, checkpoints("llama"), LORA, eval_strategy="no"), **changes)
    base["train"].pop("eval_steps")
    assert cli("distill", write_recipe(tmp_path, base)).status == 0
    assert not isinstance(trainers[0].teacher, SharedTeacher)
    assert words in caplog.text
    assert "Teacher and student have one base model, loaded for each" in caplog.text


def test_full_training_and_other_models_have_two_copies(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path, trainers: list[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = tree(tmp_path, checkpoints("llama"), None, max_steps=2)
    assert cli("distill", write_recipe(tmp_path, base)).status == 0
    assert "all of the student's weights are trained" in caplog.text
    other = changed(tree(tmp_path, checkpoints("llama"), LORA, max_steps=2),
                    teacher__model_name_or_path=checkpoints("llama", seed=1))
    caplog.clear()
    assert cli("distill", write_recipe(tmp_path, other), "--overwrite").status == 0
    assert "one base model" not in caplog.text
    assert not any(isinstance(trainer.teacher, SharedTeacher) for trainer in trainers)


def test_weights_in_half_precision_are_shared_in_their_own_type(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path, trainers: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A base in bfloat16, an adapter in float32, bfloat16 autocast."""
    base = tree(tmp_path, checkpoints("llama"), LORA, bf16=True)
    for side in ("teacher", "student"):
        base = changed(base, **{f"{side}__dtype": "bfloat16"})
    assert_as_two_copies(cli, tmp_path, base, trainers, monkeypatch)
    assert figures(tmp_path / "out")[:3] == figures(tmp_path / "two")[:3]


def test_a_plan_counts_one_copy(
    checkpoints: Checkpoints, tmp_path: Path, adapter: Path
) -> None:
    """And says so; without weights of the teacher's adapter being read."""
    alone = tree(tmp_path, checkpoints("llama"), LORA)
    other = changed(alone, teacher__model_name_or_path=checkpoints("llama", seed=1))
    one, own, two = (plan_recipe(parse_recipe(recipe))[0] for recipe in (
        alone, {**alone, "teacher": str(adapter)}, other))
    sizes = {part.name: part.most for part in two.components}
    for plan in (one, own):
        parts = {part.name: part.most for part in plan.components}
        assert kinds.TEACHER not in parts
        assert any("share one base model" in note for note in plan.notes)
        more = parts[kinds.STUDENT] - sizes[kinds.STUDENT]
        assert 0 <= more < 0.1 * sizes[kinds.TEACHER]
        assert (more > 0) == (plan is own)
    assert not any("base model" in note for note in two.notes)
    apart = plan_recipe(parse_recipe(changed(alone, teacher__dtype="bfloat16")))[0]
    assert any("the teacher's weights are bfloat16" in note for note in apart.notes)


def on_two(folder: Path, recipe: Mapping[str, Any], *options: str) -> str:
    """What two gloo processes that carry out a recipe say."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
         "taid_vlm", "distill", str(write_recipe(folder, recipe)), *options],
        capture_output=True, text=True, timeout=400, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("train", [{}, {"gradient_checkpointing": True, "bf16": True}],
                         ids=["plain", "checkpointing, bf16"])
def test_on_two_processes_it_is_two_copies_and_goes_on(
    train: dict[str, Any], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    copy = shutil.copytree(checkpoints("llama"), tmp_path / "copy")
    base = tree(tmp_path, checkpoints("llama"), LORA, save_steps=2, **train)
    assert on_two(tmp_path, base).count("Teacher and student share 55,456 parameters") == 1
    other = {**base, "teacher": str(copy), "output_dir": str(tmp_path / "two")}
    assert "share" not in on_two(tmp_path, other)
    whole = weights(tmp_path / "out")
    assert same(whole, weights(tmp_path / "two"))
    assert figures(tmp_path / "out") == figures(tmp_path / "two")
    for path in ("checkpoint-4", "student"):
        shutil.rmtree(tmp_path / "out" / path)
    (tmp_path / "out/results.json").unlink()
    on_two(tmp_path, base, "--resume")
    assert loaded(tmp_path / "out/results.json")["train"]["resumed_from"] == "checkpoint-2"
    assert same(whole, weights(tmp_path / "out"))


@pytest.mark.slow
def test_a_sharded_student_has_a_teacher_of_its_own(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    base = tree(tmp_path, checkpoints("llama"), LORA, fsdp=True, max_steps=2)
    told = on_two(tmp_path, {**base, "evaluate": {"examples": 0}})
    assert "loaded for each: train.fsdp is set" in told


def test_the_students_own_answers_are_sampled_as_beside_two_copies(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path, trainers: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sampled by the student with its adapter, read by the teacher without it."""
    base = tree(tmp_path, checkpoints("llama"), LORA, max_steps=2)
    base["objective"] = {"name": "taid", "on_policy": {"lmbda": 1.0, "max_new_tokens": 4}}
    assert_as_two_copies(cli, tmp_path, base, trainers, monkeypatch)
    assert figures(tmp_path / "out") == figures(tmp_path / "two")


def test_a_quantized_base_is_shared(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path, trainers: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As two copies in 4 bits."""
    pytest.importorskip("bitsandbytes")
    base = tree(tmp_path, checkpoints("llama"), LORA)
    for side in ("teacher", "student"):
        base = changed(base, **{f"{side}__quantization": "4bit"})
    assert_as_two_copies(cli, tmp_path, base, trainers, monkeypatch)
    assert figures(tmp_path / "out") == figures(tmp_path / "two")


def test_a_student_without_an_adapter_is_no_place_for_a_teacher(checkpoints: Checkpoints) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama"))
    with pytest.raises(TaidError, match="peft_config"):
        TeacherInStudent(model).enter(model)
