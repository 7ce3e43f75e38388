"""A benchmark's data in the hub's own columns, with messages that name file, row and column."""

from __future__ import annotations

import ast
import contextlib
import copy
import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from taid_vlm.errors import RecordError, nearest
from taid_vlm.records import ImageRef, Records
from taid_vlm.records.images import LONGEST_NAME, MAX_PIXELS, no_image, stored_image
from taid_vlm.records.videos import VideoRef, stored_video

logger = logging.getLogger(__name__)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NEEDED = object()


class Row(Mapping[str, Any]):
    """One row; columns that are empty or None count as absent.

    Args:
        where: what messages call the row, for example "mmstar.parquet[12]".
        root: folder that relative image paths start from.
        by_index: places of the rows of `records` by their column `index`; VLMEvalKit's tables
            write a shared image once, and the index of its row elsewhere.
        number: its place in the data, from 0.
        records: the data, where images can be left until they are looked at.
    """

    def __init__(self, values: Mapping[str, Any], where: str, root: Path | None = None,
                 by_index: Mapping[str, int] | None = None, number: int = 0,
                 records: Records | None = None) -> None:
        self.values_ = {key: x for key, x in values.items() if not _empty(x)}
        self.where, self.root, self.by_index = where, root, by_index or {}
        self.number, self.records = number, records

    def __getitem__(self, column: str) -> Any:
        return self.values_[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def without(self, nothing: Any) -> Row:
        """The same row; columns that hold `nothing` count as absent."""
        other = copy.copy(self)
        other.values_ = {key: x for key, x in self.values_.items() if x != nothing}
        return other

    def need(self, column: str) -> Any:
        """The column's value; raises RecordError where it is absent."""
        if column not in self.values_:
            found = ", ".join(sorted(self.values_)) or "none"
            raise RecordError(f"{self.where}: column '{column}' is missing (found: {found})."
                              f"{nearest(column, self.values_)}")
        return self.values_[column]

    def _value(self, column: str, default: Any) -> Any:
        return self.need(column) if default is _NEEDED else self.values_.get(column, default)

    def first(self, *columns: str) -> str:
        """The first of those columns that is there; the first of all where none is."""
        return next((column for column in columns if column in self.values_), columns[0])

    def text(self, column: str, default: Any = _NEEDED) -> str:
        """As text, stripped; numbers are written out (2.0 from a table of floats as "2.0")."""
        return str(self._value(column, default)).strip()

    def tags(self, *columns: str) -> dict[str, str]:
        """Those of the columns that are there, as text."""
        return {column: self.text(column) for column in columns if column in self.values_}

    def id(self, *columns: str) -> str:
        """The first of those columns that is there, or else the row's place in the data."""
        return self.text(self.first(*columns), self.number)

    def integer(self, column: str, default: Any = _NEEDED) -> int:
        """A whole number, also from text and from a float without fraction."""
        value = self._value(column, default)
        try:
            if float(value) == int(float(value)):
                return int(float(value))
        except (TypeError, ValueError, OverflowError):
            pass
        raise RecordError(f"{self.where}: {column} must be a whole number, got {value!r:.60}.")

    def texts(self, column: str) -> list[str]:
        """A list of texts, also where the hub's column holds one written as Python or JSON; [] if
        absent."""
        return [str(item) for item in self._list(self.values_.get(column, []))]

    def golds(self, *columns: str, more_than: int = 0) -> tuple[str, ...]:
        """Every accepted answer, from the first of those columns that is there.

        Items may be objects with their text under `answer`, as VQAv2 has them.

        Args:
            more_than: with so many people's answers or fewer, none could be fully right.

        Raises:
            RecordError: too few answers, or a blank one.
        """
        column = self.first(*columns)
        value = _answer(self.need(column))  # {"answer": [...]}
        found = [_answer(item) for item in self._list(value)]
        if not found or any(map(_empty, found)):
            raise RecordError(f"{self.where}: {column} holds a blank answer or none: "
                              f"{value!r:.60}.")
        if len(found) <= more_than:
            raise RecordError(f"{self.where}: {len(found)} answers of people; VQA accuracy leaves "
                              f"one of them out and asks for {more_than} others (usual: 10). A "
                              "file with one right answer a question is of the type short_answer.")
        return tuple(str(item).strip() for item in found)

    def options(self, letters: str = LETTERS) -> tuple[str, ...]:
        """The columns A, B, C ... up to the first that is absent."""
        return tuple(map(self.text, itertools.takewhile(self.values_.__contains__, letters)))

    def image(self, column: str = "image") -> ImageRef:
        """The image of a column: as a record may hold it, alone in a list, or the index of another
        row; `image_path` where there is no `image`."""
        column = self._picture(column)
        self.need(column)
        listed = self._pictures(column)
        if len(listed) != 1:
            raise RecordError(f"{self.where}: {column} holds {len(listed)} images; there must be "
                              "one.")
        return self._image(listed[0], column, 0)

    def video(self, *values: Any) -> VideoRef:
        """A video as a record may hold it; of several files, the first that is there."""
        stored = [stored_video(value, self.root) for value in values]
        first = next((x for x in stored if isinstance(x, Path) and x.is_file()), stored[0])
        return VideoRef(first, self.where, getattr(self.records, "max_pixels", MAX_PIXELS),
                        sampling=getattr(self.records, "video", None))

    def images(self, *columns: str) -> tuple[ImageRef, ...]:
        """The images of those columns that are there; a column may hold a list, also as text."""
        named = map(self._picture, columns or ("image",))
        return tuple(self._image(value, column, place) for column in named
                     for place, value in enumerate(self._pictures(column)) if not no_image(value))

    def _picture(self, column: str) -> str:
        """VLMEvalKit's tables name files in `image_path` where they hold no images."""
        return self.first("image", "image_path") if column == "image" else column

    def _pictures(self, column: str) -> Sequence[Any]:
        """What a column holds or the row that it names by its index, as a list."""
        value = self.values_.get(column, [])
        if isinstance(value, str) and self.records is not None and value in self.by_index:
            other = self.records.columns_of(self.by_index[value])
            value = other.get("image") or other.get(column) or value
        return self._list(value)

    @staticmethod
    def _list(value: Any) -> Sequence[Any]:
        """A list, also of a single thing and of one that is written as text."""
        value = _literal(value) if isinstance(value, str) else value
        return value if isinstance(value, (list, tuple)) else [value]

    def _image(self, value: Any, column: str, place: int) -> ImageRef:
        found = self._stored(value)
        if found is None:
            raise RecordError(f"{self.where}: {column} holds no image.")
        if isinstance(found, bytes) and self.records is not None:
            found = partial(_image_in_its_row, self.records, self.number, self.by_index, column,
                            place)
        return ImageRef(found, self.where, getattr(self.records, "max_pixels", MAX_PIXELS))

    def stored_image(self, column: str, place: int) -> Any:
        """Bytes, PIL image or path: what stands at a place of a column's list."""
        self.need(column)
        return self._stored(self._pictures(column)[place])

    def _stored(self, value: Any) -> Any:
        """A file lies where its path says, or in `images/NAME/` beside VLMEvalKit's NAME.tsv."""
        found = stored_image(value, self.root)
        if isinstance(found, Path) and self.root is not None and len(str(value)) <= LONGEST_NAME:
            table = self.where.partition("[")[0].partition(":")[0]
            other = self.root / "images" / Path(table).stem / str(value)
            with contextlib.suppress(OSError):
                return found if found.is_file() or not other.is_file() else other
        return found


def _image_in_its_row(records: Records, number: int, by_index: Mapping[str, int], column: str,
                      place: int) -> Any:
    """Bytes of an image that stay in their file: a benchmark's images are gigabytes."""
    row = Row(records.columns_of(number), records.where(number), records.root, by_index, number,
              records)
    return row.stored_image(column, place)


def places_by_index(rows: Records) -> dict[str, int]:
    """The first row of a table for every value of its column `index`."""
    places: dict[str, int] = {}
    for number in range(len(rows)):
        places.setdefault(str(rows.columns_of(number).get("index")), number)
    return places


def _answer(value: Any) -> Any:
    return value.get("answer") if isinstance(value, Mapping) else value


def _empty(value: Any) -> bool:
    """None, blank text, or the NaN that a table of floats writes for nothing."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _literal(text: str) -> Any:
    if not text.lstrip().startswith("["):  # Python reads "1,000" and "(3, 4)" as tuples
        return [text]
    for read in (ast.literal_eval, json.loads):
        try:
            value = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, (list, tuple)):
            return list(value)
    return [text]

