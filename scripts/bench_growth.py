"""What a whole step of our trainer costs as the work grows, against its floor, on a CPU.

    python scripts/bench_growth.py --json growth.json --markdown growth.md

One thing grows at a time: tokens of a row, rows of the vocabulary, images of a row, processes.
Every point is `bench_step.py --floors` in processes of its own: seconds of
processor time of a whole step, by answer token, and over what no step can do without (both models'
decoders and towers, the heads' four matrix products, the optimizer). Nothing grows faster than its
floor where that ratio stays. Memory is what a step takes at most beside what stands before it. Of
several processes every one has as many rows; figures are those of the first, and adding up
gradients between them is in the step and not in its floor.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# large blocks then go back to the system when they are freed: memory is what is in use
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")

import torch
from bench.common import (
    Rows,
    carry_out,
    check_names,
    conditions,
    described,
    markdown_table,
    names,
    number,
    parsed,
    write_asked,
)
from bench.output import megabytes
from bench.step_floors import floors_of
from bench.step_output import conditions_line
from bench.step_setup import SCALES, Setup
from bench.step_worker import be_quiet

from taid_vlm.errors import TaidError

TEXT = Setup(vocab=32_768, batch_size=1, sequence_length=512)
IMAGE_TOKENS = 64
COLUMNS = ("what grows", "answer tokens", "whole step, CPU s", "ms an answer token", "x floor",
           "x parts", "step's memory", "kB an answer token")


@dataclass(frozen=True)
class Point:
    """One measurement: its place on the axis in words, its problem, in so many processes."""

    title: str
    setup: Setup
    processes: int = 1


def axes(scale: str) -> dict[str, list[Point]]:
    """By what grows."""
    text = replace(TEXT, scale=scale)
    vlm = replace(text, kind="vlm", batch_size=1)
    return {
        "tokens": [Point(f"{n:,} tokens a row", replace(text, sequence_length=n))
                   for n in (128, 512, 2048, 8192)],
        "vocabulary": [Point(f"{v:,} rows of the vocabulary", replace(text, vocab=v))
                       for v in (32_768, 65_536, 131_072, 262_144)],
        "images": [Point(f"{n} images a row", replace(
            vlm, images=n, sequence_length=128 + n * IMAGE_TOKENS,
            answer_fraction=32 / (128 + n * IMAGE_TOKENS))) for n in (0, 1, 2, 4, 8)],
        "processes": [Point(f"{n} processes", text, n) for n in (1, 2)],
    }


def main(arguments: Sequence[str] | None = None) -> Rows:
    """Measure every point, print tables, write what was asked for; returns the rows."""
    args = parsed(make_parser(), lambda args: check_names(args, {"axes": tuple(axes("small"))}),
                  arguments)
    points = axes(args.scale)
    cases = ([measure(axis, point, args.rounds, args.threads) for point in points[axis]]
             for axis in args.axes)
    return carry_out(cases, {**conditions(), "load": os.getloadavg()[0]},
                     conditions_line, table, partial(write_asked, args=args, page=page))


def make_parser() -> argparse.ArgumentParser:
    parser = described(__doc__)
    parser.add_argument("--axes", type=names, default=list(axes("small")), metavar="NAME[,NAME]")
    parser.add_argument("--scale", choices=tuple(SCALES), default="small",
                        help="a built-in pair with random weights")
    parser.add_argument("--rounds", type=number, default=5, metavar="N")
    parser.add_argument("--threads", type=number, default=1, metavar="N", help="of each process")
    for name in ("json", "markdown"):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE")
    return parser


def measure(axis: str, point: Point, rounds: int, threads: int) -> dict[str, Any]:
    """The row of the first process; raises TaidError where one of them ends without it."""
    context = multiprocessing.get_context("spawn")
    answers, port = context.Queue(), _free_port()
    children = [context.Process(target=_child, args=(answers, point, rank, port, rounds, threads))
                for rank in range(point.processes)]
    for child in children:
        child.start()
    for rank, child in enumerate(children):
        if rank == 0:
            row = _answer(answers, child)
        child.join()
    return {**row, "axis": axis, "title": point.title, "processes": point.processes}


def _answer(answers: Any, child: Any) -> dict[str, Any]:
    while child.is_alive() or not answers.empty():
        if not answers.empty():
            return answers.get()
        child.join(0.2)
    raise TaidError(f"a process ended with {child.exitcode} before it had measured anything.")


def _child(
    answers: Any, point: Point, rank: int, port: int, rounds: int, threads: int
) -> None:
    be_quiet()
    torch.set_num_threads(threads)
    if point.processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port),
                       "WORLD_SIZE": str(point.processes), "MASTER_ADDR": "127.0.0.1"}
    [row] = floors_of(point.setup, rounds)
    if rank == 0:
        answers.put(row)


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def table(rows: Rows) -> str:
    """Markdown."""
    return markdown_table(COLUMNS, map(_cells, rows))


def _cells(row: dict[str, Any]) -> list[str]:
    ratios = [f"{row[key]:.2f} ({row[f'{key}_spread'][0]:.2f} to {row[f'{key}_spread'][1]:.2f})"
              for key in ("ratio_to_floor", "ratio_to_parts")]
    tokens = row["answer_tokens"]
    return [row["title"], f"{tokens:,}", f"{row['cpu_seconds']:.3g}",
            f"{1000 * row['cpu_seconds'] / tokens:.2f}", *ratios,
            megabytes(row["step_memory_bytes"]), f"{row['step_memory_bytes'] / 1000 / tokens:,.0f}"]


def page(rows: Rows) -> str:
    """A table for every axis."""
    parts = [table([row for row in rows if row["axis"] == axis])
             for axis in dict.fromkeys(row["axis"] for row in rows)]
    return "\n\n".join([conditions_line(rows[0]), *parts]) + "\n"


if __name__ == "__main__":
    main()
