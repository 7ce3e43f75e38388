"""Several records in one row: the gradients of rows of their own, or a refusal by name."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training.runs import make_trainer, rows, step_gradient, weights
from training.several import several_trainer
from training.test_invariance import SGD, in_processes, relative
from zoo import TEXT_FAMILIES, VLM_FAMILIES, Built, build
from zoo.images import image

from taid_vlm import DistillationConfig, DistillationTrainer
from taid_vlm.adapters import make_adapter
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.errors import TaidError
from taid_vlm.models import packing as rows_of_several
from taid_vlm.models.forward import answer_logits, unwrap
from taid_vlm.models.packing import BY_RECORD, attend_by_record, packed, why_unpackable
from taid_vlm.runs.ingredients import lora_config
from taid_vlm.teachers import TeacherInStudent

torch.set_num_threads(1)

EXACT = 1e-6  # of a float32 gradient's norm
# why each of the zoo that is refused is: most mix records, as measured here
REFUSED = {
    "lfm2": "conv", "lfm2_vl": "conv", "falcon_h1": "hybrid", "qwen3_5": "linear_attention",
    "gpt_oss": "does not look at positions", "gemma3": "mask of images",
    "hy_v4_vl": "indexed_attention", "paligemma": "mask of prefixes",
}
# where nothing shows: tokens are chosen of few here; transformers 5.24 is exact
NOT_MEASURED = ("hy_v4_vl", "paligemma")


def talks(built: Built) -> list[dict[str, Any]]:
    """Rows whose images stand at other places, and which are of unequal lengths."""
    sees, one = hasattr(built.processor, "image_processor"), [image()]
    if built.family == "paligemma":
        return [{"prompt": f"<image>{question}", "completion": "a red square", "images": one}
                for question in ("what", "and which of these is it", "say")]
    plain = [{"prompt": "hello there, you", "completion": "a blue circle"},
             {"prompt": "what", "completion": "the green"},
             {"prompt": "which one is it", "completion": "two of the red"}]
    return plain if not sees else [
        plain[0], {"prompt": "compare that <image> with <image>", "completion": "left",
                   "images": [image(), image("wide")]},
        {"prompt": "<image>what", "completion": "a square above the circle", "images": one},
        plain[2]]


def gradient(built: Built, inputs: dict[str, Tensor], mask: Tensor, labels: Tensor
             ) -> dict[str, Tensor]:
    built.model.zero_grad()
    logits = answer_logits(built.model, inputs, mask)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    return {name: p.grad.clone() for name, p in built.model.named_parameters()
            if p.grad is not None}


def by_record_gap(
    built: Built, alone: dict[str, Tensor], row: Any, labels: Tensor, inputs: dict[str, Tensor]
) -> float:
    """With attention record by record; a padded batch is as it was."""
    config, split = unwrap(built.model).get_decoder().config, []
    before, cuts = config._attn_implementation, rows_of_several._cuts
    logits = built.model(**inputs).logits
    attend_by_record(built.model)
    taken = config._attn_implementation
    assert taken == (BY_RECORD if before == "sdpa" else before)
    assert "by_record" not in config.to_json_string()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_of_several, "_cuts",
                      lambda *args: split.append(cuts(*args)) or split[-1])
        gap = relative(alone, gradient(built, *row, labels))
    lengths = inputs["attention_mask"].sum(1).cumsum(0).tolist()
    assert (taken != BY_RECORD) or any(cut == [0, *lengths] for cut in split), built.family
    assert torch.equal(built.model(**inputs).logits, logits)
    config._attn_implementation = before
    return gap


@pytest.mark.parametrize("family", VLM_FAMILIES + TEXT_FAMILIES)
def test_which_families_are_packed(family: str) -> None:
    """Packed on either side's padding, the gradient is the same to rounding, or it is another and
    the family is refused."""
    built = build(family)
    gaps = []
    for side in ("left", "right"):
        collator = DistillationCollator(make_adapter(built.processor, "student"), padding_side=side)
        batch = collator(talks(built))
        assert batch["counts"]["rows"] >= 3
        inputs, mask, labels = (batch[key] for key in ("student_inputs", "student_mask", "labels"))
        row = packed(built.model, inputs, mask)
        assert row[0]["input_ids"].shape == (1, int(inputs["attention_mask"].sum()))
        alone = gradient(built, inputs, mask, labels)
        gaps.append(relative(alone, gradient(built, *row, labels)))
        if not why_unpackable(built.model):
            gaps.append(by_record_gap(built, alone, row, labels, inputs))
    reason = why_unpackable(built.model)
    assert REFUSED.get(family, "") in reason
    assert bool(reason) == (family in REFUSED)
    if family not in NOT_MEASURED:
        assert min(gaps) > 1e-3 if reason else max(gaps) < EXACT, gaps


# ----- in training --------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "fused": {},
    "all logits": {"loss_implementation": "reference"},
    "left padding": {"padding_side": "left"},
    "positions in images": {"student": "qwen3_vl", "teacher": "qwen2_5_vl"},
    "images in pieces": {"student": "smolvlm", "teacher": "llava_next"},
    "texts split differently": {"tokenizer": "metaspace"},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"peft": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}},
    "visual terms": {"objective": {"terms": ["taid", {"name": "visual_relation"}]}},
    "visual advantage": {"objective": {"name": "taid", "token_weights": "visual_advantage"}},
    "texts": {"student": "qwen2", "teacher": "llama", "data": rows(16, text_only=True)},
    "experts": {"student": "qwen3_moe", "teacher": "llama", "data": rows(16, text_only=True),
                "objective": {"terms": ["taid", {"name": "router", "weight": 0.1}]}},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
}


def watch(trainer: Any) -> list[tuple[int, ...]]:
    """Shapes of the ids that the student's and the teacher's language models are trained with."""
    shapes: list[tuple[int, ...]] = []
    for model in (trainer.model, trainer.teacher_model):
        unwrap(model).get_decoder().register_forward_pre_hook(
            lambda _, args, kwargs: shapes.append(tuple((
                kwargs["input_ids"] if kwargs.get("input_ids") is not None
                else kwargs["inputs_embeds"]).shape[:2])), with_kwargs=True)
    return shapes


@pytest.mark.parametrize("name", SETTINGS)
def test_the_gradient_is_that_of_rows_of_their_own(name: str, tmp_path: Path) -> None:
    options = SETTINGS[name]
    alone, together = (step_gradient(tmp_path, packing=packing, **options)
                       for packing in (False, True))
    assert relative(alone, together) < EXACT


def test_it_does_pack(tmp_path: Path) -> None:
    """The models see one row for each micro-batch, but for what is checked before the first."""
    trainer = make_trainer(tmp_path, packing=True, loss_implementation="reference", max_steps=2)
    shapes = watch(trainer)
    trainer.train()
    padded = [shape for shape in shapes if shape[0] > 1]
    assert len(padded) == 2  # each model, once
    assert len(shapes) - len(padded) == 6  # once packed beside it, then two steps


def test_several_teachers(tmp_path: Path) -> None:
    moved = []
    for packing in (False, True):
        trainer = several_trainer(tmp_path, packing=packing, **SGD)
        before = weights(trainer)
        trainer.train()
        moved.append({name: before[name] - after for name, after in weights(trainer).items()})
    assert relative(*moved) < EXACT


def test_a_teacher_beneath_the_students_adapter(tmp_path: Path) -> None:
    """Packed as any other, and as it was afterwards."""
    moved = []
    for packing in (False, True):
        ours = build("llava")
        adapter = lora_config({"r": 4, "lora_alpha": 8, "target_modules": "all-linear",
                               "init_lora_weights": False})
        torch.manual_seed(0)
        args = DistillationConfig(str(tmp_path), packing=packing, use_cpu=True, report_to="none",
                                  save_strategy="no", disable_tqdm=True, seed=7, **SGD)
        trainer = DistillationTrainer(
            ours.model, TeacherInStudent(ours.model), args, rows(8), None, ours.processor,
            ours.processor, peft_config=adapter)
        before = weights(trainer)
        trainer.train()
        moved.append({name: before[name] - after for name, after in weights(trainer).items()})
    assert relative(*moved) < EXACT


def test_half_precision_is_as_near_to_float32_packed_as_padded(tmp_path: Path) -> None:
    exact = step_gradient(tmp_path)
    alone, together = (relative(exact, step_gradient(tmp_path, bf16=True, packing=packing))
                       for packing in (False, True))
    assert together < 1.5 * alone + 1e-4


def test_a_teacher_that_computes_elsewhere_is_shown_padded_rows(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, packing=True)
    batch = trainer.data_collator(rows(4))
    row = trainer.packing(batch, trainer.model, None)
    assert row["teacher_inputs"] is batch["teacher_inputs"]
    assert len(row["student_inputs"]["input_ids"]) == 1
    assert torch.equal(row["labels"], batch["labels"])


def test_two_processes_killed_and_resumed(tmp_path: Path) -> None:
    """With batches by tokens: the gradient of one process, and the weights of a run that was never
    interrupted, bit for bit."""
    whole = {"max_steps": 7, "packing": True, "tokens_per_batch": 150, "dropout": 0.1,
             "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    with contextlib.suppress(AssertionError):  # a killed process takes the other along
        in_processes(2, tmp_path, whole=whole, killed={**whole, "kill_at": 5})
    assert not (tmp_path / "killed" / "final.safetensors").exists()
    in_processes(2, tmp_path / "more",
                 gradient={**SGD, "per_device_train_batch_size": 4, "packing": True},
                 resumed={**whole, "resume": str(tmp_path / "killed" / "checkpoint-3")})
    first, second = (load_file(folder / "final.safetensors")
                     for folder in (tmp_path / "whole", tmp_path / "more" / "resumed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    before = weights(make_trainer(tmp_path))
    after = load_file(tmp_path / "more" / "gradient" / "final.safetensors")
    assert relative(step_gradient(tmp_path), {
        name: before[name] - after[name] for name in before}) < 1e-5


# ----- refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "named"), [
    ("lfm2_vl", "the student .lfm2_vl. cannot .* 'conv'"), ("gemma3", "mask of images")])
def test_a_student_that_mixes_records_is_refused(student: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(TaidError, match=f"train.packing: .*{named}"):
        make_trainer(tmp_path, student=student, packing=True).train()


def test_a_teacher_that_mixes_records_is_refused_by_what_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing is known of its family."""
    monkeypatch.setattr("taid_vlm.models.packing.UNTOLD", {})
    trainer = make_trainer(tmp_path, teacher="gemma3", packing=True)
    with pytest.raises(TaidError, match=r"the teacher \(gemma3\) .* differ by"):
        trainer.train()


def test_on_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaidError, match=r"train\.packing = True .* objective\.on_policy"):
        DistillationConfig(str(tmp_path), packing=True, objective={
            "name": "kl", "on_policy": {"lmbda": 0.5, "max_new_tokens": 4}})
