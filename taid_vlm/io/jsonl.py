"""JSON lines: one object a line; a line that is none is named by file and number."""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from taid_vlm.errors import RecordError


def dump_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line per row, as text."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parse_json(text: str | bytes, where: str) -> Any:
    """Any JSON; raises RecordError, which names `where`, also for one that is nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where}: not valid JSON: {error}") from None


def parse_line(line: str | bytes, where: str) -> dict[str, Any]:
    """One line's object; raises RecordError."""
    row = parse_json(line, where)
    if not isinstance(row, dict):
        raise RecordError(f"{where}: a line must be an object {{...}}.")
    return row


def need(row: dict[str, Any], where: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The row, whose columns are there and of these types; raises RecordError."""
    for name, kind in kinds.items():
        if name not in row:
            raise RecordError(f"{where}: '{name}' is missing.")
        if not isinstance(row[name], kind):
            raise RecordError(f"{where}: {name} = {row[name]!r:.60} is of another kind.")
    return row


def read_lines(path: Path, torn: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE:NUMBER", object) of every line that is not blank, one at a time.

    Args:
        torn: the last line may have been cut off by an interruption; without its end it is left
            out.

    Raises:
        RecordError: a line that is no object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and (line.endswith(b"\n") or not torn):
                yield (where := f"{path}:{number}"), parse_line(line, where)


class JsonLines:
    """Random access to a JSONL file, which is passed over once for the places of its lines; a row
    is parsed when it is read."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name  # what messages call it
        self._starts, self._numbers = array("q"), array("q")  # of lines that are not blank
        start = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._starts.append(start)
                    self._numbers.append(number)
                start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def line(self, index: int) -> int:
        """The row's line number, from 1."""
        return self._numbers[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = self._starts[index]
        end = self._bytes.find(b"\n", start)
        line = self._bytes[start : end if end >= 0 else len(self._bytes)]
        return parse_line(line, f"{self.name}:{self.line(index)}")

    @cached_property
    def _bytes(self) -> mmap.mmap:
        """Mapped once: workers that are forked read at places of their own."""
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_bytes"}
