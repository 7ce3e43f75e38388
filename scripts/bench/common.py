"""What the benchmarks share: reading flags, naming an error, and saying what was measured on."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from taid_vlm.errors import TaidError, nearest
from taid_vlm.io.files import write_json, write_text
from taid_vlm.runs.machine import machine, versions

ERROR_LENGTH = 200
Rows = list[dict[str, Any]]


def described(doc: str | None) -> argparse.ArgumentParser:
    """A parser with a script's docstring: its first paragraph, and what follows the command."""
    about = (doc or "").split("\n\n")
    return argparse.ArgumentParser(
        description=about[0], epilog="\n\n".join(about[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter)


def parsed(
    parser: argparse.ArgumentParser, check: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None,
) -> argparse.Namespace:
    """The flags, refused where `check` raises TaidError; `--threads` holds from here on."""
    args = parser.parse_args(arguments)
    try:
        check(args)
    except TaidError as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def check_names(args: argparse.Namespace, valid: Mapping[str, Collection[str]]) -> None:
    """Flags that hold lists of names, and the names there are; raises TaidError."""
    for flag, known in valid.items():
        for name in getattr(args, flag):
            if name not in known:
                raise TaidError(f"--{flag} {name!r}.{nearest(name, known)}")


def check_device(device: str) -> None:
    """Raises TaidError for a device that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise TaidError("--device cuda, but this machine has no CUDA device.")


def carry_out(
    cases: Iterable[Rows], about: Mapping[str, Any],
    heading: Callable[[dict[str, Any]], str], table: Callable[[Rows], str],
    write: Callable[[Rows], None],
) -> Rows:
    """Print every case's rows and write all so far, so that a long run that ends early has left
    some."""
    rows: Rows = []
    for case in cases:
        found = [{**row, "conditions": about} for row in case]
        if not rows:
            print(heading(found[0]))
        print(f"\n{table(found)}", flush=True)
        rows += found
        write(rows)
    return rows


def write_asked(
    rows: Rows, args: argparse.Namespace, page: Callable[[Rows], str]
) -> None:
    """--json, and --markdown by `page`, where they were asked for."""
    if args.json:
        write_json(rows, args.json)
    if args.markdown:
        write_text(page(rows), args.markdown)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(text: str) -> int:
    """A flag's whole number, at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}, but it must be at least 1")
    return value


def numbers(text: str) -> list[int]:
    return [number(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def reason(error: Exception) -> str:
    """An error on one line, for its row."""
    if isinstance(error, ImportError):
        return f"not installed, or another version: {error}"[:ERROR_LENGTH]
    first = (str(error).strip() or "no message").splitlines()[0]
    return (first if isinstance(error, TaidError) else
            f"{type(error).__name__}: {first}")[:ERROR_LENGTH]


def conditions() -> dict[str, Any]:
    """Machine, threads and versions, peers included."""
    found = versions()
    for package in ("trl", "liger-kernel", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**machine(), "processor": _processor(), "versions": found}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
                platform.processor() or platform.machine())
