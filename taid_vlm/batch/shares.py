"""Which of several teachers teaches a record, and what each counts for it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from taid_vlm.errors import SampleDropped, TaidError, nearest
from taid_vlm.records import Record

UNNAMED, UNKNOWN = "names no teacher", "names an unknown teacher"
OTHERS = "another teacher's"


@dataclass(frozen=True)
class Shares:
    """What a record's row or source says of its teachers, or else what holds for all.

    names: the teachers, in their order. usual: the weights for records that name none; None where
    those are left out. only: a teacher that all records have to have.
    """

    names: tuple[str, ...]
    usual: Mapping[str, float] | None
    only: str = ""

    def of(self, record: Record) -> dict[str, float]:
        """{name: share} of a record's teachers in their order; the shares add up to 1.

        Raises:
            SampleDropped: it names no teacher where others do, or one that is not there.
        """
        named = self.usual if record.teacher is None else record.teacher
        if named is None:
            raise SampleDropped(UNNAMED, f"{record.source} names no teacher, and other records do. "
                                "Name it in a column 'teacher' or with data.train.teacher, or set "
                                "teacher_weights for all that name none.")
        weights = {named: 1.0} if isinstance(named, str) else named
        for name in weights:
            if name not in self.names:
                raise SampleDropped(UNKNOWN, f"{record.source}: teacher '{name}'."
                                    f"{nearest(name, self.names)}")
        if self.only and self.only not in weights:
            raise SampleDropped(OTHERS, f"{record.source} is not taught by '{self.only}'.")
        total = sum(weights.values())
        return {name: weights[name] / total for name in self.names if name in weights}

    def taught(self, name: str, records: Iterable[object]) -> Iterator[Record]:
        """Those of some records that a teacher has a share in."""
        for record in records:
            with contextlib.suppress(SampleDropped):
                if isinstance(record, Record) and name in self.of(record):
                    yield record


def shares_of(
    names: Sequence[str], weights: Mapping[str, float] | None,
    firsts: Mapping[str, Sequence[Record]],
) -> Shares:
    """How records are shared out: what does not name a teacher has `weights`, or all teachers alike
    where no record names one.

    Args:
        firsts: by source, its first records.

    Raises:
        TaidError: a name that is no teacher's, with the source and how many rows have it.
    """
    alike = True
    for source, records in firsts.items():
        counts = Counter(name for record in records if record.teacher is not None for name in (
            [record.teacher] if isinstance(record.teacher, str) else record.teacher))
        alike = alike and not counts
        for name in counts:
            if name not in names:
                raise TaidError(f"{source}: {counts[name]} of the first {len(records)} rows name "
                                f"the teacher '{name}', which is not there."
                                f"{nearest(name, names)}")
    usual = weights or (dict.fromkeys(names, 1.0) if alike else None)
    return Shares(tuple(names), usual)
