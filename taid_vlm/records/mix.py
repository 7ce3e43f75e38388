"""Several sources as one data set, in an order that depends on their weights and a seed only.

Where all sources have a length, an epoch is every row of each, `weight` times: a fraction of a
source is drawn once, by the seed. The order in which the trainer shuffles them is its sampler's,
so a run goes on bit for bit. Where one is streamed there are no epochs: rows are drawn in the
proportion of the weights, and a source that ends begins again.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data

from taid_vlm.config.data import DataSource
from taid_vlm.errors import TaidError, with_place
from taid_vlm.records.record import Malformed, Record
from taid_vlm.records.sources import Records, StreamedRecords, open_records, share_of_worker


class MixedRecords(torch.utils.data.Dataset[Record]):
    """Sources with a length.

    Args:
        parts: the sources, each with an `origin`.
        weights: how often a row of each is in the data set.
        seed: draws the rows where a weight is not whole.
        in_turn: rows of all sources alternate, evenly; else one source stands behind the other.
    """

    def __init__(
        self, parts: Sequence[Records], weights: Sequence[float], seed: int, in_turn: bool = True
    ) -> None:
        self.parts = list(parts)
        drawn = [_rows(len(part), weight, (seed, number))
                 for number, (part, weight) in enumerate(zip(parts, weights, strict=True))]
        self._rows = np.concatenate(drawn)
        self._part = np.repeat(np.arange(len(parts), dtype=np.int32), [len(d) for d in drawn])
        if in_turn:  # the k-th of n rows stands at (k + 1/2) / n of the whole
            places = np.concatenate([(np.arange(len(d)) + 0.5) / max(len(d), 1) for d in drawn])
            order = np.argsort(places, kind="stable")
            self._rows, self._part = self._rows[order], self._part[order]

    def __len__(self) -> int:
        return len(self._rows)

    def _place(self, index: int) -> tuple[Records, int]:
        index = range(len(self))[index]
        return self.parts[self._part[index]], int(self._rows[index])

    def __getitem__(self, index: int) -> Record:
        part, row = self._place(index)
        return part[row]

    def __getitems__(self, indices: Sequence[int]) -> list[Record | Malformed]:
        return [part.__getitems__([row])[0] for part, row in map(self._place, indices)]

    def where(self, index: int) -> str:
        part, row = self._place(index)
        return part.where(row)

    @property
    def has_images(self) -> bool:
        return any(part.has_images for part in self.parts)


def _rows(number: int, weight: float, seed: tuple[int, int]) -> np.ndarray:
    """Each of `number` rows `weight` times."""
    whole, wanted = int(weight), round(weight * number)
    rest = wanted - whole * number
    drawn = np.sort(np.random.default_rng(seed).permutation(number)[:rest])
    return np.concatenate([np.tile(np.arange(number), whole), drawn])


class MixedStream(StreamedRecords):
    """Sources of which at least one is streamed; it has no end.

    Args:
        weights: shares of the rows, in proportion.
        seed: shuffles those that have a length, anew for every pass.
    """

    def __init__(
        self, parts: Sequence[Records | StreamedRecords], weights: Sequence[float], seed: int
    ) -> None:
        self.parts, self.weights, self.seed = list(parts), list(weights), seed
        self.block, self.limit = 1, None

    @property
    def has_images(self) -> bool:  # type: ignore[override]
        return any(part.has_images for part in self.parts)

    def set_epoch(self, epoch: int) -> None:
        """Passes are counted within the stream, which has no epochs."""

    def __iter__(self) -> Iterator[Record | Malformed]:
        for read in share_of_worker(self.draws(), self.block):
            yield read()

    def draws(self) -> Iterator[Callable[[], Record | Malformed]]:
        """What reads the rows, in order: always of the source that is furthest behind its share."""
        passes = [self._passes(number) for number in range(len(self.parts))]
        shares = [weight / sum(self.weights) for weight in self.weights]
        drawn = [0] * len(shares)
        for total in itertools.count(1):
            behind = [share * total - count for share, count in zip(shares, drawn, strict=True)]
            number = behind.index(max(behind))
            drawn[number] += 1
            yield next(passes[number])

    def _passes(self, number: int) -> Iterator[Callable[[], Record | Malformed]]:
        part = self.parts[number]
        for turn in itertools.count():
            if isinstance(part, Records):
                order = np.random.default_rng((self.seed, number, turn)).permutation(len(part))
                yield from (partial(_one, part, int(row)) for row in order)
                continue
            part.set_epoch(turn)
            for located in part.located(whole=True):
                yield partial(part.read, located)


def _one(part: Records, row: int) -> Record | Malformed:
    return part.__getitems__([row])[0]


# ----- opening ------------------------------------------------------------------------------

AnyRecords = Records | StreamedRecords | MixedRecords


def open_sources(
    sources: Sequence[DataSource], start_of: Callable[[DataSource], Path | None], side: str,
    seed: int = 0, weighted: bool = True,
) -> AnyRecords:
    """Open the sources of one side of a recipe's data, and check them.

    Args:
        start_of: the folder that a source's relative path starts from.
        side: what messages call it: "data.train".
        seed: draws rows where a weight is not whole, and shuffles beside streams.
        weighted: rows are mixed by weight; else all of them stand one source behind the other.

    Raises:
        TaidError: as `open_records`, and weights that have no effect or are missing.
    """
    several = len(sources) > 1
    for number, source in enumerate(sources):
        if source.weight is not None and not (several and weighted):
            why = "a single source" if weighted else "held-out records, which are all measured"
            raise TaidError(f"{side}: weight = {source.weight:g} has no effect on {why}; take it "
                            "out.")
        if several and weighted and source.weight is None and any(s.streaming for s in sources):
            raise TaidError(f"{side}[{number}]: '{source.shown}' needs a weight, its share of the "
                            "rows: the size of a streamed source is not known.")
    parts = [_opened(source, start_of, f"{side}[{number}]" if several else side)
             for number, source in enumerate(sources)]
    if not several:
        return parts[0]
    for part, name in zip(parts, names(sources), strict=True):
        part.origin = name
    weights = [1 if source.weight is None else source.weight for source in sources]
    lengths = [part for part in parts if isinstance(part, Records)]
    if len(lengths) < len(parts):
        return MixedStream(parts, weights, seed)
    mixed = MixedRecords(lengths, weights, seed, in_turn=weighted)
    if not len(mixed):
        raise TaidError(f"{side}: with these weights no source has a row; raise them.")
    return mixed


def _opened(source: DataSource, start_of: Callable[[DataSource], Path | None], place: str
            ) -> Records | StreamedRecords:
    try:
        return open_records(source, start_of(source))
    except TaidError as error:
        error = with_place(error, place, instead_of="data")
        message = error.message.replace("data.train.columns", f"{place}.columns")
        raise type(error)(message, mend=error.mend, code=error.code, reasons=error.reasons
                          ) from error


def names(sources: Sequence[DataSource]) -> list[str]:
    """What each of several sources is called: its path's last part, or more where two are alike."""
    short = [Path(source.paths[0]).name + (f" {source.name}" if source.name else "")
             for source in sources]
    whole = [f"{source.shown} {source.name or ''} {source.split}".replace("  ", " ")
             for source in sources]
    chosen = [name if short.count(name) == 1 else long
              for name, long in zip(short, whole, strict=True)]
    seen: Counter[str] = Counter()
    for index, name in enumerate(chosen):
        seen[name] += 1
        if seen[name] > 1:
            chosen[index] = f"{name} ({seen[name]})"
    return chosen


def parts_of(records: Any) -> list[Any]:
    """The sources of a data set that is mixed, or the data set."""
    return list(getattr(records, "parts", [records]))
