"""Long documents in windows: every byte of a document is learned in exactly one of them.

A window is a stretch of the text that both models see alike. It begins with context, which is seen
and not learned, and ends where both tokenizers have a boundary; there the next one goes on. So no
token stands across two windows, and every window's first learned token has tokens before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from taid_vlm.adapters import ModelAdapter
from taid_vlm.adapters.encoded import byte_index
from taid_vlm.errors import SampleDropped, TaidError
from taid_vlm.records import Malformed, MixedStream, Record, StreamedRecords, first_rows
from taid_vlm.records.sources import share_of_worker

CHARACTERS = 4  # of a token: what is tokenized to find the first window
TRIED = 8  # beginnings of a window's context, of each kind


class Windows(StreamedRecords):
    """The records of a data set with its long texts in windows, one behind the other; other
    records as they are.

    Args:
        data: any data set of records or rows.
        window, stride: tokens of a window, and of these at most of context, for either model.
        seed: shuffles the records of data with a length, anew for every pass.
        passes: over the data; without end if None.
    """

    def __init__(
        self, data: Any, adapters: Sequence[ModelAdapter], window: int, stride: int, seed: int = 0,
        passes: int | None = None,
    ) -> None:
        self.data, self.adapters, self.window, self.stride = data, list(adapters), window, stride
        self.seed, self.passes = seed, passes
        self.block, self.limit = getattr(data, "block", 1), passes
        self.parts = getattr(data, "parts", [])

    def set_epoch(self, epoch: int) -> None:
        """Passes are counted within the stream."""

    def __iter__(self) -> Iterator[Record | Malformed]:
        yield from share_of_worker(self._windows(), self.block)

    def _windows(self) -> Iterator[Record | Malformed]:
        for turn in itertools.count() if self.passes is None else range(self.passes):
            empty = True
            for record in self._records(turn):
                empty = False
                yield from self.split(record)
            if empty:
                return

    def _records(self, turn: int) -> Iterator[Record | Malformed]:
        if isinstance(self.data, MixedStream):
            return (read() for read in self.data.draws())
        if isinstance(self.data, StreamedRecords):
            self.data.set_epoch(turn)
            return map(self.data.read, self.data.located(whole=True))
        if not hasattr(self.data, "__len__"):
            return first_rows(self.data)
        number = len(self.data)
        order = range(number) if self.passes else np.random.default_rng(
            (self.seed, turn)).permutation(number)
        return (row for index in order for row in first_rows(_One(self.data, int(index))))

    def split(self, record: Record | Malformed) -> Iterator[Record | Malformed]:
        """A record's windows; one that cannot be tokenized is left to the collator to count."""
        if isinstance(record, Malformed) or record.context or not (record.text or "").strip():
            yield record
            return
        text = str(record.text)
        try:
            windows = list(cut(text, self.adapters, self.window, self.stride))
        except (TaidError, SampleDropped):
            yield record
            return
        for start, learned, end in windows:
            yield record if end - start == len(text) else replace(
                record, text=text[start:end], context=learned - start, goes_on=end < len(text))


class _One:
    """One row of a data set, as a data set."""

    def __init__(self, data: Any, index: int) -> None:
        self.data, self.index = data, index

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return self.data[self.index]


Boundaries = dict[int, tuple[int, ...]]  # character -> tokens of each model up to there


def cut(
    text: str, adapters: Sequence[ModelAdapter], window: int, stride: int
) -> Iterator[tuple[int, int, int]]:
    """Windows as characters (start, first that is learned, end).

    Raises:
        TaidError, SampleDropped: a text that cannot be tokenized or has no common boundary.
    """
    starts, learned, length = [0], 0, CHARACTERS * window
    while learned < len(text):
        for start in starts:
            ended = _end(text, start, learned, length, adapters, window)
            if ended is not None:
                break
        else:
            raise SampleDropped("no window", f"no common boundary behind character {learned}")
        end, shared = ended
        yield start, learned, end
        starts, learned, length = _starts(text, start, end, shared, stride), end, end - start


def _end(
    text: str, start: int, learned: int, length: int, adapters: Sequence[ModelAdapter], window: int
) -> tuple[int, Boundaries] | None:
    """The furthest place where a window may end, and the window's boundaries; None if its learned
    part begins in a token.

    length: of the window before, in characters: about so many more have to be tokenized.
    """
    shared, stop = Boundaries(), start
    while stop < len(text) and max(map(max, shared.values()), default=0) <= window:
        stop = min(max(stop, learned) + length * 5 // 4 + 1, len(text))
        shared = _boundaries(text[start:stop], stop == len(text), adapters)
    if learned > start and learned - start not in shared:
        return None
    places = [start + place for place, counts in shared.items()
              if start + place > learned and max(counts) <= window]
    far = [place for place in places if place - learned > (max(places) - learned) // 2]
    for end in reversed(_at_spaces(text, far)):
        exact = _boundaries(text[start:end], end == len(text), adapters)  # as it will be seen
        fits = end - start in exact and max(exact[end - start]) <= window
        if fits and (learned == start or learned - start in exact):
            return end, exact
    return None


def _starts(text: str, start: int, end: int, shared: Boundaries, stride: int) -> list[int]:
    """Where the context of the window behind `end` may begin, the best place first: before a space,
    with as many of the `stride` tokens as there are; more than these only where nothing else is."""
    near, far = list[int](), list[int]()
    for place, counts in sorted(shared.items()):
        within = all(n - count <= stride
                     for n, count in zip(shared[end - start], counts, strict=True))
        if 0 < place < end - start:
            (near if within else far).append(start + place)
    good = _at_spaces(text, near)
    return [*good[:TRIED], *[place for place in near if place not in good][:TRIED],
            *_at_spaces(text, far)[: -TRIED : -1], *far[: -TRIED : -1]]


def _at_spaces(text: str, places: Sequence[int]) -> list[int]:
    """Places in order, those before a space last where there are any: most tokenizers have a
    boundary there whatever stands around it."""
    def before_space(place: int) -> bool:
        return place == len(text) or (text[place].isspace() and not text[place - 1].isspace())

    ordered = sorted(place for place in places if not text[place - 1].isspace())
    good = [place for place in ordered if before_space(place)]
    return good or ordered or sorted(places)


def _boundaries(
    text: str, ends: bool, adapters: Sequence[ModelAdapter]
) -> Boundaries:
    """Characters behind which every model has a boundary -> how many tokens each has up to there.

    ends: the document ends here, which takes a token more.
    """
    characters = {place: index for index, place in enumerate(byte_index(text))}
    ways = []
    for adapter in adapters:
        rendered = adapter.render(Record("window", text=text, goes_on=True))
        (row,) = adapter.encode([rendered], [[]]).rows
        head = len(row.text[: rendered.spans[0].start].encode())
        ways.append({characters[end - head]: number for number, (_, end) in enumerate(
            row.byte_spans, 1) if end - head in characters})
    common = set.intersection(*map(set, ways))
    return {place: tuple(way[place] + (ends and place == len(text)) for way in ways)
            for place in common}
