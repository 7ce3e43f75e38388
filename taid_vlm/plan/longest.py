"""The batch that a plan is made for: the longest records among the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

from taid_vlm.adapters import Continuation
from taid_vlm.batch.collator import Batch
from taid_vlm.doctor.checkup import Checked, Listener
from taid_vlm.doctor.facts import image_tokens
from taid_vlm.errors import TaidError
from taid_vlm.records import Record, first_rows
from taid_vlm.training.on_policy import Rollouts
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


def longest_step(trainer: DistillationTrainer, looked: Looked, size: int) -> tuple[Batch, Longest]:
    """The longest batch of a training step: on policy of sampled answers that have all the tokens
    they may have, after the longest prompts that are asked, if that is more than references are."""
    batch, longest = longest_batch(trainer, looked, size)
    if trainer.rollouts is None:
        return batch, longest
    own = _continued(trainer.rollouts, looked)
    sampled = trainer.rollouts.samples(list(islice(cycle(own) if looked.more else own, size)))
    if not sampled["counts"]["rows"] or _tokens(sampled, "student") <= _tokens(batch, "student"):
        return batch, longest
    tokens = {role: _tokens(sampled, role) if f"{role}_inputs" in sampled else count
              for role, count in longest.tokens.items()}
    return sampled, replace(longest, answer_tokens=len(sampled["labels"]), tokens=tokens)


def _continued(rollouts: Rollouts, looked: Looked) -> list[Continuation]:
    """Records with their last answer said over and over, the longest prompts first."""
    student, number = rollouts.student, rollouts.spec.max_new_tokens
    own = []
    for record, one in looked.usable:
        row = one.rows["student"]
        places = row.answers[-1].positions
        said = [row.ids[i] for i in places if row.ids[i] not in student.unsayable]
        if said and places[0] + number <= (student.max_length or 2**62):
            ids = tuple(islice(cycle(said), number))
            own.append((places[0], Continuation(record, record.learned[-1], ids, None)))
    return [each for _, each in sorted(own, key=lambda pair: -pair[0])]


def _tokens(batch: Batch, role: str) -> int:
    return int(batch[f"{role}_inputs"]["input_ids"].shape[-1])


def _most(usable: Sequence[tuple[Record, Checked]], role: str, count: Any) -> int:
    return max(count(one.rows[role]) for _, one in usable if role in one.rows)
