"""The rows of one call of the fused objective, chunk by chunk.

Of each chunk the logits of both models are made, mapped to common entries, turned into loss and
gradient in closed form (`bodies.py`) and carried back to hidden states and head at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taid_vlm.alignment import VocabularyMap
from taid_vlm.errors import RecipeError
from taid_vlm.fused.bodies import choose_body
from taid_vlm.fused.heads import Head, HeadPass, ModuleHead
from taid_vlm.fused.scratch import Scratch
from taid_vlm.fused.terms import BodyTerm
from taid_vlm.models.head import keeps_type
from taid_vlm.objectives import Objective, label_log_prob
from taid_vlm.objectives.divergences import upcast

Rows = Tensor | slice
# number of the map, rows [n], student logits [n, V_student], teacher logits [n, V_teacher] or None
# -> {name: [n]}
Measure = Callable[[int, Rows, Tensor, Tensor | None], Mapping[str, Tensor]]


class Weighing(NamedTuple):
    """Factors that follow from how likely the teacher finds its own labels, which its logits in a
    call say.

    labels: [M] the teacher's next-token ids.
    factors: of their negative log-likelihoods [M], for the N tokens of the student; each is one of
        its own partner alone, or of the tokens of its own piece.
    """

    labels: Tensor
    factors: Callable[[Tensor], Tensor]


@dataclass
class Settings:
    """What holds for all calls, and the memory that they share.

    maps: vocabulary maps; None where both models have the same rows.
    float32_logits: those of half-precision heads are not rounded on a CPU either.
    """

    objective: Objective
    maps: tuple[VocabularyMap | None, ...]
    memory_budget: int
    body: str
    float32_logits: bool = False
    student_scratch: Scratch = field(default_factory=Scratch)
    teacher_scratch: Scratch = field(default_factory=Scratch)
    bodies_used: set[str] = field(default_factory=set)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes in where x lies; None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def open_teacher(
    fused: Settings, head: Head | ModuleHead, dtype: torch.dtype | None
) -> HeadPass:
    """A teacher's head; one in half precision computes in its own type, whatever autocast's."""
    own = isinstance(head, Head) and keeps_type(head.weight.dtype)
    return head.open(dtype=None if own else dtype, scratch=fused.teacher_scratch,
                     float32_logits=fused.float32_logits)


class Work:
    """One call: what it was given, and what it leaves beside the loss. Every row of the student
    has one of the teacher's."""

    needs_labels = False  # also without terms on the data

    def __init__(
        self, fused: Settings, between: list[BodyTerm], on_data: list[BodyTerm],
        student_head: Head | ModuleHead, teacher_head: Head | ModuleHead | None,
        measure: Measure | None, weighing: Weighing | None,
    ) -> None:
        self.fused, self.between, self.on_data = fused, between, on_data
        self.student_head, self.teacher_head = student_head, teacher_head
        self.measure, self.weighing = measure, weighing
        self.per_token: dict[str, Tensor] = {}
        self.figures: dict[str, Tensor] = {}
        self.log_probs: tuple[Tensor, Tensor] | None = None

    def take(
        self, hidden: Tensor, teacher_hidden: Tensor | None, labels: Tensor | None,
        map_index: Tensor | None, token_weights: Tensor | None, weights: Tensor | None,
    ) -> None:
        """Whether all tensors are there, with their rows, is checked before any work."""
        measured = self.measure is not None and teacher_hidden is not None
        self.compares = bool(self.between) or measured or self.weighing is not None
        several, needs_labels = len(self.fused.maps) > 1, self.needs_labels or self.on_data
        for name, tensor, needed in (
            ("teacher_hidden", teacher_hidden, self.compares), ("labels", labels, needs_labels),
            ("map_index", map_index, several), ("token_weights", token_weights, False),
            ("weights", weights, False),
        ):
            if needed and tensor is None:
                raise RecipeError(f"the objective needs {name}, and there is none.")
            rows = self._expected(name, len(hidden))
            if tensor is not None and len(tensor) != rows:
                raise RecipeError(f"{name} has {len(tensor)} rows, but it needs {rows}: "
                                  f"student_hidden has {len(hidden)}.")
        if self.compares:
            self._check_heads()
        self.teacher_hidden, self.labels, self.map_index = teacher_hidden, labels, map_index
        self.token_weights = None if token_weights is None else token_weights.detach()
        self.weights = None if weights is None else weights.detach()

    def _expected(self, name: str, rows: int) -> int:
        """How many rows a tensor must have, if student_hidden has `rows`."""
        return rows

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
        dtype = autocast_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return self._run(hidden, needs, dtype)

    def _run(
        self, hidden: Tensor, needs: Sequence[bool], dtype: torch.dtype | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        self._prepare(hidden)
        chunks = list(self._chunks(hidden))
        head = self.student_head.open(needs, len(chunks), dtype, self.fused.student_scratch,
                                      self.fused.float32_logits)
        if self.compares and self.teacher_head is not None:
            self.teacher = open_teacher(self.fused, self.teacher_head, dtype)
        self._look_ahead(head, hidden)
        gradient = torch.zeros_like(hidden) if any(needs[:1]) else None
        for where, rows in chunks:
            x = hidden[rows]
            s = head.logits(x)
            g = self._weighted_gradient(s, where, rows, head.product)
            g_x = head.backward(x, g, s, gradient is not None) if any(needs) else None
            if gradient is not None and g_x is not None:
                gradient[rows] = g_x
            del s, g  # before the next chunk's
        return self._total(hidden), [gradient, *head.gradients()]

    def _prepare(self, hidden: Tensor) -> None:
        """Losses to be filled in, zero."""
        self.measured, zeros = len(hidden), upcast(hidden[:0]).new_zeros
        self.per_token = {term.name: zeros(len(hidden)) for term in self.fused.objective.terms}
        if self.weighing is not None:
            self.token_weights = zeros(len(hidden))
            self.teacher_nll = zeros(len(self.weighing.labels))

    def _look_ahead(self, head: HeadPass, hidden: Tensor) -> None:
        """What has to be known of other chunks before the first one."""

    def _chunks(self, hidden: Tensor) -> Iterator[tuple[Any, Rows]]:
        """Number of a map and rows of it, as many as the budget holds, all about equal."""
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

    def _weighted_gradient(
        self, s: Tensor, where: Any, rows: Rows, dtype: torch.dtype
    ) -> Tensor:
        """The gradient in the student's logits s [n, V] of what these rows count.

        Args:
            where: what `_chunks` says of them.
        """
        g = self._differentiate(s, where, rows, dtype)
        return g if self.weights is None else g.mul_(self.weights[rows, None])

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
        if self.weighing is not None and u is not None:
            self.teacher_nll[rows] = -label_log_prob(u, self.weighing.labels[rows])
            self._weigh(rows, self.teacher_nll)
        self._measure(index, rows, s, u)
        if not (self.between or self.on_data):
            return s  # figures alone
        if not self._apart(vocabulary):
            return self._body(s, u, labels, rows, [*self.between, *self.on_data], dtype,
                              self._in_place(vocabulary, s))
        wide = upcast(s[:0]).dtype
        of_data = self._body(s, None, labels, rows, self.on_data, wide) if self.on_data else None
        assert u is not None
        compared = self._compared(s, u, vocabulary, rows)
        return compared if of_data is None else compared.add_(of_data)

    def _weigh(self, rows: Rows, teacher_nll: Tensor) -> None:
        """Fill in the factors of some rows, whose teacher has been read."""
        if self.weighing is not None and self.token_weights is not None:
            self.token_weights[rows] = self.weighing.factors(teacher_nll)[rows].to(
                self.token_weights.dtype)

    def _apart(self, vocabulary: VocabularyMap | None) -> bool:
        """Whether terms against the teacher and on the data need a gradient each: they look at
        other entries, or weigh tokens differently."""
        return bool(self.between) and (
            vocabulary is not None or self.token_weights is not None)

    def _in_place(self, vocabulary: VocabularyMap | None, like: Tensor) -> bool:
        """Whether the gradient takes the logits' place; on CUDA they differ in type, and with
        `float32_logits`."""
        return self.student_head.reuses_logits and not self._apart(vocabulary) and not (
            like.is_cuda or self.fused.float32_logits)

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
            figure = self.figures.setdefault(name, values.new_zeros(self.measured))
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
