"""The batch that a plan is made for: the longest records among the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from taid_vlm.batch.collator import Batch
from taid_vlm.doctor.checkup import Checked, Listener
from taid_vlm.doctor.facts import image_tokens
from taid_vlm.errors import TaidError
from taid_vlm.records import Record, first_rows
from taid_vlm.training.trainer import DistillationTrainer

LOOKED_AT = 64  # records whose lengths are taken


@dataclass(frozen=True)
class Longest:
    """A batch of the longest records.

    records: how many were looked at. answer_tokens: predictions that are learned in the batch.
    tokens, image_tokens: by role, of the batch's longest row, after image expansion.
    lengths: the student's (without padding) of all that were looked at, the longest first.
    """

    rows: int
    records: int
    answer_tokens: int
    tokens: Mapping[str, int]
    image_tokens: Mapping[str, int]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Looked:
    """Records that can be used with what became of them, the longest first; how many were looked
    at, and whether there are more."""

    usable: tuple[tuple[Record, Checked], ...]
    records: int
    more: bool


def look_at(trainer: DistillationTrainer, records: Any) -> Looked:
    """Pass the first records through the real collator, one by one.

    Raises:
        TaidError: none of them can be used.
    """
    listener, rows = Listener.of(trainer.collator), list(first_rows(records, LOOKED_AT))
    checked = [(row, one) for row in rows
               if not (one := listener.check(row)).reason and isinstance(row, Record)]
    if not checked:
        raise TaidError(f"none of the first {len(rows)} records can be used.")
    checked.sort(key=lambda pair: -sum(len(row.ids) for row in pair[1].rows.values()))
    more = not hasattr(records, "__len__") or len(records) > len(rows)
    return Looked(tuple(checked), len(rows), more)


def longest_batch(trainer: DistillationTrainer, looked: Looked, size: int) -> tuple[Batch, Longest]:
    """The longest `size` records in one batch, as training makes it; of few records that stand for
    many, the longest come more than once."""
    usable = looked.usable
    chosen = list(islice(cycle(usable) if looked.more else usable, size))
    collate = trainer.data_collator if trainer.rollouts is None else trainer.rollouts.references
    batch = collate([row for row, _ in chosen])
    roles = dict.fromkeys(role for _, one in usable for role in one.rows)
    return batch, Longest(
        len(chosen), looked.records, len(batch["labels"]),
        {role: _most(usable, role, lambda row: len(row.ids)) for role in roles},
        {role: _most(usable, role, image_tokens) for role in roles},
        tuple(sorted((len(one.rows["student"].ids) for _, one in usable), reverse=True)))


def _most(usable: Sequence[tuple[Record, Checked]], role: str, count: Any) -> int:
    return max(count(one.rows[role]) for _, one in usable if role in one.rows)
