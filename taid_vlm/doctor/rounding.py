"""What `quantization` changes of a teacher's answers: both of it, one after the other.

Both versions of it read the same records: of each only the hidden states at
the compared positions are kept, and the head, which is not rounded. Logits are float32 products.
"""

from __future__ import annotations

import gc
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.config.model import TeacherSpec
from taid_vlm.config.recipe import Recipe
from taid_vlm.errors import TaidError
from taid_vlm.evaluation.held_out import Moments
from taid_vlm.fused.heads import Head
from taid_vlm.models.loading import load_model
from taid_vlm.models.quantization import (
    bytes_of,
    half_precision,
    refuse_unavailable,
    stored_tensors,
)
from taid_vlm.objectives import data_nll, diagnose
from taid_vlm.runs.cache import accelerator_of
from taid_vlm.runs.ingredients import Ingredients
from taid_vlm.teachers import LocalTeacher

OPTION = "--measure-quantization"
SHOWN_TOKENS, SHOWN_RECORDS = 8, 5  # that differ most


@dataclass(frozen=True)
class Mean:
    """Per answer token, with records as independent draws; stderr: None for a single one."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class ChangedToken:
    """token: of the data; whole, quantized: the most likely one of each; kl: in nats."""

    source: str
    token: str
    whole: str
    quantized: str
    kl: float


@dataclass(frozen=True)
class ChangedRecord:
    """kl: nats per token."""

    source: str
    tokens: int
    kl: float


@dataclass(frozen=True)
class Rounding:
    """A teacher as it is against the same one quantized.

    kl: KL(whole || quantized) in nats. agreement: share of tokens where both have the same most
    likely one. nll, quantized_nll: of the data's tokens, in nats. bytes, quantized_bytes: of the
    loaded models. changed_tokens, changed_records: those with the largest KL, largest first.
    """

    kind: str
    records: int
    tokens: int
    kl: Mean
    agreement: Mean
    nll: Mean
    quantized_nll: Mean
    bytes: int
    quantized_bytes: int
    changed_tokens: tuple[ChangedToken, ...]
    changed_records: tuple[ChangedRecord, ...]


def check_measurable(recipe: Recipe) -> TeacherSpec:
    """The teacher; raises TaidError where there are no two versions of it to be loaded."""
    spec = recipe.teacher
    problem = "the recipe has no teacher" if spec is None else \
        "the teacher is served" if spec.server is not None else \
        "the teacher is cached" if spec.cache is not None else \
        "it has no teacher.quantization" if spec.quantization is None else ""
    if spec is None or problem:
        raise TaidError(f"{OPTION} compares a teacher with itself in fewer bits, but {problem}. "
                        "Set teacher.quantization of a teacher that is loaded, or leave it out.")
    refuse_unavailable(spec, "teacher")
    return spec


def measure_rounding(
    spec: TeacherSpec, found: Ingredients, collator: DistillationCollator, number: int
) -> Rounding:
    """Load the teacher twice, one after the other, and compare what it says of the answers.

    Args:
        spec: of `check_measurable`.
        number: of training records, the first that can be used.

    Raises:
        TaidError: no record can be used, or one of both says what is no number.
    """
    records = islice(collator.usable(found.train, lambda record: True), number)
    batches = [collator([record]) for record in records]
    batches = [batch for batch in batches if len(batch["teacher_labels"])]
    if not batches:
        raise TaidError(f"{OPTION}: no training record can be used.")
    whole = _ask(spec.model_copy(update={"quantization": None}), found, batches)
    rounded = _ask(spec, found, batches)
    assert collator.teacher is not None
    spell = collator.teacher.tokenizer.decode
    figures = {name: Moments() for name in ("kl", "agreement", "nll", "quantized_nll")}
    tokens, changed = list[ChangedToken](), list[ChangedRecord]()
    for index, batch in enumerate(batches):
        labels, source = batch["teacher_labels"], batch["sources"][0]
        u, q = (said.logits(index, whole.head) for said in (whole, rounded))
        values = _compared(u, q, labels)
        for name, moments in figures.items():
            moments.add(float(values[name].sum()), len(labels))
        told = values["kl"].tolist()
        changed.append(ChangedRecord(source, len(labels), sum(told) / len(told)))
        names = ([spell(i) for i in ids.tolist()]
                 for ids in (labels, values["whole"], values["quantized"]))
        tokens += [ChangedToken(source, *one) for one in zip(*names, told, strict=True)]
        tokens = heapq.nlargest(SHOWN_TOKENS, tokens, key=lambda token: token.kl)
    if not all(math.isfinite(moments.mean) for moments in figures.values()):
        raise TaidError(f"{OPTION}: the teacher says what is no number of {len(batches)} records.")
    means = {name: Mean(moments.mean, moments.stderr if len(batches) > 1 else None)
             for name, moments in figures.items()}
    return Rounding(
        str(spec.quantization), len(batches), figures["kl"].counted, **means, bytes=whole.bytes,
        quantized_bytes=rounded.bytes, changed_tokens=tuple(tokens), changed_records=tuple(
            heapq.nlargest(SHOWN_RECORDS, changed, key=lambda record: record.kl)))


@dataclass(frozen=True)
class _Said:
    """What a model says: of every record hidden states and of all the head in float32, or, where
    that is not known, logits; on the CPU. bytes: of the model, which is gone."""

    values: Sequence[Tensor]
    head: Head | None
    bytes: int

    def logits(self, index: int, head: Head | None) -> Tensor:
        """In float32, of one record."""
        values = self.values[index].float()
        if head is None:
            return values
        return head.transform.forward(nn.functional.linear(values, head.weight, head.bias))


def _ask(spec: TeacherSpec, found: Ingredients, batches: Sequence[Any]) -> _Said:
    accelerator = accelerator_of(found)
    model = load_model(spec, "teacher", half_precision(found.args))
    size, teacher = bytes_of(stored_tensors(model)), LocalTeacher(model, accelerator)
    head, values = None, []
    for batch in batches:
        moved = send_to_device({key: batch[key] for key in ("teacher_inputs", "teacher_mask")},
                               accelerator.device)
        signal = teacher.hidden(moved)
        if signal is None or not isinstance(signal.head, Head):
            values.append(teacher.logits(moved).cpu())
            continue
        values.append(signal.hidden.cpu())
        head = head or _on_cpu(signal.head)
    del model, teacher
    gc.collect()
    torch.cuda.empty_cache()
    return _Said(values, head, size)


def _on_cpu(head: Head) -> Head:
    def copied(x: Tensor) -> Tensor:
        return x.detach().to("cpu", torch.float32, copy=True)

    return Head(copied(head.weight), None if head.bias is None else copied(head.bias),
                head.transform)


def _compared(u: Tensor, q: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Figures of every token, and the most likely one of both models."""
    figures = diagnose(q, u)
    return {"kl": figures["kl"].double(), "agreement": figures["agreement"].double(),
            "nll": data_nll(u, labels).double(),
            "quantized_nll": data_nll(q, labels).double(),
            "whole": u.argmax(-1), "quantized": q.argmax(-1)}


# ----- in words -----------------------------------------------------------------------------


def rounding_rows(it: Rounding) -> list[tuple[str, str]]:
    """What was measured, line by line: what it is, and its value."""
    def shown(mean: Mean, form: str = ".4f") -> str:
        error = "" if mean.stderr is None else f" ± {mean.stderr:{form}}"
        return f"{mean.value:{form}}{error}"

    return [("KL(whole || quantized)", f"{shown(it.kl)} nats per answer token"),
            ("same most likely token", shown(it.agreement, ".2%")),
            ("NLL, whole", shown(it.nll)), ("NLL, quantized", shown(it.quantized_nll)),
            ("memory, whole", f"{it.bytes:,} bytes"),
            ("memory, quantized", f"{it.quantized_bytes:,} bytes "
                                  f"({it.quantized_bytes / it.bytes:.1%})"),
            *(("differs most: a token", f"{token.source}: {token.kl:.4f} nats at {token.token!r}; "
               f"most likely {token.whole!r} whole, {token.quantized!r} quantized")
              for token in it.changed_tokens),
            *(("differs most: a record", f"{record.source}: {record.kl:.4f} nats a token "
               f"({record.tokens:,} tokens)") for record in it.changed_records)]
