"""Errors a user can mend: one clear message with the key or file, the value, and the way out."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


class TaidError(ValueError):
    """Base of every error this package raises on purpose; its text is `message` and `mend`.

    Args:
        message: what is wrong, with the key or file and the value.
        mend: what to do about it, as a sentence of its own.
        code: a name of the mistake for programs, for `taid-vlm inspect` has more to say of some.
        reasons: of an error about records, why they are left out (`SampleDropped.reason`).

    reason: what a record that it costs is counted under, where it costs a record.

    Example:
        >>> from taid_vlm import TaidError, load_recipe
        >>> try:
        ...     load_recipe("not_there.yaml")
        ... except TaidError as error:
        ...     print(error)
        recipe 'not_there.yaml' does not exist.
    """

    reason = "refused by the processor"

    def __init__(
        self, message: str, *, mend: str = "", code: str = "", reasons: Iterable[str] = ()
    ) -> None:
        message, mend = (text.encode(errors="backslashreplace").decode()  # half characters of data
                         for text in (message, mend))
        super().__init__(f"{message} {mend}" if mend else message)
        self.message, self.mend, self.code, self.reasons = message, mend, code, tuple(reasons)


class RecipeError(TaidError):
    """A recipe, an override or an argument is wrong.

    Example:
        >>> from taid_vlm import RecipeError, parse_objective
        >>> try:
        ...     parse_objective({"name": "taid", "t_strat": 0.2})
        ... except RecipeError as error:
        ...     print(str(error).partition(" Valid:")[0])
        objective 'taid' has no key 't_strat'. Did you mean 't_start'?
    """


class RecordError(TaidError):
    """A record cannot be understood; the message names file and line.

    Example:
        >>> from taid_vlm import RecordError
        >>> from taid_vlm.records import parse_record
        >>> try:
        ...     parse_record({"question": "what?", "answer": 3}, "train.jsonl:12")
        ... except RecordError as error:
        ...     print(error)
        train.jsonl:12: answer must be text, got 3.
    """

    reason = "malformed record"


class HalfCharacterError(RecordError):
    """A text that is no Unicode, cut in the middle of a character: it costs its record only."""

    reason = "half a character"


class AlignmentError(TaidError):
    """Teacher and student cannot be compared token by token.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from taid_vlm import AlignmentError
        >>> from taid_vlm.adapters import make_adapter
        >>> from taid_vlm.alignment import pair_models
        >>> from taid_vlm.demo.demo import data_folder
        >>> models = data_folder() / "models"
        >>> teacher, student = (
        ...     make_adapter(AutoTokenizer.from_pretrained(models / f"words-{role}"), role)
        ...     for role in ("teacher", "student"))
        >>> try:
        ...     pair_models(teacher, student, 512, 503, alignment="exact")
        ... except AlignmentError as error:
        ...     print(error)
        alignment: exact, but the two vocabularies are not the same (500 shared tokens; ...). Use
        alignment: shared (or auto).
    """

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


def with_place(error: TaidError, place: str, instead_of: str = "") -> TaidError:
    """The same error as it is told from further away: of the same type, mend, code and reasons.

    Args:
        place: what the message begins with from now on: "stages 'one'", "data.train".
        instead_of: a vaguer place that gives way to it; a message that does not begin with that
            names a better one (a file and its line) and stays as it is.
    """
    message = f"{place}: {error.message}"
    if instead_of:
        vague = error.message.startswith(f"{instead_of}: ")
        message = place + error.message.removeprefix(instead_of) if vague else error.message
    return type(error)(message, mend=error.mend, code=error.code, reasons=error.reasons)


MANY = 40  # more names than this would bury the message


def nearest(name: object, valid: Iterable[str], instead: Sequence[str] = ()) -> str:
    """Return the tail of an error message: the nearest valid name, then the others if few.

    Args:
        instead: what is more likely meant than any of the valid names, at most a few.
    """
    names = sorted(valid)
    match = instead or difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    meant = "' or '".join(match)
    hint = f" Did you mean '{meant}'?" if match else ""
    return f"{hint} Valid: {', '.join(names)}." if len(names) <= MANY else hint


def one_of(key: str, value: object, valid: Iterable[str]) -> None:
    """Raise TaidError where a value is none of the valid names."""
    names = list(valid)
    if value not in names:
        raise TaidError(f"{key} = '{value}'.{nearest(value, names)}")


def at_least(key: str, value: int | None, least: int) -> None:
    """Raise TaidError where a value (None: not given) is too small."""
    if value is not None and value < least:
        raise TaidError(f"{key} = {value}, but it must be at least {least}.")


def nearest_sibling(path: Path, pattern: str = "*") -> str:
    """The same for a path that does not exist: what lies beside it; "" where nothing does."""
    names = [p.name for p in path.parent.glob(pattern)] if path.parent.is_dir() else []
    return nearest(path.name, names) if names else ""
