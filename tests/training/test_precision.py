"""Which implementation of the loss runs in mixed precision, and how far its gradient is from that
of the same weights in float64."""

from __future__ import annotations

import contextlib
import copy
import functools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from training.runs import make_trainer, rows
from training.test_fused_step import relative
from zoo import build

from taid_vlm.adapters import make_adapter
from taid_vlm.alignment import pair_models
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.errors import TaidError
from taid_vlm.models.forward import head_rows
from taid_vlm.objectives import parse_objective
from taid_vlm.teachers import LocalTeacher
from taid_vlm.training.loss import FusedStep, choose_step

SUM = parse_objective({"terms": ["taid", {"name": "ce", "weight": 0.3}]})
# teacher, student, the student's tokenizer
PAIRS = {"text": ("qwen2", "gemma2", "permuted"), "vlm": ("internvl", "llava", "permuted"),
         "chunks": ("internvl", "llava", "metaspace")}


class Precision(NamedTuple):
    """weights: of the student; autocast: what products are computed in; bound: of the gradient's
    relative error, where the unfused loss in the same precision is not worse."""

    weights: torch.dtype
    autocast: torch.dtype | None
    bound: float


PRECISIONS = {
    "float32": Precision(torch.float32, None, 1e-5),
    "bf16 autocast": Precision(torch.float32, torch.bfloat16, 2e-2),
    "fp16 autocast with scaler": Precision(torch.float32, torch.float16, 2e-3),
    "pure bf16": Precision(torch.bfloat16, None, 2e-2),
}
KINDS = ("full", "lora", "checkpointing", "compile")


@functools.cache
def material(pair: str) -> tuple[Any, ...]:
    """Models in float32, and what makes their batches."""
    teacher, student = build(PAIRS[pair][0]), build(
        PAIRS[pair][1], seed=1, tokenizer=PAIRS[pair][2])
    adapters = (make_adapter(teacher.processor, "teacher"),
                make_adapter(student.processor, "student"))
    pairing = pair_models(*adapters, head_rows(teacher.model), head_rows(student.model))
    collator = DistillationCollator(adapters[1], adapters[0], pairing)
    return teacher.model, student.model, pairing, collator(rows(4, text_only=pair == "text"))


def prepared(model: nn.Module, dtype: torch.dtype, kind: str) -> nn.Module:
    model = copy.deepcopy(model).to(dtype).train()
    if kind == "lora":
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).to(dtype)
    if kind == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def gradient(
    pair: str, weights: torch.dtype, teacher_dtype: torch.dtype, autocast: torch.dtype | None,
    kind: str, implementation: str = "auto", doubles: bool = False,
) -> tuple[Any, dict[str, Tensor]]:
    """The step that ran, and the gradient of one batch's mean; `doubles` takes the weights as they
    were rounded, and computes in float64."""
    teacher, student, pairing, batch = material(pair)
    teacher, model = copy.deepcopy(teacher).to(teacher_dtype), prepared(student, weights, kind)
    if doubles:
        teacher, model, batch = teacher.double(), model.double(), in_doubles(batch)

    def context() -> Any:
        return contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)

    served = LocalTeacher(teacher)
    if teacher.dtype == torch.float32:
        served.autocast = context  # what accelerate's would be
    step = choose_step(implementation, SUM, pairing, model, served, batch, 40_000, context)
    called = torch.compile(model, backend="aot_eager") if kind == "compile" else model
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, enabled=autocast == torch.float16)
    with context():
        loss = step(called, served, batch, 0.4, False).loss / len(batch["labels"])
    scaler.scale(loss).backward()
    return step, {name: p.grad.double() / scaler.get_scale()
                  for name, p in model.named_parameters() if p.grad is not None}


def in_doubles(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: in_doubles(item) for key, item in value.items()}
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@functools.cache
def reference(
    pair: str, weights: torch.dtype, teacher_dtype: torch.dtype, lora: bool
) -> dict[str, Tensor]:
    return gradient(pair, weights, teacher_dtype, None, "lora" if lora else "full", "reference",
                    doubles=True)[1]


@pytest.mark.parametrize(("pair", "kind"), [
    *((pair, kind) for pair in ("text", "vlm") for kind in KINDS), ("chunks", "full"),
    ("chunks", "lora")])
@pytest.mark.parametrize("teacher", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PRECISIONS)
def test_the_fused_loss_runs_and_its_gradient_is_right(
    name: str, teacher: torch.dtype, pair: str, kind: str
) -> None:
    precision = PRECISIONS[name]
    setting = (pair, precision.weights, teacher, precision.autocast, kind)
    step, found = gradient(*setting)
    assert step.report()["name"] == "fused"
    want = reference(pair, precision.weights, teacher, kind == "lora")
    assert not any(found.pop(name).any() for name in set(found) - set(want))  # compiled: zeros
    unfused = gradient(*setting, "reference")[1]
    unfused = relative({name: unfused[name] for name in want}, want)
    assert relative(found, want) < max(precision.bound, 1.2 * unfused)
    assert unfused < 0.1


@pytest.mark.parametrize("options", [
    {"bf16": True}, {"bf16": True, "student": "gemma2", "teacher": "qwen2", "streamed": True},
], ids=str)
def test_a_run_in_bfloat16_is_fused(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As all recipes set it, through accelerate's own autocast."""
    trainer = make_trainer(tmp_path, loss_implementation="fused", **options)
    trainer.train()
    assert isinstance(trainer._step, FusedStep)
    assert trainer.loss_report == {"name": "fused", "reason": None, "bodies": ["eager"]}
    assert "keeps the logits" not in caplog.text


def test_logits_in_float32_on_a_cpu(tmp_path: Path) -> None:
    """`train.loss_logits` reaches the loss of every step, and halves are what it is for."""
    trainer = make_trainer(tmp_path, loss_logits="float32", bf16=True)
    trainer.train()
    assert trainer._step.fused.float32_logits
    assert trainer._step.fused.student_scratch.kept[0].dtype == torch.float32
    with pytest.raises(TaidError, match=r"loss_logits"):
        make_trainer(tmp_path, loss_logits="float64")


def test_a_head_that_stays_in_its_type_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """`train.loss_logits` widens the product of a plain head alone."""
    teacher, student, pairing, batch = material("text")
    for targets, told in (("q_proj", False), ("lm_head", True)):
        caplog.clear()
        adapted = get_peft_model(copy.deepcopy(student), LoraConfig(r=4, target_modules=[targets]))
        step = choose_step("auto", SUM, pairing, adapted, LocalTeacher(copy.deepcopy(teacher)),
                           batch, float32_logits=True)
        assert isinstance(step, FusedStep)
        assert ("train.loss_logits = float32" in caplog.text) == told


def test_a_softcap_is_told_from_none_in_half_precision(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, student="gemma2", teacher="gemma2", streamed=True, bf16=True)
    trainer.train()
    assert trainer._step.transform.softcap == trainer.teacher.transform.softcap == 3.0
