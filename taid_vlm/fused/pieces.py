"""Models that split text differently: rows aligned by pieces, not one to one.

A piece is one token of each model, or a few, and pieces follow each other alike in both models'
rows. So a chunk is made of whole pieces: the rows of both models that it needs lie together, and
the likelihood of every piece is known before its gradient is made. No logits are made twice, but
those of a piece that is by itself more than the memory budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from taid_vlm.alignment import VocabularyMap
from taid_vlm.errors import RecipeError
from taid_vlm.fused.heads import HeadPass
from taid_vlm.fused.work import Rows, Work
from taid_vlm.objectives import chunk_logits, label_log_prob
from taid_vlm.objectives.divergences import row_chunks, upcast
from taid_vlm.objectives.likelihood import add_label_gradient, label_odds


class Unit(NamedTuple):
    """What is worked on at a time.

    rows, teacher: those of either model whose logits are made. pairs, chunks: what is compared.
    span, teacher_span: all rows of these chunks, which are more where a piece is cut.
    """

    rows: slice
    teacher: slice
    pairs: slice
    chunks: slice
    span: slice
    teacher_span: slice


@dataclass(frozen=True)
class Pieces:
    """What is compared of N tokens of a student and M of a teacher, as a batch has it.

    pair_student, pair_teacher: [P] which are compared entry by entry; the first of a piece each.
    chunk_student [N], chunk_teacher [M]: which of C pieces a token belongs to that are compared by
        likelihood; -1 for none.
    chunk_last: [C] the student's token at which a piece's loss stands.
    teacher_labels: [M] the teacher's next-token ids.
    """

    pair_student: Tensor
    pair_teacher: Tensor
    chunk_student: Tensor
    chunk_teacher: Tensor
    chunk_last: Tensor
    teacher_labels: Tensor

    @cached_property
    def begins(self) -> Tensor:
        """[4, pieces + 1] the student's rows, the teacher's, pairs and chunks before every piece,
        and all of them; on the CPU.

        Raises:
            RecipeError: the pieces do not follow each other alike in both models.
        """
        pair_s, pair_t, chunk_s, chunk_t = (x.cpu() for x in (
            self.pair_student, self.pair_teacher, self.chunk_student, self.chunk_teacher))
        start_s, start_t = _starts(chunk_s), _starts(chunk_t)
        chunk, piece = chunk_s[start_s], torch.searchsorted(start_s, pair_s)
        if not (torch.equal(chunk, chunk_t[start_t])
                and torch.equal(chunk[chunk >= 0], torch.arange(len(self.chunk_last)))
                and bool((pair_s.diff() > 0).all()) and bool((pair_s < len(chunk_s)).all())
                and torch.equal(start_s[piece.clamp(max=len(start_s) - 1)], pair_s)
                and torch.equal(start_t[piece], pair_t)):
            raise RecipeError("pieces: they do not follow each other alike in both models.")
        begins = torch.stack([start_s, start_t, torch.searchsorted(pair_s, start_s),
                              (chunk >= 0).cumsum(0) - (chunk >= 0).long()])
        every = [len(chunk_s), len(chunk_t), len(pair_s), len(self.chunk_last)]
        return torch.cat([begins, torch.tensor(every)[:, None]], 1)

    def units(self, budget: int, student: int, teacher: int, pair: int) -> Iterator[Unit]:
        """Whole pieces, as many as the budget holds, all about equal.

        Args:
            student, teacher, pair: bytes of a row of either model, and of a pair.
        """
        rows = self.begins[:3].diff()
        costs = (rows * torch.tensor([[student], [teacher], [pair]])).sum(0).tolist()
        several = (rows[:2].amax(0) > 1).tolist()
        whole = sum(costs)
        limit = min(budget, whole // max(1, -(-whole // budget)) + max(costs, default=0))
        first, held = 0, 0
        for index, cost in enumerate(costs):
            cut = cost > budget and several[index]
            if index > first and (cut or held + cost > limit):
                yield self._unit(first, index)
                first, held = index, 0
            held += cost
            if cut:
                yield from self._cut(index, max(1, (budget - teacher - pair) // student))
                first, held = index + 1, 0
        if first < len(costs) or not costs:
            yield self._unit(first, len(costs))

    @property
    def whole(self) -> Unit:
        """All of it."""
        return self._unit(0, self.begins.shape[1] - 1)

    def _unit(self, first: int, end: int) -> Unit:
        rows, teacher, pairs, chunks = (
            slice(a, b) for a, b in self.begins[:, [first, end]].tolist())
        return Unit(rows, teacher, pairs, chunks, rows, teacher)

    def _cut(self, piece: int, step: int) -> Iterator[Unit]:
        """A piece in parts of `step` rows; the teacher's only where a pair needs it."""
        whole = self._unit(piece, piece + 1)
        for part in parts_of(whole.rows, step):
            first = part.start == whole.rows.start
            pairs = slice(whole.pairs.start, whole.pairs.stop if first else whole.pairs.start)
            teacher = slice(whole.teacher.start, whole.teacher.start + pairs.stop - pairs.start)
            yield whole._replace(rows=part, teacher=teacher, pairs=pairs)


def _starts(chunk: Tensor) -> Tensor:
    """Where a piece begins: tokens of no chunk are pieces of their own."""
    before = torch.cat([chunk.new_full((1,), -1), chunk])[:-1]
    return ((chunk < 0) | (chunk != before)).nonzero()[:, 0]


def parts_of(rows: slice, step: int) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


class PieceWork(Work):
    """One call on rows that are aligned by pieces.

    Args:
        t: TAID's interpolation parameter.
        settings: as for `Work`.
    """

    needs_labels = True

    def __init__(self, pieces: Pieces, t: float | None, *settings: Any) -> None:
        super().__init__(*settings)
        self.pieces, self.t = pieces, t

    def _expected(self, name: str, rows: int) -> int:
        pieces = self.pieces
        if len(pieces.chunk_student) != rows:
            raise RecipeError(f"pieces has {len(pieces.chunk_student)} tokens of the student, but "
                              f"student_hidden has {rows} rows.")
        return {"teacher_hidden": len(pieces.chunk_teacher),
                "map_index": len(pieces.pair_student)}.get(name, rows)

    def _prepare(self, hidden: Tensor) -> None:
        super()._prepare(hidden)
        self.measured = len(self.pieces.pair_student)
        zeros = upcast(hidden[:0]).new_zeros
        self.student_log_prob, self.teacher_log_prob = (
            zeros(len(hidden)), zeros(len(self.pieces.chunk_teacher)))
        if self.measure is not None and self.compares:
            self.log_probs = self.student_log_prob, self.teacher_log_prob

    def _chunks(self, hidden: Tensor) -> Iterator[tuple[Unit, Rows]]:
        for unit in self.pieces.units(self.fused.memory_budget, *self._bytes(hidden)):
            yield unit, unit.rows

    def _bytes(self, hidden: Tensor) -> tuple[int, int, int]:
        """What a row of the student, one of the teacher, and a pair have in memory at a time."""
        size = max(4, hidden.element_size())
        student, teacher = self.student_head, self.teacher_head
        own, other = student.rows * (student.copies + 1), 0
        if not self.compares or teacher is None:
            return size * own, 0, 0
        other = teacher.rows * teacher.copies
        width = max(student.rows if v is None else v.width for v in self.fused.maps)
        pair = 3 * width * bool(self.between) + (
            0 if self.measure is None else student.rows + teacher.rows)
        return size * own, size * other, size * pair

    def _look_ahead(self, head: HeadPass, hidden: Tensor) -> None:
        """The likelihoods of pieces that are cut."""
        if not self.compares:
            return
        own, other, _ = self._bytes(hidden)
        budget = self.fused.memory_budget
        for unit, _ in self._chunks(hidden):
            whole = (unit.rows, unit.teacher) == (unit.span, unit.teacher_span)
            if not whole and unit.rows.start == unit.span.start:  # once
                for rows in parts_of(unit.span, max(1, budget // own)):
                    self._read_student(head.logits(hidden[rows]), rows)
                for rows in parts_of(unit.teacher_span, max(1, budget // other)):
                    self._read_teacher(self._teacher_logits(rows), rows)

    def _read_student(self, s: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        assert self.labels is not None
        others, odds = label_odds(s, self.labels[rows])
        self.student_log_prob[rows] = logsigmoid(odds)
        return others, odds

    def _read_teacher(self, u: Tensor, rows: slice) -> None:
        self.teacher_log_prob[rows] = label_log_prob(u, self.pieces.teacher_labels[rows])

    def _weighted_gradient(
        self, s: Tensor, where: Unit, rows: Rows, dtype: torch.dtype
    ) -> Tensor:
        unit, wide = where, upcast(s[:0]).dtype
        assert self.labels is not None
        if self.on_data:
            g = self._body(s, None, self.labels[rows], rows, self.on_data, wide)
            if self.weights is not None:
                g.mul_(self.weights[rows, None])
        else:
            g = torch.zeros_like(s, dtype=wide)
        if not self.compares:
            return g
        u = self._teacher_logits(unit.teacher)
        likely = unit.chunks.stop > unit.chunks.start
        if likely or self.measure is not None or self.weighing is not None:
            read = self._read_student(s, unit.rows)
            self._read_teacher(u, unit.teacher)
            self._weigh(unit.span, -self.teacher_log_prob)
        for index, pairs in self._by_map(unit.pairs):
            self._add_pairs(g, s, u, unit, index, pairs)
        if likely and self.between:
            upstream = self._upstream(unit)[unit.rows.start - unit.span.start :][: len(s)]
            add_label_gradient(g, s, self.labels[rows], *read, upstream)
        return g

    def _by_map(self, pairs: slice) -> Iterator[tuple[int, Rows]]:
        if len(self.fused.maps) == 1:
            yield 0, pairs
            return
        assert self.map_index is not None
        for index in range(len(self.fused.maps)):
            rows = (self.map_index[pairs] == index).nonzero()[:, 0] + pairs.start
            if len(rows) or index == 0:
                yield index, rows

    def _add_pairs(
        self, g: Tensor, s: Tensor, u: Tensor, unit: Unit, index: int, pairs: Rows
    ) -> None:
        """The share of tokens that are compared entry by entry; beside what both models have in
        common it is made a few rows at a time."""
        at, vocabulary = self.pieces.pair_student[pairs], self.fused.maps[index]
        of_s = at - unit.rows.start
        of_u = self.pieces.pair_teacher[pairs] - unit.teacher.start
        if self.measure is not None:
            self._measure(index, pairs, s[of_s], u[of_u])
        if not self.between:
            return
        common, target = _mapped(vocabulary, "student", s, of_s), _mapped(
            vocabulary, "teacher", u, of_u)
        small = self._body(common, target, None, at, self.between, g.dtype)
        factor = self._factor(at)
        if factor is not None:
            small.mul_(factor[:, None])
        for part in row_chunks(len(of_s), s.shape[1]):
            back = small[part] if vocabulary is None else vocabulary.unmap_student(
                small[part], s[of_s[part]], common[part])
            g.index_add_(0, of_s[part], back)

    def _factor(self, at: Tensor) -> Tensor | None:
        """What the terms against the teacher count at some of the student's tokens; None: 1."""
        factors = [x[at].to(self.student_log_prob.dtype)
                   for x in (self.token_weights, self.weights) if x is not None]
        return torch.stack(factors).prod(0) if factors else None

    def _upstream(self, unit: Unit) -> Tensor:
        """The gradient in the log-probabilities of a unit's tokens, by way of its chunks."""
        with torch.enable_grad():
            log_prob = self.student_log_prob[unit.span].clone().requires_grad_()
            losses = self._chunk_losses(log_prob, unit)
            factor = self._factor(self.pieces.chunk_last[unit.chunks])
            total = torch.stack([term.weight * losses[term.name] for term in self.between]).sum(0)
            (gradient,) = torch.autograd.grad(
                total, log_prob, torch.ones_like(total) if factor is None else factor)
        return gradient

    def _chunk_losses(self, log_prob: Tensor, unit: Unit) -> dict[str, Tensor]:
        """{term: [chunks]} from the student's log-probabilities of the unit's span."""
        pieces, first = self.pieces, unit.chunks.start
        count = unit.chunks.stop - first
        return self.fused.objective.between(
            chunk_logits(log_prob, pieces.chunk_student[unit.span] - first, count),
            chunk_logits(self.teacher_log_prob[unit.teacher_span],
                         pieces.chunk_teacher[unit.teacher_span] - first, count), self.t)

    def _total(self, hidden: Tensor) -> Tensor:
        if self.between and len(self.pieces.chunk_last):
            whole = self.pieces.whole
            for name, values in self._chunk_losses(self.student_log_prob, whole).items():
                self.per_token[name].index_add_(0, self.pieces.chunk_last, values)
        return super()._total(hidden)


def _mapped(vocabulary: VocabularyMap | None, side: str, logits: Tensor, rows: Tensor) -> Tensor:
    """Some rows over the entries that both models have."""
    if vocabulary is None:
        return logits[rows]
    mapping = getattr(vocabulary, f"map_{side}")
    out = logits.new_empty(len(rows), vocabulary.width, dtype=upcast(logits[:0]).dtype)
    for part in row_chunks(len(rows), logits.shape[1]):
        out[part] = mapping(logits[rows[part]])
    return out
