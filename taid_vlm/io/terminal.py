"""Text for a terminal: nothing in it steers the terminal, tables fit into it."""

from __future__ import annotations

import io
import re
import shutil
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

UNLIMITED = 10_000  # columns where nobody looks at them: a pipe, a file
# control characters but tab and line feed, marks that turn the direction of text, half surrogates
_STEERING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

Cell = str | tuple[str, str]  # with rich's style


def printable(text: str) -> str:
    r"""The text with control characters as visible escapes, for example \x1b."""
    return _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def human(size: int) -> str:
    """31.2 GB (10^9 bytes), 12.3 MB."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size} B"


@dataclass
class Pace:
    """Says once how long all of something takes, from its second batch on: in the first everything
    runs for the first time.

    of: how many there are. batch: how many make a batch. remark: behind the time. speaks: whether
    this process is the one that says it.
    """

    of: int
    batch: int
    remark: str
    speaks: bool = True
    count: int = 0
    first: tuple[int, float] | None = None  # how many the first batch was, and when it was done

    def add(self, number: int) -> None:
        """So many more are done."""
        self.count += number
        if not self.speaks or self.count < self.batch:
            return
        if self.first is None:
            self.first = self.count, time.perf_counter()
        elif self.count >= self.first[0] + self.batch:
            each = (time.perf_counter() - self.first[1]) / (self.count - self.first[0])
            print(f"time          about {each * self.of:,.0f} s{self.remark}", flush=True)
            self.speaks = False


def table(
    rows: Sequence[Sequence[Cell]], right: Collection[int] = (), width: int | None = None,
    colour: bool | None = None,
) -> str:
    """Rows in columns; cells that do not fit are folded.

    Args:
        right: numbers of the columns that are flush right.
        width: of the whole; by default the terminal's, or unlimited where stdout is none.
        colour: with the escape codes of the cells' styles; by default where stdout is a terminal.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colour = sys.stdout.isatty() if colour is None else colour
    if width is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else UNLIMITED
    grid = Table(box=None, pad_edge=False, show_header=False)
    for number in range(max(map(len, rows))):
        grid.add_column(justify="right" if number in right else "left", overflow="fold")
    for row in rows:  # a style of its own would go on over the padding
        grid.add_row(*(Text.assemble((printable(cell), "") if isinstance(cell, str) else
                                     (printable(cell[0]), cell[1])) for cell in row))
    console = Console(file=io.StringIO(), width=width, force_terminal=colour,
                      color_system="standard" if colour else None)
    with console.capture() as capture:
        console.print(grid)
    return re.sub(r" *(\x1b\[0m)? *$", r"\1", capture.get(), flags=re.MULTILINE).strip("\n")
