"""Rows of one local file: at random places, or in order without an index (`Stream`).

JSON lines, JSON, CSV, TSV and tar (WebDataset); lines also behind gzip and zstd. A row that cannot
be read raises RecordError when it is read, wherever it stands.
"""

from __future__ import annotations

import bisect
import contextlib
import csv
import functools
import gzip
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, cast

from taid_vlm.config.data import COMPRESSED, DELIMITERS, FILE_TYPES, JSON_LINES, TAR
from taid_vlm.errors import RecordError, TaidError, nearest
from taid_vlm.io.jsonl import JsonLines, parse_json, parse_line

LONGEST_CELL = 2**28  # characters of CSV and TSV
IMAGE_KEYS = ("image", "images", "image_url", "path", "url")

# what a row is called, where its relative paths start, and what reads it
Located = tuple[str, Path | None, Callable[[], Any]]


def kind_of(path: Path) -> str:
    """The ending that says how a file is read: that before .gz or .zst."""
    end = path.suffix.lower()
    kind = Path(path.stem).suffix.lower() if end in COMPRESSED else end
    if end in COMPRESSED and kind not in (*JSON_LINES, *DELIMITERS):
        raise TaidError(f"{path}: of compressed files, only lines are read "
                        f"({', '.join((*JSON_LINES, *DELIMITERS))} before '{end}'); unpack it.")
    if kind not in FILE_TYPES:
        raise TaidError(f"{path}: file type '{path.suffix}' is not supported."
                        f"{nearest(path.suffix, FILE_TYPES)}")
    return kind


def file_rows(path: Path) -> Any:
    """Rows with a length; a compressed file is unpacked into the cache of `datasets` once."""
    kind = kind_of(path)
    if kind in JSON_LINES:
        lines = JsonLines(_unpacked(path))
        lines.name = path.name
        return lines
    if kind in DELIMITERS:
        csv.field_size_limit(LONGEST_CELL)  # a cell may hold an image in base64
        with _text(path) as file:
            return [_cells(row) for row in csv.DictReader(file, delimiter=DELIMITERS[kind])]
    return TarSamples(path) if kind == TAR else json_rows(path)


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """Every cell stays text: "2" and "None" are answers too."""
    return {key: value or None for key, value in row.items()}


def json_rows(path: Path) -> list[Any] | JsonLines:
    try:
        rows = parse_json(path.read_bytes(), path.name)
    except RecordError:
        with contextlib.suppress(RecordError, IndexError):  # JSON lines under another name
            lines = JsonLines(path)
            _ = lines[0]
            return lines
        raise
    if isinstance(rows, dict) and rows and all(isinstance(row, dict) for row in rows.values()):
        rows = list(rows.values())  # {id: row}, as some benchmarks are written
    if not isinstance(rows, list) or (rows and not any(isinstance(row, dict) for row in rows)):
        raise RecordError(f"{path.name}: must hold a list of objects [{{...}}, ...].")
    return rows


# ----- several files ------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Some rows of a file: what they are called, and where relative paths start."""

    rows: Any
    label: str
    root: Path | None
    indices: range

    def where(self, index: int) -> str:
        """What messages call a row: file and line where there are lines."""
        line = getattr(self.rows, "line", None)
        if line:
            return f"{self.label}:{line(index)}"
        if isinstance(self.rows, (Joined, TarSamples)):
            return self.rows.where(index)
        return f"{self.label}[{index}]"


class Joined:
    """Rows of several files, one behind the other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self._ends = list(accumulate(len(part.indices) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _place(self, index: int) -> tuple[Part, int]:
        number = bisect.bisect_right(self._ends, index)
        part = self.parts[number]
        return part, part.indices[index - (self._ends[number - 1] if number else 0)]

    def __getitem__(self, index: int) -> Any:
        part, place = self._place(index)
        return part.rows[place]

    def root(self, index: int) -> Path | None:
        return self._place(index)[0].root

    def where(self, index: int) -> str:
        part, place = self._place(index)
        return part.where(place)

    def cut(self, ranges: Sequence[range]) -> Joined:
        """Only these stretches of all rows, in their order."""
        starts = [0, *self._ends]
        pairs = [(wanted, part, start) for wanted in ranges
                 for part, start in zip(self.parts, starts, strict=False)]
        return Joined([replace(part, indices=part.indices[max(wanted.start - start, 0):
                                                          max(wanted.stop - start, 0)])
                       for wanted, part, start in pairs])


# ----- in order -----------------------------------------------------------------------------


class Stream:
    """Rows of files in order, each read once for every pass.

    Args:
        root: where relative paths start; None: in the folder of their file.
    """

    def __init__(self, paths: Sequence[Path], root: Path | None) -> None:
        self.paths, self.root = list(paths), root

    def __iter__(self) -> Iterator[Located]:
        for path in self.paths:
            for where, read in _in_order(path):
                yield where, self.root or path.parent, read


def _in_order(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    kind = kind_of(path)
    if kind in JSON_LINES:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path.name}:{number}"
                    yield where, functools.partial(parse_line, line, where)
    elif kind in DELIMITERS:
        csv.field_size_limit(LONGEST_CELL)
        with _text(path, "surrogateescape") as text:  # a row that is not UTF-8 is counted
            for index, row in enumerate(csv.DictReader(text, delimiter=DELIMITERS[kind])):
                yield f"{path.name}[{index}]", functools.partial(_cells, row)
    else:
        samples = TarSamples(path)
        for index in range(len(samples)):
            yield samples.where(index), functools.partial(samples.__getitem__, index)


# ----- compressed ---------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked; raises TaidError where they break off."""
    end = path.suffix.lower()
    try:
        if end == ".zst":  # pyarrow has zstd in every build that `datasets` installs
            import pyarrow

            with pyarrow.OSFile(str(path)) as raw, io.BufferedReader(
                    pyarrow.CompressedInputStream(raw, "zstd")) as file:
                yield cast(BinaryIO, file)
        elif end == ".gz":
            with gzip.open(path) as unpacked:
                yield cast(BinaryIO, unpacked)
        else:
            with path.open("rb") as plain:
                yield plain
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        if end not in COMPRESSED or isinstance(error, FileNotFoundError):
            raise
        raise TaidError(f"data: '{path.name}' cannot be unpacked: {error}; is it whole?") from None


@contextlib.contextmanager
def _text(path: Path, errors: str = "strict") -> Iterator[io.TextIOWrapper]:
    with _opened(path) as file:
        yield io.TextIOWrapper(file, encoding="utf-8-sig", newline="", errors=errors)


def _unpacked(path: Path) -> Path:
    """The file itself, or its unpacked copy, which is made anew when the file has changed."""
    if path.suffix.lower() not in COMPRESSED:
        return path
    import datasets

    state = path.stat()
    key = f"{path.resolve()} {state.st_size} {state.st_mtime_ns}".encode()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "taid_vlm"
    copy = folder / f"{hashlib.sha256(key).hexdigest()[:32]}.jsonl"
    if copy.exists():
        return copy
    folder.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=folder)
    try:
        with os.fdopen(number, "wb") as target, _opened(path) as source:
            shutil.copyfileobj(source, target, 2**20)
        os.replace(name, copy)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return copy


# ----- tar ----------------------------------------------------------------------------------


class TarSamples:
    """Samples of a WebDataset's shard: members that share a name up to its first dot.

    A row has a column per ending, `json` parsed; an image that it names by a member's name is that
    member. Members are read at their places: only their headers are passed over when it is opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members: dict[str, tuple[int, int]] = {}  # name -> place and length of its bytes
        samples: dict[str, list[str]] = defaultdict(list)
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    folder, slash, name = member.name.rpartition("/")
                    if member.isfile() and "." in name.lstrip("."):
                        self._members[member.name] = (member.offset_data, member.size)
                        samples[folder + slash + name.split(".", 1)[0]].append(member.name)
        except tarfile.TarError as error:
            raise TaidError(f"data: '{path.name}' cannot be read as tar: {error}.") from None
        self._samples = list(samples.items())

    def __len__(self) -> int:
        return len(self._samples)

    def where(self, index: int) -> str:
        return f"{self.path.name}/{self._samples[index][0]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        key, names = self._samples[index]
        row: dict[str, Any] = {"__key__": key}
        used: set[str] = set()  # members that the row's JSON names
        for name in names:
            ending, where = name[len(key) + 1 :], f"{self.path.name}/{name}"
            row[ending] = data = self._read(name)
            if ending == "json":
                row[ending] = self._with_members(parse_line(data, where), key, used)
            elif ending == "txt":
                try:
                    row[ending] = data.decode()
                except UnicodeDecodeError:
                    raise RecordError(f"{where}: not UTF-8.") from None
        return {ending: value for ending, value in row.items()
                if ending == "__key__" or f"{key}.{ending}" not in used}

    def _read(self, name: str) -> bytes:
        place, length = self._members[name]
        with self.path.open("rb") as file:
            file.seek(place)
            return file.read(length)

    def _with_members(self, value: Any, key: str, used: set[str]) -> Any:
        """The same with every name of a member in the place of an image as that member's bytes."""
        if isinstance(value, list):
            return [self._with_members(item, key, used) for item in value]
        if not isinstance(value, dict):
            return value
        return {name: self._image(inner, key, used) if name in IMAGE_KEYS else
                self._with_members(inner, key, used) for name, inner in value.items()}

    def _image(self, value: Any, key: str, used: set[str]) -> Any:
        if isinstance(value, list):
            return [self._image(item, key, used) for item in value]
        if not isinstance(value, str):
            return self._with_members(value, key, used)
        folder = key.rpartition("/")[0]
        name = next((name for name in (value, f"{folder}/{value}") if name in self._members), "")
        if not name:
            return value
        used.add(name)
        return self._read(name)
