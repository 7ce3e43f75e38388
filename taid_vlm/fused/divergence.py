"""The fused objective: hidden states in, loss and gradients out, never all logits in memory.

Rows (answer positions) are worked on in chunks that fit a memory budget (`work.py`, and `pieces.py`
where the models split text differently), so that nothing of size [N, V] outlives its chunk.
Backward only scales what is already there.

The order behind the head is scale, then softcap, then the objective's temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from taid_vlm.alignment import VocabularyMap
from taid_vlm.config.objective import MOVING
from taid_vlm.config.training import MEMORY_BUDGET
from taid_vlm.errors import TaidError
from taid_vlm.fused.heads import Head, ModuleHead
from taid_vlm.fused.pieces import Pieces, PieceWork, parts_of
from taid_vlm.fused.terms import BodyTerm
from taid_vlm.fused.work import (
    Measure,
    Settings,
    Weighing,
    Work,
    autocast_dtype,
    open_teacher,
)
from taid_vlm.objectives import LOSSES, Objective, label_log_prob
from taid_vlm.objectives.divergences import check_parameters, upcast

SCALED_AT_ONCE = 2**22  # numbers of a half-precision gradient that are scaled in float32 at a time


class FusedLoss(NamedTuple):
    """What a call gives.

    loss: the weighted sum over all tokens and terms, a differentiable scalar (float32; float64
        for float64 hidden states).
    per_token: every term's own loss, {name: [N] nats}, without weights, detached.
    figures: what `measure` found, {name: [N]}; with `pieces`, of the P pairs, {name: [P]}.
    token_weights: [N] the factors of the terms that compare with the teacher, where it had to be
        read for them.
    log_probs: with `pieces` and `measure`, the log-probabilities of the student's labels [N] and of
        the teacher's [M].
    """

    loss: Tensor
    per_token: dict[str, Tensor]
    figures: dict[str, Tensor]
    token_weights: Tensor | None = None
    log_probs: tuple[Tensor, Tensor] | None = None


class FusedDivergence(Settings):
    """An objective on hidden states.

    What a call has in memory beside its arguments: the chunk's logits and gradients
    (`memory_budget`, or what one row needs; outside CUDA the logits' memory is kept for the next
    call), about 64 MiB for the arithmetic on them, the
    gradients of head and hidden states (those of a half-precision head also in float32 while
    several chunks are added up), and under autocast the heads in its type.

    Args:
        objective: any objective of the package; its terms on the data take part in the same pass.
        maps: vocabulary maps on the hidden states' device; none where both models have the same
            rows.
        memory_budget: bytes that the logits and gradients of one chunk may take.
        body: "auto" (Triton on CUDA where it has the terms, else compiled where that is worth it),
            "eager", "compiled" or "triton".
        float32_logits: on a CPU, whose products of half precision leave rounded, make those of the
            logits in float32 (on CUDA they always are).

    Example:
        >>> import torch
        >>> from taid_vlm import FusedDivergence, Head, divergence, parse_objective
        >>> generator = torch.Generator().manual_seed(0)
        >>> draw = lambda *shape: torch.randn(*shape, generator=generator)
        >>> student, student_head = draw(5, 4).requires_grad_(), Head(draw(7, 4))  # N = 5, V = 7
        >>> teacher, teacher_head = draw(5, 6), Head(draw(7, 6))
        >>> fused = FusedDivergence(parse_objective("forward_kl"), body="eager")
        >>> found = fused(student, student_head, teacher, teacher_head)
        >>> found.loss.backward()  # a sum over tokens, without logits [N, V] of either model
        >>> naive = divergence("forward_kl", student @ student_head.weight.T,
        ...                    teacher @ teacher_head.weight.T).sum()
        >>> torch.allclose(found.loss, naive), student.grad.shape
        (True, torch.Size([5, 4]))
    """

    def __init__(
        self, objective: Objective, maps: Sequence[VocabularyMap] = (), *,
        memory_budget: int = MEMORY_BUDGET, body: str = "auto", float32_logits: bool = False,
    ) -> None:
        super().__init__(objective, tuple(
            None if vocabulary.identity else vocabulary for vocabulary in maps) or (None,),
            memory_budget, body, float32_logits)

    def __call__(
        self,
        student_hidden: Tensor,
        student_head: Head | ModuleHead,
        teacher_hidden: Tensor | None = None,
        teacher_head: Head | ModuleHead | None = None,
        labels: Tensor | None = None,
        *,
        t: float | None = None,
        map_index: Tensor | None = None,
        token_weights: Tensor | Weighing | None = None,
        weights: Tensor | None = None,
        measure: Measure | None = None,
        pieces: Pieces | None = None,
    ) -> FusedLoss:
        """The weighted sum over N tokens; gradients reach hidden states and head.

        The gradients are made here, unless under `torch.no_grad()`, and given away in backward:
        the loss can be differentiated once, and not twice in a row.

        Args:
            student_hidden: [N, Hs]. teacher_hidden: [N, Ht], with `pieces` [M, Ht]; no gradient
                reaches them.
            student_head, teacher_head: heads with V_student and V_teacher rows; parameters that
                need no gradient cost none, and the teacher's get none.
            labels: [N] the student's next-token ids, for terms on the data and pieces.
            t: TAID's interpolation parameter.
            map_index: [N] which of `maps` holds for a token, with `pieces` [P] for a pair; needed
                with more than one.
            token_weights: [N] factors of the terms that compare with the teacher, or what they
                follow from; no gradient reaches them.
            weights: [N] factors of all terms; no gradient reaches them.
            measure: looks at every chunk's logits while they are there, for figures; it must not
                change them. With `pieces` it is shown the pairs.
            pieces: where the two models' tokens differ in number, what is compared.

        Raises:
            RecipeError: something the terms need is missing, or shapes do not match.
        """
        between, on_data = self.terms(t)
        weighing = token_weights if isinstance(token_weights, Weighing) else None
        token_weights = None if isinstance(token_weights, Weighing) else token_weights
        sides = between, on_data, student_head, teacher_head, measure, weighing
        work = Work(self, *sides) if pieces is None else PieceWork(pieces, t, self, *sides)
        work.take(student_hidden, teacher_hidden, labels, map_index, token_weights, weights)
        if torch.is_grad_enabled():
            loss = _Fused.apply(work, student_hidden, *student_head.parameters())
        else:
            loss, _ = work.run(student_hidden, ())
        return FusedLoss(loss, work.per_token, work.figures,
                         work.token_weights if weighing else None, work.log_probs)

    @torch.no_grad()
    def teacher_log_prob(
        self, hidden: Tensor, head: Head | ModuleHead, labels: Tensor
    ) -> Tensor:
        """Log-probabilities of a teacher's labels [M], in chunks that fit the budget.

        Args:
            hidden: [M, Ht]. labels: [M].
        """
        dtype, parts = autocast_dtype(hidden), [upcast(hidden[:0]).new_zeros(0)]
        row = max(4, hidden.element_size()) * head.rows * head.copies
        with torch.autocast(hidden.device.type, enabled=False):
            teacher = open_teacher(self, head, dtype)
            for rows in parts_of(slice(0, len(hidden)), max(1, self.memory_budget // row)):
                parts.append(label_log_prob(teacher.logits(hidden[rows]), labels[rows]))
        return torch.cat(parts)

    @property
    def kept(self) -> list[Tensor]:
        """What lies in memory between two calls."""
        return [*self.student_scratch.kept, *self.teacher_scratch.kept]

    def terms(self, t: float | None) -> tuple[list[BodyTerm], list[BodyTerm]]:
        """Terms against the teacher, and on the data, with all their numbers."""
        sides: tuple[list[BodyTerm], list[BodyTerm]] = ([], [])
        for term in self.objective.terms:
            needs = LOSSES[term.name].needs_teacher
            parameters = dict(term.parameters)
            if term.name in MOVING and t is not None:
                parameters["t"] = float(t)
            check_parameters(term.name, parameters)
            sides[not needs].append(BodyTerm(
                term.name, term.weight, self.objective.kd_temperature if needs else 1.0,
                parameters))
        return sides


class _Fused(torch.autograd.Function):
    """Gradients are computed in forward; backward multiplies them by the upstream scalar."""

    @staticmethod
    def forward(ctx, work, hidden, *parameters):  # type: ignore[no-untyped-def]
        loss, ctx.gradients = work.run(hidden, ctx.needs_input_grad[1:])
        return loss

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            raise TaidError("the fused loss has no second derivative (create_graph=True).")
        if ctx.gradients is None:
            raise TaidError("the fused loss gives its gradients away in backward and can be "
                            "differentiated once; add losses up before backward, or call it again.")
        gradients, ctx.gradients = ctx.gradients, None
        return None, *(None if g is None else _scale(g, upstream) for g in gradients)


def _scale(gradient: Tensor, factor: Tensor) -> Tensor:
    """In place, and without rounding the factor to the gradient's type."""
    if gradient.dtype.itemsize >= 4 or factor.device.type == "cpu":
        return gradient.mul_(factor)  # a number on the CPU is not rounded
    rows = torch.atleast_1d(gradient)
    for part in rows.split(max(1, SCALED_AT_ONCE * len(rows) // max(1, rows.numel()))):
        part.copy_(part.float() * factor)
    return gradient
