"""The preflight: all records through the real collator, and an account of what became of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from taid_vlm.adapters.pictures import NO_VIDEO, VARYING
from taid_vlm.adapters.specials import CONTROL, MEDIA_TOKEN
from taid_vlm.adapters.template import NO_TOOLS, NOT_PRINTED, PRINTED_DIFFERENTLY
from taid_vlm.adapters.texts import NO_TEMPLATE, NO_VISION, ONE_QUESTION
from taid_vlm.alignment.pairing import ONE_SIDED
from taid_vlm.batch.collator import TOO_LONG, UNALIGNED, DistillationCollator
from taid_vlm.doctor.checkup import Listener
from taid_vlm.doctor.facts import image_tokens
from taid_vlm.errors import HalfCharacterError, TaidError
from taid_vlm.records import Malformed, Record, StreamedRecords, first_rows, parts_of
from taid_vlm.records.images import TOO_LARGE, UNREADABLE
from taid_vlm.records.videos import UNREADABLE_VIDEO
from taid_vlm.training.config import DistillationConfig

EXAMPLES = 3  # sources named per reason
_TOKENS = ("supervised", "aligned", "chunk")  # of the student

REMEDIES = {
    TOO_LONG: "Raise train.max_length, make the images smaller, or shorten the conversations.",
    UNALIGNED: "The two models share no token of these answers; choose a student whose tokenizer "
               "is closer to the teacher's, or objective.alignment: chunks.",
    "empty answer": "Give these records an answer, or take them out.",
    "no answer is learned": "Every answer weighs 0 (train: false); take these records out.",
    "no answer": "A record needs a turn of the assistant to learn from.",
    "empty text": "Give these records a text, or take them out.",
    UNREADABLE: "Check that the files exist and are images; relative paths start at the "
                "data file's folder, or at data.<side>.image_root.",
    TOO_LARGE: "Make the images smaller, or raise data.<side>.max_pixels.",
    UNREADABLE_VIDEO: "Check that the files exist and are videos; relative paths start where those "
                      "of images do.",
    NO_VIDEO: "Choose a model that takes videos, or give their frames as images.",
    VARYING: "Set data.video: {frames: 8} in place of fps.",
    ONE_QUESTION: "A model without a chat template takes one question and its answer; name "
                  "one (chat_template: template.jinja under the model in the recipe), or split the "
                  "conversations.",
    NO_VISION: "A text model cannot see; take these records out, or choose a model with vision.",
    HalfCharacterError.reason: "Write the text anew with whole characters.",
    "malformed record": "Mend the row; its columns and values must be as the message says.",
    "cannot be aligned": "The tokens do not spell the text or the template changes an answer; "
                         "normalise the data, or set another chat_template.",
    "chat template refused": "The template does not take these conversations (a system turn, two "
                             "turns of one role); rewrite them, or set another chat_template.",
    CONTROL: "The answers spell control tokens of a model; remove them from the data.",
    ONE_SIDED: "Add the token to the other model's tokenizer (and resize its embeddings), or write "
               "the answers without it.",
    MEDIA_TOKEN: "Give these records their images, or write the tag otherwise.",
    NO_TOOLS: "Set a chat_template that prints tools under the model in the recipe, or take the "
              "column out.",
    NO_TEMPLATE: "Set a chat_template that prints them under the model in the recipe.",
    NOT_PRINTED: "The answers follow on what the model would not see; set another chat_template.",
    PRINTED_DIFFERENTLY: "Give one of the models the other's way of printing with chat_template.",
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
    notes: what of the usable records has no effect, with how many hold it.
    sources: {name: (rows read, used)} where there are several.
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
    notes: dict[str, int] = field(default_factory=dict)
    sources: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """The account in one line."""
        among = "" if self.whole else "the first "
        lost = self.records - self.usable
        share = f"{lost / max(self.records, 1):.1%}"
        return f"{lost:,} of {among}{self.records:,} records will be left out ({share})"

    @property
    def coverage(self) -> float:
        """Share of the answer tokens that is compared."""
        return self.aligned / self.supervised if self.supervised else 0.0


@dataclass(frozen=True)
class _Measured:
    """The little that a worker sends back of a record.

    reason: why it is left out, "" if it is used. counts: records, usable, cut, and its tokens.
    lengths, images: tokens by role. notes: of the collator.
    """

    source: str
    reason: str
    detail: str
    stops: TaidError | None
    counts: dict[str, int]
    lengths: dict[str, int]
    images: dict[str, int]
    origin: str = ""
    notes: dict[str, int] = field(default_factory=dict)


@dataclass
class _Sums:
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[_Measured]] = field(default_factory=lambda: defaultdict(list))
    lengths: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    images: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    stops: TaidError | None = None
    notes: Counter[str] = field(default_factory=Counter)
    sources: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, one: _Measured) -> None:
        self.counts.update(one.counts)
        self.notes.update(one.notes)
        if one.origin:
            read, used = self.sources.get(one.origin, (0, 0))
            self.sources[one.origin] = (read + 1, used + one.counts["usable"])
        self.stops = self.stops or one.stops
        if one.reason:
            self.reasons[one.reason] += 1
            if self.reasons[one.reason] <= EXAMPLES:
                self.examples[one.reason].append(one)
        for sums, numbers in ((self.lengths, one.lengths), (self.images, one.images)):
            for role, number in numbers.items():
                sums[role].append(number)


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
        sums.add(one)
    whole = first is None or (total is not None and total <= first)
    return _account(name, whole, sums)


def check_sized(name: str, records: Any) -> None:
    """Raise TaidError for a stream that has no known end."""
    parts = parts_of(records)
    for number, part in enumerate(parts):
        if isinstance(part, StreamedRecords) and not part.ends:
            where = f"{name}[{number}]" if len(parts) > 1 else name
            raise TaidError(f"--all goes over every record, but {where} is streamed and its end is "
                            f"not known: set {where}.max_records, or look at it without --all.")


def _measured(listener: Listener, row: Record | Malformed) -> _Measured:
    checked = listener.check(row)
    reason = checked.reason or ("stops the run" if checked.stops else "")
    counts = {"records": 1, "usable": int(not reason), "cut": int(checked.cut)}
    if not reason:
        counts |= {name: checked.counts[f"{name}_tokens"] for name in _TOKENS}
    return _Measured(
        checked.source, reason, checked.detail, checked.stops, counts,
        {role: len(whole.ids) for role, whole in checked.whole.items()},
        {role: image_tokens(whole) for role, whole in checked.whole.items() if whole.images},
        row.origin, checked.notes)


def _collate(listener: Listener, rows: Sequence[Record | Malformed]) -> list[_Measured]:
    """Measures every record, in data-loader workers where there are any."""
    return [_measured(listener, row) for row in rows]


def _measure(
    records: Any, listener: Listener, args: DistillationConfig, first: int | None
) -> Iterator[_Measured]:
    if hasattr(records, "__len__"):
        length = len(records) if first is None else min(first, len(records))
        yield from chain.from_iterable(DataLoader(
            records, args.per_device_train_batch_size, sampler=range(length),
            collate_fn=partial(_collate, listener),
            num_workers=0 if first is not None else args.dataloader_num_workers))
    else:
        yield from (_measured(listener, row) for row in first_rows(records, first))


def _account(name: str, whole: bool, sums: _Sums) -> Preflight:
    dropped = []
    for reason, count in sums.reasons.most_common():
        first, sources = sums.examples[reason][0], [one.source for one in sums.examples[reason]]
        dropped.append(Dropped(reason, count, tuple(filter(None, sources)), first.detail,
                               REMEDIES.get(reason, "")))
    cut, supervised, aligned, chunk = (sums.counts[key] for key in ("cut", *_TOKENS))
    return Preflight(
        name, whole, sums.counts["records"], sums.counts["usable"], tuple(dropped), cut,
        supervised, aligned, chunk,
        {role: spread(values) for role, values in sums.lengths.items()},
        {role: spread(values) for role, values in sums.images.items()}, sums.stops,
        dict(sums.notes.most_common()), sums.sources)


def spread(values: Sequence[int]) -> Spread:
    """Median and 95th percentile are members of `values`: the smallest that so many reach."""
    ordered = sorted(values)
    median, p95 = (ordered[-(-len(ordered) * share // 100) - 1] for share in (50, 95))
    return Spread(median, p95, ordered[-1], len(ordered))
