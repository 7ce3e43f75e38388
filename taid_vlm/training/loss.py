"""A batch's loss in two implementations: from logits in memory, and from hidden states.

The fused loss runs inside the student's own forward (`distill=...`), so that what wraps the model
(DDP, FSDP, autocast) sees an ordinary forward whose output is the loss. Without that argument the
forward is the model's own.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from taid_vlm.alignment import Pairing
from taid_vlm.batch.figures import (
    Measured,
    at_tokens,
    chunk_figures,
    token_figures,
)
from taid_vlm.batch.forward import Batch, student_forward
from taid_vlm.batch.losses import (
    advantage_weights,
    blinded,
    by_weight,
    chunk_outcomes,
    has_chunks,
    token_losses,
)
from taid_vlm.batch.sparse import sparse_figures, sparse_losses
from taid_vlm.config.training import MEMORY_BUDGET
from taid_vlm.errors import TaidError
from taid_vlm.fused.divergence import FusedDivergence, FusedLoss
from taid_vlm.fused.model_head import find_logit_transform, inside_forward, is_plain
from taid_vlm.fused.pieces import Pieces
from taid_vlm.fused.work import Rows, Weighing
from taid_vlm.models.forward import Autocast, accept_distill, unwrap
from taid_vlm.models.head import LogitTransform
from taid_vlm.objectives import Objective, data_nll
from taid_vlm.teachers import CachedTeacher, HiddenSignal, Teacher
from taid_vlm.training.figures import figures_of_rows

logger = logging.getLogger(__name__)


class StepLoss(NamedTuple):
    """What a batch gives: the differentiable weighted sum over its tokens, every term per token
    (unweighted), what the terms against the teacher weigh by the teacher's own judgement (None: 1),
    and figures where they were asked for."""

    loss: Tensor
    losses: dict[str, Tensor]
    weight: Tensor | None
    figures: dict[str, Measured]


class ReferenceStep:
    """All logits of the answer positions in memory: every objective, every pair.

    Args:
        reason: why it is taken, for the run's results.
    """

    def __init__(
        self, objective: Objective, pairing: Pairing | None, reason: str | None = None
    ) -> None:
        self.objective, self.pairing, self.reason = objective, pairing, reason

    def report(self) -> dict[str, Any]:
        """For the run's results: which implementation ran, and why."""
        return {"name": "reference", "reason": self.reason, "bodies": []}

    def __call__(
        self, model: nn.Module, teacher: Teacher | None, batch: Batch, t: float | None,
        with_figures: bool,
    ) -> StepLoss:
        u = weight = None
        if teacher is not None and self.objective.needs_teacher:
            u = teacher.logits(batch)
            if self.objective.visual_advantage:
                weight = _advantage(self.objective, teacher, batch, u)
        s = student_forward(model, batch)
        losses = token_losses(self.objective, batch, s, u, self.pairing, t)
        sums = {name: by_weight(batch, x).sum()
                for name, x in self.objective.reweighted(losses, weight).items()}
        figures = token_figures(batch, s, u, self.pairing) if with_figures else {}
        return StepLoss(self.objective.weighted(sums), losses, weight, figures)


@torch.no_grad()
def _advantage(objective: Objective, teacher: Teacher, batch: Batch, u: Tensor) -> Tensor:
    def nll(logits: Tensor) -> Tensor:
        return data_nll(logits, batch["teacher_labels"])

    return advantage_weights(objective.visual_advantage, batch, nll(u),
                             lambda blind: nll(teacher.logits(blind)),
                             getattr(teacher, "is_sharded", False))


class SparseStep:
    """A few entries of the teacher's laws and the rest, where the whole laws are not known; all
    logits of the student in memory.

    Args:
        k: what the teacher's `sparse` takes.
        reason: why no more is known, for the run's results.
    """

    def __init__(self, objective: Objective, pairing: Pairing, k: int, reason: str) -> None:
        self.objective, self.pairing, self.k, self.reason = objective, pairing, k, reason

    def report(self) -> dict[str, Any]:
        """For the run's results: which implementation ran, and why."""
        return {"name": "sparse", "bodies": [], "reason": self.reason}

    def __call__(
        self, model: nn.Module, teacher: Teacher | None, batch: Batch, t: float | None,
        with_figures: bool,
    ) -> StepLoss:
        assert teacher is not None
        signal = teacher.sparse(batch, self.k)
        s = student_forward(model, batch)
        losses = sparse_losses(self.objective, batch, s, signal, self.pairing, t)
        sums = {name: by_weight(batch, x).sum() for name, x in losses.items()}
        figures = sparse_figures(batch, s, signal, self.pairing) if with_figures else {}
        return StepLoss(self.objective.weighted(sums), losses, None, figures)


class FusedStep:
    """The fused objective inside the student's forward; nothing of size [N, V] is kept.

    Args:
        pairing: None without a teacher.
        student: wrapped or not; its innermost forward takes one argument more from now on.
        transform: what the student does behind its head.
        memory_budget: bytes that a chunk of logits may take.
        float32_logits: see `FusedDivergence`.
    """

    def __init__(
        self, objective: Objective, pairing: Pairing | None, student: nn.Module,
        transform: LogitTransform, memory_budget: int, autocast: Autocast,
        float32_logits: bool = False,
    ) -> None:
        self.objective, self.pairing, self.transform = objective, pairing, transform
        self.autocast = autocast
        maps = pairing.maps if pairing is not None and objective.needs_teacher else ()
        self.fused = FusedDivergence(objective, maps, memory_budget=memory_budget,
                                     float32_logits=float32_logits)
        accept_distill(unwrap(student))

    def report(self) -> dict[str, Any]:
        """For the run's results: which implementation ran, and with which bodies."""
        return {"name": "fused", "reason": None, "bodies": sorted(self.fused.bodies_used)}

    def __call__(
        self, model: nn.Module, teacher: Teacher | None, batch: Batch, t: float | None,
        with_figures: bool,
    ) -> StepLoss:
        signal = weight = None
        if teacher is not None and self.objective.needs_teacher:
            signal = _hidden(teacher, batch)
            if self.objective.visual_advantage:
                weight = self._advantage(teacher, batch)
        teacher_hidden, teacher_head = signal or (None, None)
        pieces = Pieces(**{field.name: batch[field.name] for field in fields(Pieces)}) if (
            signal is not None and has_chunks(batch)) else None

        result = inside_forward(
            model, self.transform, batch, self.autocast, lambda hidden, head: self.fused(
                hidden, head, teacher_hidden, teacher_head, batch["labels"], t=t,
                map_index=batch["map_index"] if len(self.fused.maps) > 1 else None,
                token_weights=weight, weights=batch.get("weights"), pieces=pieces,
                measure=functools.partial(self._measure, batch) if with_figures else None))
        return StepLoss(result.loss, result.per_token, result.token_weights,
                        self._figures(batch, result))

    @torch.no_grad()
    def _figures(self, batch: Batch, result: FusedLoss) -> dict[str, Measured]:
        if result.log_probs is None:
            return {name: Measured(values) for name, values in result.figures.items()}
        own, teacher = result.log_probs
        return {"nll": Measured(-own)} | at_tokens(batch, -teacher, result.figures) | \
            chunk_figures(batch, chunk_outcomes(batch, own, teacher))

    @torch.no_grad()
    def _advantage(self, teacher: Teacher, batch: Batch) -> Weighing:
        """The teacher is asked here of what it does not see; what it sees, the fused pass finds."""
        in_step = getattr(teacher, "is_sharded", False)
        blind, labels = blinded(batch, in_step), batch["teacher_labels"]
        unseeing = torch.empty(0)
        if blind is not None:
            with self.autocast():
                unseeing = -self.fused.teacher_log_prob(*_hidden(teacher, blind), labels)
        return Weighing(labels, lambda seeing: advantage_weights(
            self.objective.visual_advantage, batch, seeing, lambda _: unseeing, in_step))

    def _measure(
        self, batch: Batch, index: int, rows: Rows, s: Tensor, u: Tensor | None
    ) -> dict[str, Tensor]:
        return figures_of_rows(batch, self.pairing, self.fused.memory_budget, index, rows, s, u)


def _hidden(teacher: Teacher, batch: Batch) -> HiddenSignal:
    signal = teacher.hidden(batch)
    assert signal is not None  # `choose_step` has asked
    return signal


# ----- which one ----------------------------------------------------------------------------


Step: TypeAlias = ReferenceStep | SparseStep | FusedStep


def choose_step(
    implementation: str, objective: Objective, pairing: Pairing | None, student: nn.Module,
    teacher: Teacher | None, probe: Batch, memory_budget: int = MEMORY_BUDGET,
    autocast: Autocast = contextlib.nullcontext,
    find: Callable[[], LogitTransform | None] | None = None, float32_logits: bool = False,
) -> Step:
    """The implementation asked for; "auto" takes the fused one where it gives the same.

    Args:
        probe: a batch, at some positions of which head(hidden) is compared with the models' own
            logits. Moves no random state.
        autocast: a new context of mixed precision, if the run has one.
        find: gives what stands behind the student's head, if that is known.
        float32_logits: see `FusedDivergence`.

    Raises:
        TaidError: "fused" for something only the reference can do, with the reason.
    """
    step = plain_step(objective, pairing, teacher)
    if objective.estimates:
        return step
    if not isinstance(step, ReferenceStep):
        if implementation == "fused":
            raise TaidError(f"loss_implementation = 'fused', but {step.report()['reason']}. Use "
                            "auto.")
        return step
    if implementation == "reference":
        return ReferenceStep(objective, pairing, "loss_implementation = 'reference'")
    reason, transform = None, None
    head = unwrap(student).get_output_embeddings()
    if not is_plain(head) and any(isinstance(p, DTensor) for p in unwrap(student).parameters()):
        reason = "FSDP shards the student, whose head is no plain matrix"
    if reason is None:
        accept_distill(unwrap(student))
        with autocast():
            transform = find() if find else find_logit_transform(
                student, probe["student_inputs"], probe["student_mask"])
        if transform is None:
            reason = _unknown_head("student", unwrap(student))
        elif teacher is not None and objective.needs_teacher and teacher.hidden(probe) is None:
            reason = _unknown_head("teacher", getattr(teacher, "model", None))
    if reason is None and transform is not None:
        if float32_logits and not is_plain(head):
            logger.warning("train.loss_logits = float32 leaves the logits of the student's head as "
                           "they are: it has an adapter or is quantized, and computes in its own "
                           "type.")
        return FusedStep(objective, pairing, student, transform, memory_budget, autocast,
                         float32_logits)
    if implementation == "fused":
        raise TaidError(f"loss_implementation = 'fused', but {reason}. Use auto or reference.")
    logger.warning("The loss keeps the logits of all answer positions: %s.", reason)
    return ReferenceStep(objective, pairing, reason)


def plain_step(
    objective: Objective, pairing: Pairing | None, teacher: Teacher | None
) -> ReferenceStep | SparseStep:
    """The implementation that works without knowing what stands behind the heads."""
    if teacher is None or pairing is None or not objective.needs_teacher:
        return ReferenceStep(objective, pairing)
    if isinstance(teacher, CachedTeacher) and teacher.cache.signal.is_sparse:
        signal = teacher.cache.signal
        return SparseStep(objective, pairing, signal.k, "the teacher is cached as "
                          f"{signal.k} {signal.kind} entries of its law")
    return ReferenceStep(objective, pairing) if teacher.top is None else SparseStep(
        objective, pairing, teacher.top,
        f"the teacher gives its {teacher.top} most likely tokens and the rest")


def _unknown_head(role: str, model: Any) -> str:
    kind = "" if model is None else f" ({unwrap(model).config.model_type})"
    return f"the {role}{kind} does something behind its head that is not known here"
