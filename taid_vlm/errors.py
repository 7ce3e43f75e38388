"""Errors a user can mend: one clear message with the key or file, the value, and the way out."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class TaidError(ValueError):
    """Base of every error this package raises on purpose.

    reason: what a record that it costs is counted under, where it costs a record.
    """

    reason = "refused by the processor"


class RecipeError(TaidError):
    """A recipe, an override or an argument is wrong."""


class RecordError(TaidError):
    """A record cannot be understood; the message names file and line."""

    reason = "malformed record"


class AlignmentError(TaidError):
    """Teacher and student cannot be compared token by token."""

    reason = "cannot be aligned"


class SampleDropped(Exception):
    """One record cannot be used; it is counted under `reason` and reported, never lost silently."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


Problem = TaidError | SampleDropped  # what can cost a record


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; YAML's true and false are none."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


MANY = 40  # more names than this would bury the message


def nearest(name: object, valid: Iterable[str]) -> str:
    """Return the tail of an error message: the nearest valid name, then the others if few."""
    names = sorted(valid)
    match = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean '{match[0]}'?" if match else ""
    return f"{hint} Valid: {', '.join(names)}." if len(names) <= MANY else hint


def nearest_sibling(path: Path, pattern: str = "*") -> str:
    """The same for a path that does not exist: what lies beside it; "" where nothing does."""
    names = [p.name for p in path.parent.glob(pattern)] if path.parent.is_dir() else []
    return nearest(path.name, names) if names else ""
