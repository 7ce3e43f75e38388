"""What the benchmarks share: reading flags, naming an error, and saying what was measured on."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from taid_vlm.errors import TaidError
from taid_vlm.results import machine, versions

ERROR_LENGTH = 200


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
