"""Teachers and LoRA students in fewer bits: loaded, learned from, cached, counted, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from taid_vlm.config.model import TeacherSpec
from taid_vlm.config.recipe import parse_recipe
from taid_vlm.errors import TaidError
from taid_vlm.models.loading import load_model
from taid_vlm.models.quantization import bytes_of, stored_tensors
from taid_vlm.plan import ledger as kinds
from taid_vlm.plan.plan import plan_recipe

Cli = Callable[..., Outcome]
LIBRARIES = {"4bit": "bitsandbytes", "8bit": "bitsandbytes", "fp8": "torchao"}
KINDS = pytest.mark.parametrize("kind", LIBRARIES)


@pytest.fixture
def available(kind: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kind whose library is installed; 8-bit floats as if the hardware had them."""
    pytest.importorskip(LIBRARIES[kind])
    monkeypatch.setattr("taid_vlm.models.quantization._without_fp8", lambda: "")
    return kind


def tree(
    folder: Path, teacher: dict[str, Any], student: dict[str, Any], sees: bool = False,
    **train: Any,
) -> dict[str, Any]:
    rows = {side: picture_rows(folder, 6, seed) if sees else pairs(6, seed)
            for seed, side in enumerate(("train", "eval"))}
    return {
        "teacher": teacher, "student": student,
        "data": {side: str(write_jsonl(folder / f"{side}.jsonl", part))
                 for side, part in rows.items()},
        "train": {"max_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True,
                  "per_device_train_batch_size": 3, **train},
        "evaluate": {"examples": 1, "max_new_tokens": 3},
        "output_dir": str(folder / "out"),
    }


def named(path: str, **more: Any) -> dict[str, Any]:
    return {"model_name_or_path": path, **more}


@KINDS
@pytest.mark.parametrize("sees", [False, True], ids=["text", "images"])
def test_a_run_learns_from_a_quantized_teacher(
    available: str, sees: bool, cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """In bfloat16, fused; its head is the checkpoint's own, and results name what it is."""
    teacher = checkpoints("internvl" if sees else "llama")
    student = checkpoints("llava", "permuted", seed=1) if sees else checkpoints("qwen2", seed=1)
    recipe = write_recipe(tmp_path, tree(
        tmp_path, named(teacher, quantization=available), named(student), sees, bf16=True))
    assert cli("distill", recipe).status == 0
    results = loaded(tmp_path / "out/results.json")
    assert results["models"]["teacher"]["quantization"] == available
    assert results["train"]["loss_implementation"]["name"] == "fused"
    whole = load_model(TeacherSpec.model_validate(named(teacher)), "teacher")
    assert results["models"]["teacher"]["parameters"] == whole.num_parameters()
    rounded = load_model(TeacherSpec.model_validate(named(teacher, quantization=available)),
                         "teacher")
    head = rounded.get_output_embeddings()
    assert type(head) is nn.Linear
    assert torch.equal(head.weight, whole.get_output_embeddings().weight)


@KINDS
def test_a_cache_of_a_quantized_teacher_is_the_live_one(
    available: str, cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """A record at a time, the weights are the same, bit for bit."""
    live = tree(tmp_path, named(checkpoints("llama"), quantization=available),
                named(checkpoints("qwen2", seed=1)), per_device_train_batch_size=1,
                per_device_eval_batch_size=1)
    assert cli("distill", write_recipe(tmp_path, live)).status == 0
    assert cli("cache", tmp_path / "recipe.yaml", "--output", tmp_path / "cache").status == 0
    again = {**live, "teacher": {"cache": str(tmp_path / "cache")},
             "output_dir": str(tmp_path / "cached")}
    assert cli("distill", write_recipe(tmp_path, again)).status == 0
    one, two = (load_file(tmp_path / name / "student/model.safetensors")
                for name in ("out", "cached"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@KINDS
def test_an_adapter_is_trained_on_a_quantized_student(
    available: str, cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """It is saved alone, and the key is what the same `quantization_config` by hand is."""
    student = checkpoints("qwen2", seed=1)
    lora = {"peft": {"r": 4, "target_modules": "all-linear"}}
    base = tree(tmp_path, named(checkpoints("llama")), named(student, quantization=available,
                                                             **lora))
    assert cli("distill", write_recipe(tmp_path, base)).status == 0
    adapter = load_file(tmp_path / "out/student/adapter_model.safetensors")
    assert all("lora_" in name and weight.dtype == torch.float32
               for name, weight in adapter.items())
    by_hand = {
        "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                 "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"},
        "8bit": {"load_in_8bit": True}}
    if available in by_hand:
        config = {"quantization_config": {"quant_method": "bitsandbytes", **by_hand[available]}}
        again = {**base, "student": named(student, init_kwargs=config, **lora),
                 "output_dir": str(tmp_path / "by-hand")}
        assert cli("distill", write_recipe(tmp_path, again)).status == 0
        other = load_file(tmp_path / "by-hand/student/adapter_model.safetensors")
        assert all(torch.equal(adapter[name], other[name]) for name in adapter)


@KINDS
def test_a_plan_counts_the_bytes_of_rounded_weights(
    available: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """As the loaded model has them, within 5 %."""
    base = tree(tmp_path, named(checkpoints("internvl"), quantization=available),
                named(checkpoints("llava", "permuted", seed=1)), True)
    plan = plan_recipe(parse_recipe(base))[0]
    planned = next(part.most for part in plan.components if part.name == kinds.TEACHER)
    model = load_model(parse_recipe(base).teacher, "teacher")  # type: ignore[arg-type]
    measured = bytes_of(stored_tensors(model))
    assert abs(planned - measured) < 0.05 * measured
    whole = plan_recipe(parse_recipe({**base, "teacher": checkpoints("internvl")}))[0]
    assert whole.peak - plan.peak == next(
        part.most for part in whole.components if part.name == kinds.TEACHER) - planned


# ----- refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(("teacher", "student", "words"), [
    ({"quantization": "3bit"}, {}, ("teacher.quantization", "3bit", "4bit")),
    ({}, {"quantization": "4bit"}, ("student.quantization", "peft")),
    ({"quantization": "4bit", "init_kwargs": {"load_in_8bit": True}}, {},
     ("quantization", "load_in_8bit")),
    ({"quantization": "fp8"}, {}, ("teacher.quantization", "8.9", "8bit")),
])
def test_what_cannot_be_is_refused_before_weights(
    teacher: dict[str, Any], student: dict[str, Any], words: tuple[str, ...], cli: Cli,
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("taid_vlm.runs.run.load_model", _loaded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = write_recipe(tmp_path, tree(tmp_path, named(checkpoints("llama"), **teacher),
                                         named(checkpoints("qwen2", seed=1), **student)))
    done = cli("distill", recipe)
    assert done.status == 2
    assert len(done.errors) == 1
    assert all(word in done.err for word in words), done.err


def test_stages_are_not_for_a_quantized_student(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    student = named(checkpoints("qwen2", seed=1), quantization="4bit", peft={"r": 4})
    base = tree(tmp_path, named(checkpoints("llama")), student)
    done = cli("distill", write_recipe(tmp_path, {**base, "stages": [{"name": "a"}]}))
    assert done.status == 2
    assert "student.quantization = '4bit' cannot stand beside stages" in done.err


def _loaded(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("weights were loaded")


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_missing_library_is_named_with_its_extra(
    kind: str, cli: Cli, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taid_vlm.runs.run.load_model", _loaded)
    monkeypatch.setattr("taid_vlm.models.quantization.is_bitsandbytes_available", lambda: False)
    done = cli("distill", write_recipe(tmp_path, tree(
        tmp_path, named(checkpoints("llama"), quantization=kind),
        named(checkpoints("qwen2", seed=1)))))
    assert done.status == 2
    assert "bitsandbytes" in done.err
    assert "pip install 'taid-vlm[quantized]'" in done.err


@pytest.mark.parametrize("capability", [(8, 6), (8, 9)])
def test_8_bit_floats_need_a_gpu_that_has_them(
    capability: tuple[int, int], checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taid_vlm.models.quantization import refuse_unavailable

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A10")
    monkeypatch.setattr("taid_vlm.models.quantization.is_torchao_available", lambda: True)
    spec = TeacherSpec.model_validate(named(checkpoints("llama"), quantization="fp8"))
    if capability == (8, 9):
        refuse_unavailable(spec, "teacher")
        return
    with pytest.raises(TaidError, match=r"NVIDIA A10 has 8\.6"):
        refuse_unavailable(spec, "teacher")


@pytest.mark.parametrize(("stored", "name"), [
    ({"quant_method": "gptq", "bits": 4}, "gptq"), ({"quant_method": "awq"}, "awq"),
    ({"quant_method": "fp8"}, "fp8"), ({"quant_method": "mxfp4"}, "mxfp4"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8bit"),
])
def test_what_is_stored_rounded_is_not_rounded_again(
    stored: dict[str, Any], name: str, cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "stored"
    shutil.copytree(checkpoints("llama"), folder)
    config = loaded(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    done = cli("plan", write_recipe(tmp_path, tree(
        tmp_path, named(str(folder), quantization="4bit"), named(checkpoints("qwen2", seed=1)))))
    assert done.status == 2
    assert f"stored quantized already ({name})" in done.err


def test_a_checkpoint_stored_in_4_bits_loads_as_it_is(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "stored"
    AutoModelForCausalLM.from_pretrained(
        checkpoints("llama"), quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    ).save_pretrained(folder)
    for quantization in ({}, {"quantization": "4bit"}):
        recipe = write_recipe(tmp_path, tree(
            tmp_path, named(str(folder), processor_name_or_path=checkpoints("llama"),
                            **quantization), named(checkpoints("qwen2", seed=1))))
        assert cli("distill", recipe, "--overwrite").status == 0


def test_an_adapter_is_not_merged_into_rounded_weights(
    cli: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "base_model_name_or_path": checkpoints("llama"), "r": 4}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    done = cli("distill", write_recipe(tmp_path, tree(
        tmp_path, named(str(folder), quantization="4bit"), named(checkpoints("qwen2", seed=1)))))
    assert done.status == 2
    assert "taid-vlm merge" in done.err
    assert "teacher.quantization" in done.err
