"""The fused objective: hidden states in, loss and gradients out, never all logits in memory.

Rows (answer positions) are worked on in chunks that fit a memory budget. Of each chunk the logits
of both models are made, mapped to common entries, turned into loss and gradient in closed form
(`objectives/bodies.py`) and carried back to hidden states and head at once, so that nothing of
size [N, V] outlives its chunk. Backward only scales what is already there.

The order behind the head is scale, then softcap, then the objective's temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from taid_vlm.alignment import VocabularyMap
from taid_vlm.config.objective import MOVING
from taid_vlm.config.training import MEMORY_BUDGET
from taid_vlm.errors import RecipeError, TaidError
from taid_vlm.fused.bodies import choose_body
from taid_vlm.fused.heads import Head, HeadPass, ModuleHead
from taid_vlm.fused.scratch import Scratch
from taid_vlm.fused.terms import BodyTerm
from taid_vlm.models.head import keeps_type
from taid_vlm.objectives import LOSSES, Objective
from taid_vlm.objectives.divergences import check_parameters, upcast

SCALED_AT_ONCE = 2**22  # numbers of a half-precision gradient that are scaled in float32 at a time

Rows = Tensor | slice
# number of the map, rows [n], student logits [n, V_student], teacher logits [n, V_teacher] or None
# -> {name: [n]}
Measure = Callable[[int, Rows, Tensor, Tensor | None], Mapping[str, Tensor]]


class FusedLoss(NamedTuple):
    """What a call gives.

    loss: the weighted sum over all tokens and terms, a differentiable scalar (float32; float64
        for float64 hidden states).
    per_token: every term's own loss, {name: [N] nats}, without weights, detached.
    figures: what `measure` found, {name: [N]}.
    """

    loss: Tensor
    per_token: dict[str, Tensor]
    figures: dict[str, Tensor]


class FusedDivergence:
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
    """

    def __init__(
        self, objective: Objective, maps: Sequence[VocabularyMap] = (), *,
        memory_budget: int = MEMORY_BUDGET, body: str = "auto",
    ) -> None:
        self.objective, self.memory_budget, self.body = objective, memory_budget, body
        self.maps: tuple[VocabularyMap | None, ...] = tuple(
            None if vocabulary.identity else vocabulary for vocabulary in maps) or (None,)
        self.student_scratch, self.teacher_scratch = Scratch(), Scratch()
        self.bodies_used: set[str] = set()

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
        token_weights: Tensor | None = None,
        weights: Tensor | None = None,
        measure: Measure | None = None,
    ) -> FusedLoss:
        """The weighted sum over N tokens; gradients reach hidden states and head.

        The gradients are made here, unless under `torch.no_grad()`, and given away in backward:
        the loss can be differentiated once, and not twice in a row.

        Args:
            student_hidden: [N, Hs]. teacher_hidden: [N, Ht], without gradient.
            student_head, teacher_head: heads with V_student and V_teacher rows; parameters that
                need no gradient cost none, and the teacher's get none.
            labels: [N] the student's next-token ids, for terms on the data.
            t: TAID's interpolation parameter.
            map_index: [N] which of `maps` holds for a token; needed with more than one.
            token_weights: [N] factors of the terms that compare with the teacher; no gradient
                reaches them.
            weights: [N] factors of all terms; no gradient reaches them.
            measure: looks at every chunk's logits while they are there, for figures; it must not
                change them.

        Raises:
            RecipeError: something the terms need is missing, or shapes do not match.
        """
        between, on_data = self.terms(t)
        work = _Work(self, between, on_data, student_head, teacher_head, measure)
        work.take(student_hidden, teacher_hidden, labels, map_index, token_weights, weights)
        if torch.is_grad_enabled():
            loss = _Fused.apply(work, student_hidden, *student_head.parameters())
        else:
            loss, _ = work.run(student_hidden, ())
        return FusedLoss(loss, work.per_token, work.figures)

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


class _Work:
    """One call: what it was given, and what it leaves beside the loss."""

    def __init__(
        self, fused: FusedDivergence, between: list[BodyTerm], on_data: list[BodyTerm],
        student_head: Head | ModuleHead, teacher_head: Head | ModuleHead | None,
        measure: Measure | None,
    ) -> None:
        self.fused, self.between, self.on_data = fused, between, on_data
        self.student_head, self.teacher_head = student_head, teacher_head
        self.measure = measure
        self.per_token: dict[str, Tensor] = {}
        self.figures: dict[str, Tensor] = {}

    def take(
        self, hidden: Tensor, teacher_hidden: Tensor | None, labels: Tensor | None,
        map_index: Tensor | None, token_weights: Tensor | None, weights: Tensor | None,
    ) -> None:
        """Tensors of N rows each; whether they are all there is checked before any work."""
        measured = self.measure is not None and teacher_hidden is not None
        self.compares = bool(self.between) or measured
        several = len(self.fused.maps) > 1
        for name, tensor, needed in (
            ("teacher_hidden", teacher_hidden, self.compares), ("labels", labels, self.on_data),
            ("map_index", map_index, several), ("token_weights", token_weights, False),
            ("weights", weights, False),
        ):
            if needed and tensor is None:
                raise RecipeError(f"the objective needs {name}, and there is none.")
            if tensor is not None and len(tensor) != len(hidden):
                raise RecipeError(f"{name} has {len(tensor)} rows, but student_hidden has "
                                  f"{len(hidden)}.")
        if self.compares:
            self._check_heads()
        self.teacher_hidden, self.labels, self.map_index = teacher_hidden, labels, map_index
        self.token_weights = None if token_weights is None else token_weights.detach()
        self.weights = None if weights is None else weights.detach()

    def _check_heads(self) -> None:
        if self.teacher_head is None:
            raise RecipeError("the objective needs teacher_head, and there is none.")
        ours, theirs = self.student_head.rows, self.teacher_head.rows
        if None in self.fused.maps and ours != theirs:
            raise RecipeError(f"the student's head has {ours} rows and the teacher's {theirs}; "
                              "different vocabularies need a VocabularyMap.")

    def run(
        self, hidden: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The loss, and the gradients of hidden states and head parameters (None: not needed).

        Args:
            needs: which of them are; () for none.
        """
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            return self._run(hidden, needs, dtype)

    def _run(
        self, hidden: Tensor, needs: Sequence[bool], dtype: torch.dtype | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        self._prepare(hidden)
        chunks = list(self._chunks(hidden))
        head = self.student_head.open(needs, len(chunks), dtype, self.fused.student_scratch)
        if self.compares and self.teacher_head is not None:
            own = isinstance(self.teacher_head, Head) and keeps_type(self.teacher_head.weight.dtype)
            self.teacher: HeadPass = self.teacher_head.open(
                dtype=None if own else dtype, scratch=self.fused.teacher_scratch)
        gradient = torch.zeros_like(hidden) if any(needs[:1]) else None
        for index, rows in chunks:
            x = hidden[rows]
            s = head.logits(x)
            g = self._differentiate(s, index, rows, head.product)
            if self.weights is not None:
                g.mul_(self.weights[rows, None])
            g_x = head.backward(x, g, s, gradient is not None) if any(needs) else None
            if gradient is not None and g_x is not None:
                gradient[rows] = g_x
            del s, g  # before the next chunk's
        return self._total(hidden), [gradient, *head.gradients()]

    def _prepare(self, hidden: Tensor) -> None:
        """Losses to be filled in, zero."""
        self.tokens, zeros = len(hidden), upcast(hidden[:0]).new_zeros
        self.per_token = {term.name: zeros(len(hidden)) for term in self.fused.objective.terms}

    def _chunks(self, hidden: Tensor) -> Iterator[tuple[int, Rows]]:
        """Rows of one map at a time, as many as the budget holds, all about equal."""
        if not len(hidden):
            yield 0, slice(0, 0)  # so that figures have their names
        several, covered = len(self.fused.maps) > 1, 0
        for index, vocabulary in enumerate(self.fused.maps):
            rows: Rows = slice(0, len(hidden))
            count = len(hidden)
            if several:
                assert self.map_index is not None
                rows = (self.map_index == index).nonzero()[:, 0]
                count = len(rows)
            covered += count
            parts = -(-count // max(1, self.fused.memory_budget // self._row_bytes(
                hidden, vocabulary)))
            for part in range(parts):
                start, end = part * count // parts, (part + 1) * count // parts
                yield index, slice(start, end) if isinstance(rows, slice) else rows[start:end]
        if covered != len(hidden):
            raise RecipeError(f"map_index names another map than 0 to {len(self.fused.maps) - 1}.")

    def _row_bytes(self, hidden: Tensor, vocabulary: VocabularyMap | None) -> int:
        """What one row has in memory at a time, at most."""
        # where it does not take the logits' place, the gradient of half-precision ones is float32
        in_place = self._in_place(vocabulary, hidden)
        size = hidden.element_size() if in_place else max(4, hidden.element_size())
        # beside the logits their gradient, perhaps in two parts or rounded for the product
        copies = self.student_head.copies + (not in_place) + (
            self._apart(vocabulary) and bool(self.on_data))
        numbers = self.student_head.rows * copies
        if self.compares and self.teacher_head is not None:
            numbers += self.teacher_head.rows * self.teacher_head.copies
        if vocabulary is not None and self.between:
            numbers += 3 * vocabulary.width
        return size * numbers

    def _differentiate(
        self, s: Tensor, index: int, rows: Rows, dtype: torch.dtype
    ) -> Tensor:
        """The weighted sum's gradient in the student's logits s [n, V]; losses are kept.

        Args:
            index: of the vocabulary map.
            dtype: what the gradient may be rounded to at once.
        """
        vocabulary = self.fused.maps[index]
        labels = None if self.labels is None else self.labels[rows]
        u = self._teacher_logits(rows) if self.compares else None
        self._measure(index, rows, s, u)
        if not self._apart(vocabulary):
            return self._body(s, u, labels, rows, [*self.between, *self.on_data], dtype,
                              self._in_place(vocabulary, s))
        wide = upcast(s[:0]).dtype
        of_data = self._body(s, None, labels, rows, self.on_data, wide) if self.on_data else None
        assert u is not None
        compared = self._compared(s, u, vocabulary, rows)
        return compared if of_data is None else compared.add_(of_data)

    def _apart(self, vocabulary: VocabularyMap | None) -> bool:
        """Whether terms against the teacher and on the data need a gradient each: they look at
        other entries, or weigh tokens differently."""
        return bool(self.between) and (
            vocabulary is not None or self.token_weights is not None)

    def _in_place(self, vocabulary: VocabularyMap | None, like: Tensor) -> bool:
        """Whether the gradient takes the logits' place; on CUDA they differ in type."""
        return self.student_head.reuses_logits and not self._apart(vocabulary) and not like.is_cuda

    def _compared(
        self, s: Tensor, u: Tensor, vocabulary: VocabularyMap | None, rows: Rows
    ) -> Tensor:
        """The share of the terms that compare with the teacher, made over common entries."""
        mapped = s
        if vocabulary is not None:
            mapped, u = vocabulary.map_student(s), vocabulary.map_teacher(u)
        g = self._body(mapped, u, None, rows, self.between, upcast(s[:0]).dtype)
        if vocabulary is not None:
            g = vocabulary.unmap_student(g, s, mapped)
        return g if self.token_weights is None else g.mul_(self.token_weights[rows, None])

    def _teacher_logits(self, rows: Rows) -> Tensor:
        assert self.teacher_hidden is not None
        return self.teacher.logits(self.teacher_hidden[rows])

    def _body(
        self, s: Tensor, u: Tensor | None, labels: Tensor | None, rows: Rows,
        terms: Sequence[BodyTerm], dtype: torch.dtype, in_place: bool = False,
    ) -> Tensor:
        body = choose_body(self.fused.body, s.device, terms, s.numel(), s.dtype)
        self.fused.bodies_used.add(body.__name__)
        gradient, losses = body(s, u, labels, terms, dtype, in_place)
        for term, loss in zip(terms, losses, strict=True):
            self.per_token[term.name][rows] = loss
        return gradient

    def _measure(self, index: int, rows: Rows, s: Tensor, u: Tensor | None) -> None:
        if self.measure is None:
            return
        for name, values in self.measure(index, rows, s, u).items():
            figure = self.figures.setdefault(name, values.new_zeros(self.tokens))
            figure[rows] = values

    def _total(self, hidden: Tensor) -> Tensor:
        total = upcast(hidden[:0]).new_zeros(())
        for term in (*self.between, *self.on_data):
            values = self.per_token[term.name]
            if self.token_weights is not None and term in self.between:
                values = values * self.token_weights
            if self.weights is not None:
                values = values * self.weights
            total = total + term.weight * values.sum()
        return total
