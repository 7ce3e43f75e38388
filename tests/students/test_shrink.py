"""A shrunk student is its teacher without some layers, or with its image tokens averaged."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from students.deep import (
    LAYERS,
    TOWER,
    decoder_layers,
    deep,
    random_model,
    tower_layers,
    without,
)
from tokenizers.pre_tokenizers import Digits
from training.runs import rows, weights
from zoo import TEXT_FAMILIES, VLM_FAMILIES, Built, build, save
from zoo.images import image, shape

from taid_vlm import DistillationConfig, DistillationTrainer
from taid_vlm.adapters import make_adapter
from taid_vlm.cli import main
from taid_vlm.errors import TaidError
from taid_vlm.models.forward import forward_names
from taid_vlm.records import parse_record
from taid_vlm.students import image_tokens
from taid_vlm.students import shrink as module
from taid_vlm.students.layers import (
    Stack,
    cut_config,
    cut_layers,
    even_choice,
    language_stack,
    tower_stack,
)
from taid_vlm.students.shrink import shrink

SQUARE = (64, 64)
TIMM = ("fast_vlm", "perception_lm")  # towers whose layers no config counts


def reload(folder: Path) -> tuple[Any, Any]:
    """As a user would, without this package."""
    config = hf.AutoConfig.from_pretrained(folder)
    sees = hasattr(config, "vision_config")
    model = (hf.AutoModelForImageTextToText if sees else hf.AutoModelForCausalLM).from_pretrained(
        folder, dtype="auto", use_safetensors=True)
    return model.eval(), (hf.AutoProcessor if sees else hf.AutoTokenizer).from_pretrained(folder)


def inputs(processor: Any, size: tuple[int, int] = (96, 48)) -> dict[str, torch.Tensor]:
    adapter = make_adapter(processor, "student")
    picture = [shape(*size)] if adapter.sees_images else []
    row = {"prompt": "<image>what?" if picture else "what?", "completion": "a blue circle",
           "images": picture}
    record = parse_record(row, "row")
    return adapter.encode([adapter.render(record)], [picture]).inputs


@torch.inference_mode()
def logits(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    names = forward_names(type(model))
    return model(**{key: x for key, x in given.items() if key in names}, use_cache=False).logits


def same_layers(old: Any, new: Any, kept: tuple[int, ...]) -> None:
    for layer, number in zip(new, kept, strict=True):
        ours, theirs = layer.state_dict(), old[number].state_dict()
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), (number, name)


# ----- layers -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", VLM_FAMILIES + TEXT_FAMILIES)
def test_a_student_is_its_teacher_without_the_dropped_layers(family: str, tmp_path: Path) -> None:
    built = deep(family)
    has_tower = family in VLM_FAMILIES and family not in TIMM
    made = shrink(str(save(built, tmp_path / "teacher")), tmp_path / "student", layers=4,
                  tower_layers=4 if has_tower else None)
    student, processor = reload(tmp_path / "student")
    teacher, given = built.model, inputs(processor)
    assert made.layers is not None and len(made.layers) == 4 == len(decoder_layers(student))
    same_layers(decoder_layers(teacher), decoder_layers(student), made.layers)
    tower = tower_layers(teacher, TOWER) if has_tower else torch.nn.ModuleList()
    if has_tower:
        assert made.tower_layers is not None and len(made.tower_layers) == 4
        same_layers(tower, tower_layers(student, 4), made.tower_layers)
    whole = logits(teacher, given)
    with without(decoder_layers(teacher), made.layers), without(tower, made.tower_layers or ()):
        wanted = logits(teacher, given)
    found = logits(student, given)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (found - whole).abs().max() > 1e-2  # the dropped layers did something
    if family in VLM_FAMILIES:
        number = placeholders(student, inputs(processor, (448, 448)))
        assert made.image_tokens == {"of a 448 x 448 image": (number, number)}
    assert made.parameters["all"][1] == sum(p.numel() for p in student.parameters())
    assert made.parameters["all"][0] == sum(p.numel() for p in teacher.parameters())
    assert student.generation_config.eos_token_id == teacher.generation_config.eos_token_id


@pytest.mark.parametrize("family", ["internvl", "gemma4", "gemma2", "qwen2"])
def test_half_precision_and_tied_heads_keep_every_bit(family: str, tmp_path: Path) -> None:
    built = deep(family, tie_word_embeddings=True)
    built.model.to(torch.bfloat16)
    shrink(str(save(built, tmp_path / "teacher")), tmp_path / "student", keep=[0, 2, 3, 5])
    student, _ = reload(tmp_path / "student")
    assert student.dtype == torch.bfloat16
    assert student.get_input_embeddings().weight is student.get_output_embeddings().weight
    same_layers(decoder_layers(built.model), decoder_layers(student), (0, 2, 3, 5))
    with safe_open(tmp_path / "student" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def _small(**changes: Any) -> dict[str, Any]:
    return {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
            "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2} | changes


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
UNUSUAL = {
    "sparse every second layer": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**_small(
        head_dim=8, decoder_sparse_step=2, mlp_only_layers=[3], **EXPERTS))),
    "dense at first": (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config(**_small(
        num_key_value_heads=4, first_k_dense_replace=2, n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16, q_lora_rank=16,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8))),
    "no rope here and there": (hf.SmolLM3ForCausalLM, hf.SmolLM3Config(**_small(
        no_rope_layer_interval=3))),
    "windows from a layer on": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**_small(
        use_sliding_window=True, sliding_window=4, max_window_layers=3))),
    "shared keys and embeddings per layer": (hf.Gemma3nForCausalLM, hf.Gemma3nTextConfig(**_small(
        head_dim=8, num_kv_shared_layers=2, intermediate_size=[16, 32, 48, 16, 32, 48],
        layer_types=["sliding_attention", "full_attention"] * 3, sliding_window=4,
        vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, laurel_rank=4,
        activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.9, 0.0, 0.0]))),
    "experts by number": (hf.Llama4ForCausalLM, hf.Llama4TextConfig(**_small(
        head_dim=8, intermediate_size_mlp=48, num_local_experts=4, interleave_moe_layer_step=2,
        attention_chunk_size=4))),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_settings_by_layer_are_cut_with_the_layers(name: str, tmp_path: Path) -> None:
    teacher = random_model(*UNUSUAL[name])
    stack = language_stack(teacher.config)
    kept = (0, 2, 3, 5) if stack.must.keys() <= {0, 2, 3, 5} else even_choice(stack, 4)
    student = cut_layers(teacher, {stack: kept})
    given = {"input_ids": torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))}
    with without(decoder_layers(teacher), kept):
        wanted = logits(teacher, given)
    assert torch.equal(logits(student, given), wanted)
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(type(teacher).from_pretrained(tmp_path).eval(), given), wanted)


def test_layers_that_know_their_number_are_refused(tmp_path: Path) -> None:
    """GPT-2 can divide attention by the layer's number, which its config cannot keep."""
    built = deep("gpt2", scale_attn_by_inverse_layer_idx=True)
    teacher = str(save(built, tmp_path / "teacher"))
    with pytest.raises(TaidError, match="gpt2 cannot be cut to these layers"):
        shrink(teacher, tmp_path / "student", keep=[0, 2, 5])
    shrink(teacher, tmp_path / "first", keep=[0, 1, 2])  # the numbers stay
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "teacher"]


def test_a_cut_that_mixes_up_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check must see what only the config says: here, which layer has a window."""
    built = deep("gemma2", sliding_window=4)

    def wrong(config: Any, cuts: Any) -> dict[str, Any]:
        tree = cut_config(config, cuts)
        return tree | {"layer_types": tree["layer_types"][::-1]}

    monkeypatch.setattr("taid_vlm.students.layers.cut_config", wrong)
    with pytest.raises(TaidError, match="gemma2 cannot be cut"):
        shrink(str(save(built, tmp_path / "teacher")), tmp_path / "student", layers=4)


@pytest.mark.parametrize(("feature", "kept", "expected"), [
    (-1, (0, 2, 4), -1), (-2, (0, 2, 3, 4), -2), (-2, (0, 3, 4), -2), (3, (0, 2, 4), 2),
    ([-2, 1, -1], (0, 1, 4), [-2, 1, -1]), ([2, -3], (0, 1, 3, 4), [2, -3])])
def test_features_are_taken_where_they_were(feature: Any, kept: Any, expected: Any) -> None:
    config = hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(num_hidden_layers=5),
                            vision_feature_layer=feature)
    tree = cut_config(config, {tower_stack(config): kept})
    assert tree["vision_feature_layer"] == expected
    assert tree["vision_config"]["num_hidden_layers"] == len(kept)


# ----- which layers -------------------------------------------------------------------------


def stack_of(kinds: str, must: tuple[int, ...] = ()) -> Stack:
    ends = dict.fromkeys((0, len(kinds) - 1, *must), "test")
    return Stack("language model", "", len(kinds), len(kinds), tuple(kinds), ends)


@pytest.mark.parametrize("count", [2, 3, 7, 24, 32])
def test_even_is_round_half_up_of_equal_steps(count: int) -> None:
    for number in range(2, count + 1):
        wanted = [int(i * (count - 1) / (number - 1) + 0.5) for i in range(number)]
        assert list(even_choice(stack_of("a" * count), number)) == wanted


def test_even_keeps_kinds_in_proportion_and_what_must_stay() -> None:
    gemma = ("s" * 5 + "f") * 4 + "ss"  # 22 sliding, 4 full
    chosen = even_choice(stack_of(gemma), 13)
    assert "".join(gemma[i] for i in chosen).count("f") == 2
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(300):
        kinds = "".join("abc"[draw(0, 3)] for _ in range(draw(4, 30)))
        must = tuple(draw(0, len(kinds)) for _ in range(draw(0, 3)))
        stack = stack_of(kinds, must)
        number = draw(len(stack.must), len(kinds) + 1)
        chosen = even_choice(stack, number)
        assert len(set(chosen)) == number and list(chosen) == sorted(chosen)
        assert set(stack.must) <= set(chosen) <= set(range(len(kinds)))
        if number >= len(set(kinds)) + len(stack.must):
            assert {kinds[i] for i in chosen} == set(kinds)


@torch.no_grad()
def _do_nothing(model: Any, numbers: tuple[int, ...]) -> None:
    for i in numbers:
        decoder_layers(model)[i].self_attn.o_proj.weight.zero_()
        decoder_layers(model)[i].mlp.down_proj.weight.zero_()


@pytest.mark.parametrize("family", ["qwen2", "internvl"])
def test_importance_finds_the_layers_that_do_nothing(family: str, tmp_path: Path) -> None:
    built = deep(family)
    _do_nothing(built.model, (2, 3))
    data = tmp_path / "data.jsonl"
    image("wide").save(tmp_path / "wide.png")
    texts = [{"prompt": f"what is {i}", "completion": "a red circle " * (i + 1)} for i in range(5)]
    seen = [{"prompt": "<image>what?", "completion": "two squares", "images": ["wide.png"]}]
    given = texts + seen * (family == "internvl")
    data.write_text("\n".join(map(json.dumps, given)))
    made = shrink(str(save(built, tmp_path / "teacher")), tmp_path / "student", layers=4,
                  choose="importance", calibration=str(data))
    assert made.layers == (0, 1, 4, 5) and made.importance is not None
    assert made.importance[2] == pytest.approx(0, abs=1e-9)
    wanted = naive_influence(built, given, tmp_path)
    assert made.importance[: LAYERS - 1] == pytest.approx(wanted, abs=1e-6)
    student, processor = reload(tmp_path / "student")
    batch = inputs(processor)
    torch.testing.assert_close(logits(student, batch), logits(built.model, batch))


@torch.inference_mode()
def naive_influence(built: Built, data: list[dict[str, Any]], root: Path) -> list[float]:
    """All but the last layer's, token by token, from the hidden states transformers gives."""
    adapter, found = make_adapter(built.processor, "student"), []
    names = forward_names(type(built.model))
    for row in data:
        record = parse_record(row, "row", root)
        given = adapter.encode([adapter.render(record)], [[i.load() for i in record.images]])
        used = {key: x for key, x in given.inputs.items() if key in names}
        states = built.model(**used, output_hidden_states=True).hidden_states
        answer = given.rows[0].answers[0]
        positions = [token.position - 1 for token in answer.tokens] + [answer.end_of_turn - 1]
        for at in positions:
            rows = [state[0, at].double() for state in states]
            found.append([1 - float(a @ b / (a.norm() * b.norm()))
                          for a, b in pairwise(rows)][: LAYERS - 1])
    return torch.tensor(found, dtype=torch.float64).mean(0).tolist()


# ----- image tokens -------------------------------------------------------------------------

# family: tokens to ask for, times fewer, what to change of the zoo's processor
NARROWED: dict[str, tuple[int, int, dict[str, Any]]] = {
    "qwen2_vl": (4, 4, {"size": {"shortest_edge": 1024, "longest_edge": 64 * 64}}),
    "qwen2_5_vl": (4, 4, {}),
    "qwen3_vl": (9, 4, {}),
    "qwen3_5": (4, 4, {"size": {"shortest_edge": 1024, "longest_edge": 64 * 64}}),
    "smolvlm": (1, 4, {}),
    "internvl": (1, 4, {}),
    "lfm2_vl": (4, 4, {}),
    "mistral3": (4, 4, {}),
    "ovis2": (1, 16, {}),
    "gemma3": (1, 9, {}),
    "gemma4": (70, 4, {"max_soft_tokens": 280}),
    "perception_lm": (4, 4, {}),
}
POOLED = ("gemma3", "gemma4", "perception_lm")  # no weight depends on the number of tokens


@pytest.fixture(scope="module")
def narrowed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Built, Any, Any]]:
    """A teacher and its student with fewer image tokens, loaded again, and the processor."""

    @cache
    def make(family: str) -> tuple[Built, Any, Any]:
        folder = tmp_path_factory.mktemp(family)
        built, (number, _, changes) = build(family), NARROWED[family]
        for name, value in changes.items():
            setattr(built.processor.image_processor, name, value)
        made = shrink(str(save(built, folder / "teacher")), folder / "student",
                      image_tokens=number)
        per = image_tokens.FAMILIES[built.model.config.model_type].per
        assert made.image_tokens[per][1] == number
        return built, *reload(folder / "student")

    return make


def placeholders(model: Any, given: dict[str, torch.Tensor]) -> int:
    config = model.config
    token = getattr(config, "image_token_id", None) or config.image_token_index
    return int((given["input_ids"] == token).sum())


@pytest.mark.parametrize("family", NARROWED)
def test_fewer_image_tokens_in_processor_and_model(family: str, narrowed: Any) -> None:
    built, student, processor = narrowed(family)
    before, after = (inputs(p, SQUARE) for p in (built.processor, processor))
    times = NARROWED[family][1]
    assert placeholders(student, before) == times * placeholders(student, after) > 0
    found = logits(student, after)
    assert found.shape[1] == after["input_ids"].shape[1] and found.isfinite().all()
    other = inputs(processor, SQUARE) | {
        "pixel_values": after["pixel_values"].flip(-1) + 0.1}
    assert not torch.equal(logits(student, other), found)  # it is not blind
    old, new = built.model.state_dict(), student.state_dict()
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert bool(changed) == (family not in POOLED)


# the module whose output is, for every token, the mean of the teacher's over larger squares
MEANS = {"smolvlm": "model.connector", "mistral3": "model.multi_modal_projector.patch_merger",
         "ovis2": "model.vision_tower.head_linear", "qwen2_vl": "model.visual.merger",
         "qwen2_5_vl": "model.visual", "qwen3_vl": "model.visual.merger",
         "qwen3_5": "model.visual.merger"}


def output_of(model: Any, name: str, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a module gives for the last image (or tile): [tokens, width]."""
    caught: list[Any] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda *arguments: caught.append(arguments[-1]))
    logits(model, given)
    handle.remove()
    found = getattr(caught[-1], "pooler_output", caught[-1])
    return found[-1] if isinstance(found, tuple) or found.ndim == 3 else found


@pytest.mark.parametrize("family", MEANS)
def test_a_new_token_is_the_mean_of_those_it_replaces(family: str, narrowed: Any) -> None:
    built, student, processor = narrowed(family)
    old = output_of(built.model, MEANS[family], inputs(built.processor, SQUARE))
    new = output_of(student, MEANS[family], inputs(processor, SQUARE))
    side, k = int(len(old) ** 0.5), int(NARROWED[family][1] ** 0.5)
    grid = old.view(side // k, k, side // k, k, -1).mean((1, 3)).flatten(0, 1)
    assert old.std(0).max() > 0.1  # the tokens differ, so that their order shows
    torch.testing.assert_close(new, grid, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["internvl", "lfm2_vl"])
def test_where_merged_tokens_are_alike_the_new_one_is_like_them(
    family: str, narrowed: Any
) -> None:
    """All that can be asked for where a LayerNorm stands before the first layer."""
    built, student, _ = narrowed(family)
    square = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(0))
    grid = square.repeat(2, 2, 1)[None]  # four equal tokens of two by two patches
    old, new = (project(family, model.model, grid) for model in (built.model, student))
    assert len(old) == 4 and len(new) == 1
    torch.testing.assert_close(old, new.expand(4, -1), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def project(family: str, model: Any, grid: torch.Tensor) -> torch.Tensor:
    if family == "internvl":
        grid = model.pixel_shuffle(grid, scale_factor=model.config.downsample_ratio)
    return model.multi_modal_projector(grid).flatten(0, 2)


def test_layers_and_image_tokens_together(tmp_path: Path) -> None:
    built = deep("internvl")
    made = shrink(str(save(built, tmp_path / "teacher")), tmp_path / "student", layers=3,
                  tower_layers=2, image_tokens=1)
    student, processor = reload(tmp_path / "student")
    assert made.tower_layers == (0, 4) and made.image_tokens["per tile"] == (4, 1)
    assert len(made.checks) == 2 and logits(student, inputs(processor)).isfinite().all()
    before, after = made.parameters["projector"]
    counts = {part: count for part, (_, count) in made.parameters.items()}
    assert after > before and counts.pop("all") == sum(counts.values())


# ----- in use -------------------------------------------------------------------------------


def test_a_student_learns_from_the_teacher_it_was_cut_from(tmp_path: Path) -> None:
    built = deep("internvl")
    shrink(str(save(built, tmp_path / "teacher")), tmp_path / "student", layers=3, image_tokens=1)
    student, processor = reload(tmp_path / "student")
    data = rows(8)
    arguments = DistillationConfig(
        str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=8, learning_rate=1e-3,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False)
    trainer = DistillationTrainer(student, built.model, arguments, data, data[:2], processor,
                                  built.processor)
    before = weights(trainer)
    trainer.train()
    assert trainer.pairing is not None and trainer.pairing.case == "a"
    assert trainer.all_dropped() == {}
    after = weights(trainer)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("layer_norm" in name for name in moved) and any("layers.2" in name for name in moved)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("teachers")
    families = ("llava", "qwen3_vl", "internvl", "gemma4", "fast_vlm", "llama")
    return {family: str(save(deep(family), folder / family)) for family in families}


BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "nothing to shrink"),
    ("llama", {"layers": 7}, "layers = 7, but the teacher's language model has 6 layers"),
    ("llama", {"layers": 1}, "at least 2 must stay .0: it is the first; 5: it is the last"),
    ("llama", {"layers": 4, "keep": [0, 1]}, "give one of them"),
    ("llama", {"keep": [0, 6]}, "keep = 0,6, but it must name layers from 0 to 5, each once"),
    ("llama", {"keep": [1, 1]}, "each once"),
    ("llama", {"keep": []}, "must name layers"),
    ("llama", {"layers": 4, "choose": "evn"}, "choose = 'evn'. Did you mean 'even'"),
    ("llama", {"layers": 4, "choose": "importance"}, "needs layers .* and calibration"),
    ("llama", {"layers": 4, "calibration": "x.jsonl"}, "only for choose = 'importance'"),
    ("llama", {"layers": 4, "choose": "importance", "calibration": "./x.jsonl"}, "x.jsonl"),
    ("llama", {"tower_layers": 2}, "llama has no vision tower"),
    ("llama", {"image_tokens": 2}, "the config of llama has no setting"),
    ("qwen3_vl", {"keep": [0, 2, 5]}, "keep lacks layer 1, .* visual features are added behind it"),
    ("qwen3_vl", {"tower_layers": 3}, "at least 4 must stay .*3: its features go into"),
    ("gemma4", {"keep": [0, 1, 3, 4, 5]}, "keep lacks layer 2, .* use its keys and values"),
    ("fast_vlm", {"tower_layers": 2}, "keeps its layers in code of its own"),
    ("llava", {"image_tokens": 4}, "this works for gemma3.*compose a student"),
    ("internvl", {"image_tokens": 2}, "has 4 per tile .nearest: 1; valid: 1"),
    ("internvl", {"image_tokens": 4}, "nearest: 1"),
]


@pytest.mark.parametrize(("family", "options", "message"), BROKEN)
def test_mistakes_end_before_weights_are_loaded(
    family: str, options: dict[str, Any], message: str, teachers: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(TaidError, match=message):
        shrink(teachers[family], tmp_path / "student", **options)
    assert not list(tmp_path.iterdir())


def test_a_quantized_teacher_is_refused(teachers: dict[str, str], tmp_path: Path) -> None:
    config = json.loads((Path(teachers["llama"]) / "config.json").read_text())
    shutil.copytree(teachers["llama"], tmp_path / "teacher")
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(
        config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(TaidError, match="is quantized"):
        shrink(str(tmp_path / "teacher"), tmp_path / "student", layers=3)


def test_calibration_needs_records_the_teacher_can_read(
    teachers: dict[str, str], tmp_path: Path
) -> None:
    image("tiny").save(tmp_path / "a.png")
    seen, empty = tmp_path / "seen.jsonl", tmp_path / "empty.jsonl"
    seen.write_text('{"prompt": "<image>what", "completion": "a", "images": ["a.png"]}')
    empty.write_text('{"prompt": "what", "completion": " "}')
    for data, message in ((seen, "teacher cannot see"), (empty, "no record holds an answer")):
        with pytest.raises(TaidError, match=message):
            shrink(teachers["llama"], tmp_path / "out", layers=3, choose="importance",
                   calibration=str(data))


def test_nothing_is_overwritten_and_nothing_half_done_stays(
    teachers: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, file, empty = tmp_path / "taken", tmp_path / "file", tmp_path / "empty"
    taken.mkdir()
    empty.mkdir()
    (taken / "notes").write_text("mine")
    file.write_text("mine")
    with pytest.raises(TaidError, match="is not empty"):
        shrink(teachers["llama"], taken, layers=3)
    with pytest.raises(TaidError, match="is a file"):
        shrink(teachers["llama"], file / "student", layers=3)
    monkeypatch.setattr(module, "check_saved", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(TaidError, match=r"could not be saved to .*empty.*full"):
        shrink(teachers["llama"], empty, layers=3)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "taken"]
    assert shrink(teachers["llama"], empty, layers=3).layers == (0, 3, 5)
    assert (taken / "notes").read_text() == "mine"


def test_a_tokenizer_that_does_not_survive_is_an_error(
    teachers: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers does for some model types: the folder gives another splitting."""
    write = hf.PreTrainedTokenizerFast.save_pretrained

    def rebuilt(self: Any, folder: Path, **options: Any) -> Any:
        other = copy.deepcopy(self)
        other.backend_tokenizer.pre_tokenizer = Digits(individual_digits=True)
        return write(other, folder, **options)

    monkeypatch.setattr(hf.PreTrainedTokenizerFast, "save_pretrained", rebuilt)
    with pytest.raises(TaidError, match="saving and loading the student's tokenizer changes how "):
        shrink(teachers["llama"], tmp_path / "student", layers=3)
    assert not list(tmp_path.iterdir())


def test_the_command_prints_what_was_made(
    teachers: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "student"
    assert main(["shrink", teachers["internvl"], "--output-dir", str(folder), "--keep", "0,1,5",
                 "--tower-layers", "3", "--image-tokens", "1"]) == 0
    printed = capsys.readouterr().out
    for line in ("layers kept: 0, 1, 5", "tower layers kept: 0, 2, 4", "checked: logits are",
                 "checked: plain Auto classes", f"student: {folder}"):
        assert line in printed
    assert "image tokens per tile" in printed and "projector" in printed
    assert main(["shrink", teachers["llama"], "--output-dir", str(folder), "--layers", "3"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_every_setting_of_every_family_is_real() -> None:
    """A misspelt name of a setting would be set and never read."""
    for family in NARROWED:
        built = build(family)
        spec = image_tokens.FAMILIES[built.model.config.model_type]
        tree = built.model.config.to_dict()
        for name in spec.config:
            parent, _, last = name.rpartition(".")
            assert last in (tree[parent] if parent else tree), name
        for name in spec.processor:
            parent, _, last = name.rpartition(".")
            owner = getattr(built.processor, parent) if parent else built.processor
            assert hasattr(owner, last), name
        names = list(built.model.state_dict())
        matched = [name for name in names if image_tokens._rule(spec, name) is not None]
        assert bool(matched) == bool(spec.rules)
