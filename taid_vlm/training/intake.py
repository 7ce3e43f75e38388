"""Which of the records that training reads are learned from, by source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.batch.windows import Windows
from taid_vlm.errors import TaidError
from taid_vlm.records import StreamedRecords, first_rows, parts_of

if TYPE_CHECKING:
    from taid_vlm.training.config import DistillationConfig

PROBED_RECORDS = 32  # of every source
CHECKED_RECORDS = 256  # where many of those are left out, and at the least during training
FEWEST = 8  # a share of fewer records says nothing
_MEND = "Mend or filter them, or raise train.max_left_out."


class Intake:
    """Rows read and used so far, over all processes.

    Args:
        data: the training data; the sources of a mix are counted one by one.
        bound: share of rows that may be left out.
    """

    def __init__(self, data: Any, bound: float) -> None:
        self.names = [part.origin for part in getattr(data, "parts", ())]
        self.bound = bound
        self.rows: Counter[str] = Counter()  # "read", "used", and of each source "read/NAME", ...
        self.unread: Counter[str] = Counter()  # columns that nothing reads, in this process

    def sums(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Of one micro-batch; every process has the same names."""
        counts, intake = batch["counts"], batch["intake"]
        self.unread.update(intake["unread"])
        left_out = sum(counts["dropped"].values())
        sums = {"rows/read": counts["rows"] + left_out, "rows/used": counts["rows"]}
        for name in self.names:
            read, used = intake["sources"].get(name, (0, 0))
            sums |= {f"rows/read/{name}": read, f"rows/used/{name}": used}
        return sums

    def take(self, sums: dict[str, float], reasons: Mapping[str, int]) -> None:
        """Take its own out of a step's sums over all processes.

        Raises:
            TaidError: more than `bound` of the rows were left out.
        """
        for name in [name for name in sums if name.startswith("rows/")]:
            self.rows[name.removeprefix("rows/")] += int(sums.pop(name))
        read = self.rows["read"]
        lost = read - self.rows["used"]
        if read >= CHECKED_RECORDS and lost > self.bound * read:
            raise TaidError(f"{_share(lost, read, self.bound)}: {_listed(reasons)}.", mend=_MEND)

    def logs(self) -> dict[str, float]:
        """Rows of each source so far, where there are several."""
        return {f"{kind}/{name}": count for name in self.names
                for kind, count in self.by_source()[name].items()}

    def by_source(self) -> dict[str, dict[str, int]]:
        """{source: {"read": rows, "used": ..., "left_out": ...}}, where there are several."""
        counts = {name: (self.rows[f"read/{name}"], self.rows[f"used/{name}"])
                  for name in self.names}
        return {name: {"read": read, "used": used, "left_out": read - used}
                for name, (read, used) in counts.items()}


def check_usable(collator: DistillationCollator, data: Any, bound: float = 1.0) -> None:
    """Pass the first records of every source through the collator.

    Args:
        bound: share of them that may be left out; where more of the first few are, more are
            looked at.

    Raises:
        TaidError: training on nothing, or on too little, must not start.
    """
    several = len(parts_of(data)) > 1
    for part in parts_of(data):
        _check_part(collator, part, bound, f"'{part.origin}': " if several else "")


def _check_part(
    collator: DistillationCollator, data: Any, bound: float, place: str
) -> None:
    reasons: Counter[str] = Counter()
    read = used = 0
    rows = first_rows(data, CHECKED_RECORDS)
    for number in (PROBED_RECORDS, CHECKED_RECORDS - PROBED_RECORDS):
        for row in islice(rows, number):
            counts = collator([row])["counts"]
            reasons.update(counts["dropped"])
            read, used = read + 1, used + counts["rows"]
            if used and bound >= 1:
                return
        if used and (read - used <= bound * read or read < FEWEST):
            return
        if not used:
            break
    if not read:
        return
    first = collator.reported[next(iter(reasons))]
    if not used:
        raise TaidError(f"{place}none of the first {read} records can be used: "
                        f"{_listed(reasons)}. {first}", reasons=reasons)
    raise TaidError(f"{place}of the first training records, "
                    f"{_share(read - used, read, bound)}: {_listed(reasons)}. The first: {first}",
                    mend=_MEND, reasons=reasons)


def _share(lost: int, read: int, bound: float) -> str:
    return (f"{lost:,} of {read:,} are left out ({lost / read:.1%}; train.max_left_out = "
            f"{bound:g})")


def _listed(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{number} x {reason}" for reason, number in reasons.items())


def windowed(
    data: Any, collator: DistillationCollator, args: DistillationConfig, passes: int | None = None
) -> Any:
    """Training data with long texts in windows, where `args` has any.

    Raises:
        TaidError: a window that a model cannot take.
    """
    if args.window is None or data is None:
        return data
    for adapter in collator.adapters:
        if adapter.max_length and args.window > adapter.max_length:
            raise TaidError(f"train.window = {args.window}, but the {adapter.role} takes at most "
                            f"{adapter.max_length} tokens (train.max_length, or its own limit).")
    seed = args.seed if args.data_seed is None else args.data_seed
    windows = Windows(data, collator.adapters, args.window, args.stride or args.window // 8, seed,
                      passes)
    windows.block = args.train_batch_size * args.world_size
    return windows


def prepared(data: Any, args: TrainingArguments) -> Any:
    """Data as a trainer's loader takes them: rows of a DataFrame, streams that know the batch."""
    if isinstance(data, StreamedRecords):
        data.block = args.train_batch_size * args.world_size
    if isinstance(data, dict):
        return {name: prepared(part, args) for name, part in data.items()}
    return FrameRows(data) if hasattr(data, "iloc") else data


class FrameRows:
    """The rows of a pandas DataFrame."""

    def __init__(self, frame: Any) -> None:
        self.frame = frame

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.frame.iloc[index].to_dict()
        return row


def named_unread(parts: Iterable[Any]) -> list[str]:
    """Sentences about columns that nothing reads, as the first rows of the sources have them."""
    told = []
    for part in parts:
        if unread := getattr(part, "unread", None):
            columns = ", ".join(f"'{name}' ({count:,})" for name, count in unread.most_common())
            told.append(f"columns that nothing reads: {columns} of the first {part.probed:,} rows "
                        f"of {part.label}")
    return told
