"""The vocabulary map: one set of entries for two models whose logit rows differ.

K tokens that both models have are compared one by one. What only one of them has is summed up,
exactly, in one more entry ("rest": the logsumexp of its logits), so softmax over the K + 1
entries is the exact coarse-graining of the model's own softmax. With different tokenizers, groups
of tokens that begin the same texts (`cells.py`) are entries too. Two limits are drawn:

- Rows that no token names (padding of the embedding matrix) are no outcomes of a language model.
  They are left out on both sides, and the probability a model wastes on them is reported.
- If the student has no token outside the shared ones, it cannot place the teacher's rest
  anywhere. The teacher is then conditioned on the shared tokens, and the mass is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from taid_vlm.adapters import TokenTable
from taid_vlm.errors import AlignmentError
from taid_vlm.objectives.divergences import row_chunks, upcast

# an added token may be special in one model and not in the other
_SAME_NAME = {"special": ("added",), "added": ("special",)}
SCRATCH = 8  # tensors as large as some columns that summing them up has in use at a time, about


@dataclass(frozen=True)
class SideMap:
    """One model's rows: shared [K] in common order, rest and padding (ids; may be empty).

    members, cell: [M] ids that are compared in groups, and the group (0, 1, ...) of each.
    """

    shared: Tensor
    rest: Tensor
    padding: Tensor
    members: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    cell: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def to(self, device: torch.device) -> SideMap:
        return SideMap(*(x.to(device) for x in vars(self).values()))


@dataclass(frozen=True)
class VocabularyMap:
    """Brings logits [N, V] of teacher and student to the same width.

    identity: both models have the same rows, nothing is mapped.
    has_rest: the student has tokens the teacher lacks, so the last entry holds the rest.
    cells: how many entries between the K shared ones and the rest are groups of tokens.
    """

    teacher: SideMap
    student: SideMap
    identity: bool
    has_rest: bool
    cells: int = 0

    def to(self, device: torch.device | str) -> VocabularyMap:
        device = torch.device(device)
        return replace(self, teacher=self.teacher.to(device), student=self.student.to(device))

    def same_entry(self, teacher_id: int, student_id: int) -> bool:
        """Whether two tokens are one and the same outcome of the comparison."""
        if self.identity:
            return teacher_id == student_id
        teacher_entries, student_entries = self._entries
        return bool(teacher_entries[teacher_id] == student_entries[student_id])

    def same_token(self, teacher_id: int, student_id: int) -> bool:
        """Whether that outcome is this token alone, on both sides."""
        shared = len(self.student.shared)
        return self.same_entry(teacher_id, student_id) and (
            self.identity or 0 <= self._entries[0][teacher_id] < shared)

    @cached_property
    def _entries(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Id -> entry on both sides, of shared tokens and members; -1 for all others."""
        teacher_entries, student_entries = map(_entries, (self.teacher, self.student))
        return teacher_entries, student_entries

    def student_entries(self, ids: Tensor) -> Tensor:
        """The entry of each of the student's tokens, -1 of one that has none (padding, or the
        student's alone where there is no rest)."""
        if self.identity:
            return ids
        entries = torch.from_numpy(self._entries[1]).to(ids.device).long()
        found = entries[ids.clamp(max=len(entries) - 1)].where(ids < len(entries), -1)
        return found.where(~torch.isin(ids, self.student.rest), self.width - 1) \
            if self.has_rest else found

    @property
    def width(self) -> int:
        """Entries after mapping: V, or K + cells (+ 1 with a rest)."""
        return len(self.student.shared) + self.cells + self.has_rest

    def map_teacher(self, logits: Tensor) -> Tensor:
        """[N, V_teacher] -> [N, width]."""
        return self._map(logits, self.teacher)

    def map_student(self, logits: Tensor) -> Tensor:
        """[N, V_student] -> [N, width], differentiable."""
        return self._map(logits, self.student)

    def _map(self, logits: Tensor, side: SideMap) -> Tensor:
        if self.identity:
            return logits
        parts = [logits.index_select(-1, side.shared)]
        if self.cells:
            parts.append(_GroupedLogSumExp.apply(logits, side.members, side.cell, self.cells))
        if self.has_rest:
            one = torch.zeros_like(side.rest)
            parts.append(_GroupedLogSumExp.apply(logits, side.rest, one, 1))
        return torch.cat([part.to(parts[-1].dtype) for part in parts], dim=-1)

    @torch.no_grad()
    def unmap_student(self, gradient: Tensor, logits: Tensor, mapped: Tensor) -> Tensor:
        """The gradient in the student's logits [N, V] from that in `map_student`'s [N, width].

        Args:
            logits, mapped: what went into the map, and what came out.
        """
        if self.identity:
            return gradient
        side, shared = self.student, len(self.student.shared)
        out = torch.zeros_like(logits, dtype=gradient.dtype)
        out.index_copy_(1, side.shared, gradient[:, :shared].to(out.dtype))
        groups = [(side.members, shared + side.cell)]
        if self.has_rest:
            groups.append((side.rest, torch.full_like(side.rest, self.width - 1)))
        for ids, entry in groups:
            for rows in row_chunks(len(logits), SCRATCH * len(ids)):
                share = group_shares(logits[rows].index_select(1, ids), mapped[rows], entry)
                part = out[rows]  # a view
                back = gradient[rows].index_select(1, entry).mul_(share)
                part.index_copy_(1, ids, back.to(out.dtype))
        return out

    @torch.no_grad()
    def unshared_mass(self, logits: Tensor, side: str) -> dict[str, Tensor]:
        """Probability on `rest`, `padding` rows and cells per token, each [N]; {} for the identity.
        """
        if self.identity:
            return {}
        rows: SideMap = getattr(self, side)
        log_p = logits.float().log_softmax(-1)
        return {
            f"{side}_{name}_mass": log_p.index_select(-1, ids).exp().sum(-1)
            for name, ids in (("rest", rows.rest), ("padding", rows.padding),
                              ("cell", rows.members)) if len(ids)
        }


def _entries(side: SideMap) -> NDArray[np.int32]:
    """[rows] the entry of each id, -1 for one that has none of its own."""
    shared, rest, padding, members, cell = (x.cpu().numpy() for x in vars(side).values())
    entries = np.full(1 + max(int(ids.max(initial=-1)) for ids in (shared, rest, padding, members)),
                      -1, np.int32)
    entries[shared] = np.arange(len(shared))
    entries[members] = len(shared) + cell
    return entries


def grouped_logsumexp(logits: Tensor, group: Tensor, groups: int) -> Tensor:
    """logsumexp of [N, M] within groups [M] of columns, [N, groups]; -inf for an empty group."""
    x = logits.clamp(min=-1e30)
    index = group.expand(len(x), -1)
    top = x.new_full((len(x), groups), -1e30).scatter_reduce(1, index, x.detach(), "amax")
    # one term of a group with members is e^0, so the clamp acts on empty groups only
    total = torch.zeros_like(top).index_add(1, group, (x - top.gather(1, index)).exp())
    return torch.where(top < -1e29, -torch.inf, top + total.clamp(min=1e-30).log())


class _GroupedLogSumExp(torch.autograd.Function):
    """`grouped_logsumexp` of some columns, a few rows at a time: nothing as large as the logits is
    kept for backward but the logits themselves."""

    @staticmethod
    def forward(ctx, logits, ids, group, groups):  # type: ignore[no-untyped-def]
        out = logits.new_empty(len(logits), groups, dtype=upcast(logits[:0]).dtype)
        for rows in row_chunks(len(logits), SCRATCH * len(ids)):
            out[rows] = grouped_logsumexp(
                upcast(logits[rows].index_select(1, ids)), group, groups)
        ctx.save_for_backward(logits, ids, group, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        logits, ids, group, out = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        for rows in row_chunks(len(logits), SCRATCH * len(ids)):
            share = group_shares(logits[rows].index_select(1, ids), out[rows], group)
            part = gradient[rows]  # a view
            part.index_copy_(
                1, ids, (share * upstream[rows].index_select(1, group)).to(logits.dtype))
        return gradient, None, None, None


def group_shares(logits: Tensor, totals: Tensor, group: Tensor) -> Tensor:
    """Each column's share [N, M] of its group's probability; `totals` [N, groups]."""
    share = (upcast(logits) - totals.index_select(1, group)).exp_()
    return share.nan_to_num_(0.0)  # -inf minus -inf


def build_vocabulary_map(
    teacher: TokenTable,
    student: TokenTable,
    teacher_rows: int,
    student_rows: int,
    roles: Sequence[tuple[int, int]] = (),
    glue: tuple[bytes, bytes] = (b"", b""),
) -> VocabularyMap:
    """Pair the two models' tokens by what they stand for.

    Args:
        teacher, student: token tables.
        teacher_rows, student_rows: rows of the heads (>= the tables' lengths).
        roles: (teacher id, student id) that play the same part under different names, such as
            the end of a turn; they come first.
        glue: bytes that a token at this position carries in front, on the two sides (" The" after
            "Assistant:" against "The" after a newline).

    Raises:
        AlignmentError: a head with fewer rows than its tokenizer has tokens, or nothing shared.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from taid_vlm.adapters import make_adapter
        >>> from taid_vlm.alignment import build_vocabulary_map
        >>> from taid_vlm.demo.demo import data_folder
        >>> models = data_folder() / "models"
        >>> teacher, student = (
        ...     make_adapter(AutoTokenizer.from_pretrained(models / f"words-{role}"), role)
        ...     for role in ("teacher", "student"))
        >>> pairs = build_vocabulary_map(teacher.table, student.table, 512, 503)
        >>> len(pairs.student.shared), pairs.has_rest  # and each model's own marks
        (499, True)
    """
    check_rows(teacher, student, teacher_rows, student_rows)
    plain = glue[0] == glue[1]
    same = plain and teacher_rows == student_rows and teacher.strings == student.strings
    if same and all(t == s for t, s in roles):
        return _identity(teacher_rows)
    pairs = pair_tokens(token_keys(teacher, glue[0]), token_keys(student, glue[1]), roles)
    if not pairs:
        raise AlignmentError("teacher and student share no token at all.")
    teacher_side = side_map([t for t, _ in pairs], teacher, teacher_rows)
    student_side = side_map([s for _, s in pairs], student, student_rows)
    return VocabularyMap(teacher_side, student_side, False, len(student_side.rest) > 0)


def check_rows(
    teacher: TokenTable, student: TokenTable, teacher_rows: int, student_rows: int
) -> None:
    """Every token needs a logit."""
    for role, table, rows in (("teacher", teacher, teacher_rows), ("student", student,
                                                                   student_rows)):
        if rows < len(table):
            raise AlignmentError(f"{role}: the head has {rows} rows, but the tokenizer names "
                                 f"{len(table)} tokens; resize the embeddings.",
                                 code="small_head")


def _identity(rows: int) -> VocabularyMap:
    none = torch.empty(0, dtype=torch.long)
    side = SideMap(torch.arange(rows), none, none)
    return VocabularyMap(side, side, True, False)


def token_keys(table: TokenTable, prefix: bytes) -> dict[tuple[str, bytes], int]:
    """(kind, bytes) -> id; ids that spell the same bytes keep apart by how they came about."""
    keys: dict[tuple[str, bytes], int] = {}
    for index, text in enumerate(table.text):
        if text is not None and text.startswith(prefix):
            spelled = table.strings[index] or ""
            kind = "byte" if spelled.startswith("<0x") else "text"
            kind = "added" if index in table.added else kind
            keys.setdefault((kind, text[len(prefix) :]), index)
    for index, name in table.special.items():
        keys.setdefault(("special", name), index)
    return keys


def pair_tokens(
    teacher: dict[tuple[str, bytes], int], student: dict[tuple[str, bytes], int],
    roles: Sequence[tuple[int, int]],
) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    used_t: set[int] = set()
    used_s: set[int] = set()
    alike = [(index, student[key]) for key, index in teacher.items() if key in student]
    named = [(index, student[other, name]) for (kind, name), index in teacher.items()
             for other in _SAME_NAME.get(kind, ()) if (other, name) in student]
    spelled = {text: index for (kind, text), index in student.items() if kind != "special"}
    by_bytes = [(index, spelled[text]) for (kind, text), index in teacher.items()
                if kind != "special" and text in spelled]
    for t, s in (*roles, *alike, *named, *by_bytes):
        if t not in used_t and s not in used_s:
            pairs.append((t, s))
            used_t.add(t)
            used_s.add(s)
    return pairs


def side_map(
    shared: ArrayLike, table: TokenTable, rows: int, members: ArrayLike = (), cell: ArrayLike = ()
) -> SideMap:
    """One model's rows by the ids of its shared tokens, and of `members` of groups `cell`."""
    named = np.zeros(rows, bool)
    named[: len(table)] = np.fromiter((s is not None for s in table.strings), bool, len(table))
    parts = [np.array(part, np.int64) for part in (shared, members, cell)]
    rest = named.copy()
    rest[parts[0]] = rest[parts[1]] = False
    shared, members, cell = map(torch.from_numpy, parts)
    return SideMap(shared, torch.from_numpy(rest.nonzero()[0]),
                   torch.from_numpy((~named).nonzero()[0]), members, cell)
