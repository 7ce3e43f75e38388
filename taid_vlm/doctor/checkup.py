"""The collator that training uses, listened to while it works on one record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from taid_vlm.adapters import EncodedBatch, EncodedRow, ModelAdapter
from taid_vlm.alignment import Aligned
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.batch.several import NamedCollator, SeveralCollator
from taid_vlm.errors import Problem, TaidError
from taid_vlm.records import Malformed, Record


@dataclass(frozen=True)
class Checked:
    """What became of one record.

    reason: why it is left out, "" if it is used; detail: the whole message where there is one.
    stops: the error that training would end with at this record, None if it would not.
    whole: {role: the row before anything was cut}; rows: what is trained on.
    aligned: the comparisons found, in order of position.
    notes: what of it has no effect.
    """

    source: str
    reason: str
    detail: str
    stops: TaidError | None
    cut: bool
    whole: dict[str, EncodedRow]
    rows: dict[str, EncodedRow]
    aligned: list[Aligned]
    counts: dict[str, Any]
    notes: dict[str, int]


class Listener(DistillationCollator):
    """A DistillationCollator that keeps what it made of the last record."""

    @classmethod
    def of(cls, collator: DistillationCollator) -> Listener:
        """One that does as the collator, of whatever kind it is."""
        return KINDS[type(collator)](
            **{part.name: getattr(collator, part.name) for part in fields(collator)})

    def check(self, record: Record | Malformed) -> Checked:
        """Pass one record through everything that training does to it before the models."""
        source, self._detail = "" if isinstance(record, Malformed) else record.source, ""
        self._record, self._found = record, list[Aligned]()
        self._whole, self._rows = dict[str, EncodedRow](), dict[str, EncodedRow]()
        try:
            batch = self([record])
            counts, notes, stops = batch["counts"], batch["notes"], None
        except TaidError as error:  # the collator leaves out what can be; this ends a run
            counts, notes, stops = {"dropped": {}, "cut": 0}, {}, error
        reason = next(iter(counts["dropped"]), "")
        return Checked(source, reason, self._detail, stops, bool(counts["cut"]),
                       self._whole, self._rows, self._found, counts, notes)

    def _leave_out(self, problem: Problem, counts: Counter[str], source: str = "") -> None:
        self._detail = str(problem)
        super()._leave_out(problem, counts, source)

    def _run(self, adapter: ModelAdapter, samples: Sequence[Any]) -> EncodedBatch:
        encoded = super()._run(adapter, samples)
        # a placeholder stands in for what was left out; of several teachers some have no row
        if samples[0].record is self._record and encoded.rows[0] is not None:
            self._whole.setdefault(adapter.role, encoded.rows[0])
            self._rows[adapter.role] = encoded.rows[0]
        return encoded

    def _align(
        self, encoded: dict[str, EncodedBatch], index: int, counts: Counter[str], source: str
    ) -> list[Aligned]:
        self._found = super()._align(encoded, index, counts, source)
        return self._found


class NamedListener(Listener, NamedCollator):
    """The same of a NamedCollator."""


class SeveralListener(Listener, SeveralCollator):
    """The same of a SeveralCollator; `aligned` is with the record's first teacher."""

    def _align(  # type: ignore[override]
        self, encoded: dict[str, EncodedBatch], index: int, counts: Counter[str], source: str
    ) -> Any:
        aligned: Any = super()._align(encoded, index, counts, source)
        self._found = next(iter(aligned.values()), [])
        return aligned


KINDS: dict[type, type[Listener]] = {DistillationCollator: Listener, NamedCollator: NamedListener,
                                     SeveralCollator: SeveralListener}
