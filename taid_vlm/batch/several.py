"""Records of several teachers in one batch: the student sees all of them at once, and each teacher
those that it has a share in.

A batch is one of `collator.py` with the student's side alone, and of every teacher with records in
it a part: `parts` {name: a batch as a single teacher has it, of its own records}, with
    student_at: [N_part] which of the batch's N tokens of the student each of the part's is;
    share: float32 [N_part] what the teacher counts there; absent where all count 1;
    weights: of the part's tokens, with the share in them; absent where all are 1.
So what the student computes once per batch is what every teacher's loss is taken of.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from taid_vlm.adapters import EncodedBatch, ModelAdapter
from taid_vlm.alignment import supervised_positions
from taid_vlm.batch.collator import (
    CUT,
    Batch,
    DistillationCollator,
    Row,
    _Sample,
    target_ids,
    token_weights,
)
from taid_vlm.batch.figures import Measured
from taid_vlm.batch.shares import Shares
from taid_vlm.config.recipe import TEACHERS
from taid_vlm.records import Record
from taid_vlm.records.record import TEACHER

COMPARED = ("kl", "reverse_kl", "agreement", "chunk_kl", "teacher_nll")  # by teacher, too


def role_of(name: str) -> str:
    """What messages call a teacher: its key in a recipe."""
    return f"{TEACHERS}.{name}"


@dataclass
class NamedCollator(DistillationCollator):
    """A DistillationCollator for the only one of several teachers: records that name none, where
    others do, or another one, are left out.

    Args:
        shares: which teachers a record has.
    """

    shares: Shares = field(kw_only=True)

    def _prepare(self, record: Record) -> _Sample:
        self.shares.of(record)
        return super()._prepare(record)

    def _collate(self, rows: Sequence[Row]) -> Batch:
        batch = super()._collate(rows)
        batch["intake"]["unread"].pop(TEACHER, None)  # it is read here
        return batch

    def placeholder(self) -> Record:
        return replace(super().placeholder(), teacher=self.shares.only or self.shares.names[0])


@dataclass
class SeveralCollator(NamedCollator):
    """A DistillationCollator for several teachers.

    A record that one of its teachers cannot use is left out whole.

    Args:
        parts: by name, the collator of the pair that a teacher makes with the student.
    """

    parts: Mapping[str, DistillationCollator] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._teachers: dict[str, ModelAdapter] = {}
        for name, part in self.parts.items():
            assert part.teacher is not None
            part.reported = self.reported
            self._teachers[name] = copy.copy(part.teacher)
            self._teachers[name].role = role_of(name)

    def alone(self, name: str) -> NamedCollator:
        """The collator of one teacher: records that it has no share in are left out."""
        part = self.parts[name]
        return NamedCollator(**{one.name: getattr(part, one.name) for one in fields(part)},
                             shares=Shares(self.shares.names, self.shares.usual, name))

    @property
    def adapters(self) -> list[ModelAdapter]:
        return [*self._teachers.values(), self.student]

    def teacher_of(self, name: str) -> ModelAdapter:
        return self._teachers[name]

    # ----- one record -----------------------------------------------------------------------

    def adapters_of(self, record: Record) -> list[ModelAdapter]:
        return [*(self._teachers[name] for name in self.shares.of(record)), self.student]

    # ----- a batch --------------------------------------------------------------------------

    def _run(self, adapter: ModelAdapter, samples: Sequence[_Sample]) -> EncodedBatch:
        """Of those samples that the adapter's model is shown; the others have no row (None)."""
        shown = [i for i, sample in enumerate(samples) if adapter.role in sample.rendered]
        if len(shown) == len(samples):
            return super()._run(adapter, samples)
        rows: list[Any] = [None] * len(samples)
        inputs: dict[str, Tensor] = {}
        if shown:
            encoded = super()._run(adapter, [samples[i] for i in shown])
            inputs = encoded.inputs
            for i, row in zip(shown, encoded.rows, strict=True):
                rows[i] = row
        return EncodedBatch(inputs, rows)

    def _align(  # type: ignore[override]
        self, encoded: dict[str, EncodedBatch], index: int, counts: Counter[str], source: str
    ) -> dict[str, Any]:
        """By teacher; {} where one of them has nothing."""
        aligned = {}
        for name, part in self.parts.items():
            teacher = encoded[role_of(name)]
            if teacher.rows[index] is None:
                continue
            aligned[name] = part._align({"teacher": teacher, "student": encoded["student"]}, index,
                                        counts, source)
            if not aligned[name]:
                return {}
        return aligned

    # ----- tensors --------------------------------------------------------------------------

    def _assemble(
        self, samples: Sequence[_Sample], encoded: dict[str, EncodedBatch], aligned: Any,
        counts: Counter[str],
    ) -> Batch:
        student = encoded["student"]
        ids = student.inputs["input_ids"]
        mask, parts = torch.zeros(ids.shape, dtype=torch.bool), dict[str, Batch]()
        for name in self.parts:
            chosen = [i for i, of in enumerate(aligned) if name in of]
            if chosen:
                parts[name] = self._part(name, samples, encoded, aligned, chosen)
                mask[chosen] |= parts[name]["student_mask"]
        places = mask.flatten().cumsum(0) - 1
        row, before = (part.tolist() for part in mask.nonzero(as_tuple=True))
        turn, chunked = torch.zeros(len(row), dtype=torch.long), torch.zeros(len(row)).bool()
        for name, part in parts.items():
            chosen = [i for i, of in enumerate(aligned) if name in of]
            own = torch.zeros_like(mask)
            own[chosen] = part.pop("student_mask")
            part["student_at"] = at = places[own.flatten()]
            turn[at] = part["turn"]
            if "chunk_student" in part:
                chunked[at[part["chunk_student"] >= 0]] = True
            self._share(part, [self.shares.of(samples[i].record)[name] for i in chosen])
        tokens = [(r, p + 1, t) for r, p, t in zip(row, before, turn.tolist(), strict=True)]
        encoded_rows = student.rows if row else []
        return {
            "parts": parts, "student_inputs": student.inputs, "student_mask": mask,
            "labels": target_ids(student.rows, [(r, p) for r, p, _ in tokens]),
            "row": torch.tensor(row, dtype=torch.long), "turn": turn,
            "categories": [samples[r].record.category(t) for r, _, t in tokens],
            "sources": [sample.record.source for sample in samples],
            "images": torch.tensor([len(sample.images) for sample in samples]),
            "counts": {
                "dropped": {key: n for key, n in counts.items() if key != CUT}, "cut": counts[CUT],
                "supervised_tokens": sum(len(supervised_positions(r)) for r in encoded_rows),
                "aligned_tokens": len(row), "chunk_tokens": int(chunked.sum()),
                "rows": len(samples) if row else 0},
            "notes": dict(self._notes(samples)),
        } | token_weights(student.rows, tokens)

    def _part(
        self, name: str, samples: Sequence[_Sample], encoded: dict[str, EncodedBatch],
        aligned: Any, chosen: Sequence[int],
    ) -> Batch:
        """A teacher's records as a single teacher's batch, in the places of the student's rows."""
        role, student = role_of(name), encoded["student"]
        own = [replace(samples[i], rendered={"teacher": samples[i].rendered[role],
                                             "student": samples[i].rendered["student"]})
               for i in chosen]
        sides = {"teacher": EncodedBatch(encoded[role].inputs,
                                         [encoded[role].rows[i] for i in chosen]),
                 "student": EncodedBatch({"input_ids": student.inputs["input_ids"][chosen]},
                                         [student.rows[i] for i in chosen])}
        part = self.parts[name]._assemble(own, sides, [aligned[i][name] for i in chosen], Counter())
        return {key: value for key, value in part.items()
                if key not in ("student_inputs", "counts", "notes")}

    def _share(self, part: Batch, shares: Sequence[float]) -> None:
        """What every token of a part counts."""
        if any(share != 1 for share in shares):
            part["share"] = torch.tensor(shares, dtype=torch.float32)[part["row"]]
            part["weights"] = part["share"] * part.get("weights", 1.0)


# ----- what is known of a part, at the batch's tokens ---------------------------------------


def shared(batch: Batch, part: Batch, values: Tensor) -> Tensor:
    """Values [N_part] of a part's tokens, times their share, at the batch's N tokens."""
    values = values * part["share"] if "share" in part else values
    return values.new_zeros(len(batch["labels"])).index_add(0, part["student_at"], values)


def joined_figures(
    batch: Batch, parts: Mapping[str, Mapping[str, Measured]]
) -> dict[str, Measured]:
    """Every figure at the batch's tokens, a mean by shares over the teachers that have it there;
    and each teacher's own as FIGURE/NAME."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    own: dict[str, Measured] = {}
    for name, figures in parts.items():
        part = batch["parts"][name]
        for figure, (values, tokens) in figures.items():
            at = part["student_at"] if tokens is None else part["student_at"][tokens]
            share = part.get("share", torch.ones_like(part["student_at"], dtype=torch.float32))
            share = share if tokens is None else share[tokens]
            none = torch.zeros_like(batch["labels"], dtype=values.dtype)
            sums[figure] = sums.get(figure, none).index_add(0, at, values * share.to(none))
            counts[figure] = counts.get(figure, torch.zeros_like(
                none, dtype=share.dtype)).index_add(0, at, share)
            if figure in COMPARED:
                own[f"{figure}/{name}"] = Measured(values, at)
    joined = {}
    for figure, total in sums.items():
        at = counts[figure].nonzero()[:, 0]
        joined[figure] = Measured(total[at] / counts[figure][at].to(total), at)
    return joined | own
