"""The preflight: all records through the real collator, and an account of what became of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from taid_vlm.batch.collator import TOO_LONG, UNALIGNED, DistillationCollator
from taid_vlm.doctor.checkup import Listener
from taid_vlm.doctor.facts import image_tokens
from taid_vlm.errors import RecordError, TaidError
from taid_vlm.records import Malformed, Record, StreamedRecords
from taid_vlm.training.config import DistillationConfig

EXAMPLES = 3  # sources named per reason

REMEDIES = {
    TOO_LONG: "Raise train.max_length, make the images smaller, or shorten the conversations.",
    UNALIGNED: "The two models share no token of these answers; choose a student whose tokenizer "
               "is closer to the teacher's, or objective.alignment: chunks.",
    "empty answer": "Give these records an answer, or take them out.",
    "no answer": "A record needs a turn of the assistant to learn from.",
    "empty text": "Give these records a text, or take them out.",
    "unreadable image": "Check that the files exist and are images; relative paths start at the "
                        "data file's folder, or at data.<side>.image_root.",
    "malformed record": "Mend the row; its columns and values must be as the message says.",
    "cannot be aligned": "The tokens do not spell the text or the template changes an answer; "
                         "normalise the data, or set another chat_template.",
    "chat template refused": "The template does not take these conversations (a system turn, two "
                             "turns of one role); rewrite them, or set another chat_template.",
    "special token inside an answer": "The answers spell control tokens of a model; remove them "
                                      "from the data.",
    "marking characters in the text": "The texts hold the private-use characters U+E000 or "
                                      "U+E001; remove them.",
    "refused by the processor": "The processor cannot take these images or texts; the message "
                                "above says why.",
}


@dataclass(frozen=True)
class Dropped:
    """Records that are left out for one reason; the first few by name."""

    reason: str
    count: int
    sources: tuple[str, ...]
    detail: str  # of the first
    remedy: str


@dataclass(frozen=True)
class Spread:
    """Of numbers per record: how they are spread, and how many records there are."""

    median: int
    p95: int
    max: int
    n: int


@dataclass(frozen=True)
class Preflight:
    """What became of the records of one data set.

    whole: whether all of its records were looked at, or only the first.
    cut: plain texts that are shortened to the maximum length.
    supervised, aligned, chunk: tokens of the student, as in a `Trace`.
    lengths: tokens per record before anything is cut, by role.
    images: tokens of the images per record that has any, by role.
    stops: the error that training would end with, None if there is none.
    """

    name: str
    whole: bool
    records: int
    usable: int
    dropped: tuple[Dropped, ...]
    cut: int
    supervised: int
    aligned: int
    chunk: int
    lengths: dict[str, Spread]
    images: dict[str, Spread]
    stops: TaidError | None = None

    @property
    def sentence(self) -> str:
        """The account in one line."""
        among = "" if self.whole else "the first "
        lost = self.records - self.usable
        share = lost / self.records if self.records else 0.0
        return f"{lost:,} of {among}{self.records:,} records will be left out ({share:.1%})"

    @property
    def coverage(self) -> float:
        """Share of the answer tokens that is compared."""
        return self.aligned / self.supervised if self.supervised else 0.0


@dataclass
class _Sums:
    records: int = 0
    usable: int = 0
    cut: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    counts: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    images: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    stops: TaidError | None = None


@dataclass(frozen=True)
class _Measured:
    """The little that a worker sends back of a record."""

    source: str
    reason: str
    detail: str
    stops: TaidError | None
    cut: bool
    tokens: dict[str, int]
    lengths: dict[str, int]
    images: dict[str, int]


def preflight(
    name: str, records: Any, collator: DistillationCollator, args: DistillationConfig,
    first: int | None = None,
) -> Preflight:
    """Pass the records of one data set through the collator, one by one.

    Args:
        name: what the data set is called in the account.
        records: `Records`, a list of records, or `StreamedRecords`.
        args: for the workers, the batch size of a worker's task and the progress bar.
        first: look at so many records only.
    """
    sums = _Sums()
    total = len(records) if hasattr(records, "__len__") else None
    rows = _measure(records, Listener.of(collator), args, first)
    for one in tqdm(rows, desc=name, total=total, leave=False,
                    disable=first is not None or args.disable_tqdm or None):
        _add(sums, one)
    whole = first is None or (total is not None and total <= first)
    return _account(name, whole, sums)


def check_sized(name: str, records: Any, limit: int | None) -> None:
    """Raise TaidError for a stream that has no known end."""
    if isinstance(records, StreamedRecords) and limit is None:
        raise TaidError(f"--all goes over every record, but {name} is streamed and its end is not "
                        f"known: set {name}.max_records, or look at it without --all.")


@dataclass
class _Checkup:
    """Collate function that measures every record; runs in data-loader workers."""

    listener: Listener

    def __call__(self, rows: Sequence[Record | Malformed]) -> list[_Measured]:
        return [self._one(row) for row in rows]

    def _one(self, row: Record | Malformed) -> _Measured:
        checked = self.listener.check(row)
        names = ("supervised_tokens", "aligned_tokens", "chunk_tokens")
        used = not checked.reason and not checked.stops
        return _Measured(
            checked.source, checked.reason or ("stops the run" if checked.stops else ""),
            checked.detail, checked.stops, checked.cut,
            {name: checked.counts[name] for name in names} if used else {},
            {role: len(row.ids) for role, row in checked.whole.items()},
            {role: image_tokens(row) for role, row in checked.whole.items() if row.images})


def _measure(
    records: Any, listener: Listener, args: DistillationConfig, first: int | None
) -> Iterator[_Measured]:
    checkup = _Checkup(listener)
    if not hasattr(records, "__len__"):
        yield from _measure_stream(records, checkup, first)
        return
    length = len(records) if first is None else min(first, len(records))
    loader = DataLoader(
        records, args.per_device_train_batch_size, sampler=range(length), collate_fn=checkup,
        num_workers=0 if first is not None else args.dataloader_num_workers)
    for batch in loader:
        yield from batch


def _measure_stream(
    records: Iterable[Record], checkup: _Checkup, first: int | None
) -> Iterator[_Measured]:
    try:
        for row in islice(records, first):
            yield from checkup([row])
    except RecordError as problem:  # a stream cannot go on after it, and ends training
        (one,) = checkup([Malformed(str(problem))])
        yield replace(one, stops=problem)


def _add(sums: _Sums, one: _Measured) -> None:
    sums.records += 1
    sums.usable += not one.reason
    sums.cut += one.cut
    sums.tokens.update(one.tokens)
    sums.stops = sums.stops or one.stops
    if one.reason:
        sums.counts[one.reason] += 1
        examples = sums.reasons[one.reason]
        if len(examples) < EXAMPLES:
            examples.append((one.source, one.detail))
    for role, length in one.lengths.items():
        sums.lengths[role].append(length)
    for role, count in one.images.items():
        sums.images[role].append(count)


def _account(name: str, whole: bool, sums: _Sums) -> Preflight:
    dropped = tuple(
        Dropped(reason, count, tuple(source for source, _ in sums.reasons[reason] if source),
                sums.reasons[reason][0][1], REMEDIES.get(reason, ""))
        for reason, count in sums.counts.most_common())
    return Preflight(
        name, whole, sums.records, sums.usable, dropped, sums.cut, sums.tokens["supervised_tokens"],
        sums.tokens["aligned_tokens"], sums.tokens["chunk_tokens"],
        {role: spread(values) for role, values in sums.lengths.items()},
        {role: spread(values) for role, values in sums.images.items()}, sums.stops)


def spread(values: Sequence[int]) -> Spread:
    """Median and 95th percentile are members of `values`: the smallest that so many reach."""
    ordered = sorted(values)
    median, p95 = (ordered[-(-len(ordered) * share // 100) - 1] for share in (50, 95))
    return Spread(median, p95, ordered[-1], len(ordered))
