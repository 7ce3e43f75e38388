"""Which figures may be called best, and which answers right: the only judgements on the page."""

from __future__ import annotations

import math
from typing import Literal, TypeGuard

from taid_vlm.report.data import Column, Example, Figure, Row

Verdict = Literal["best", "tie", ""]
Mark = Literal["right", "partly", "wrong", ""]

SPECTATORS = ("teacher", "start")
# Free-form categories: two good captions rarely share their wording, so none is marked.
FREE_FORM = ("caption", "describe", "description", "free-form", "free form", "open-ended")


def is_finite(value: float | None) -> TypeGuard[float]:
    """True for a number that can be printed and compared."""
    return value is not None and math.isfinite(value)


def has_error(figure: Figure) -> bool:
    """True when the figure carries a usable standard error."""
    return is_finite(figure.stderr) and figure.stderr >= 0


def separated(first: Figure, second: Figure) -> bool:
    """True when two figures lie more than two standard errors of their difference apart.

    The error of the difference is sqrt(se1^2 + se2^2): the two are taken as independent.
    """
    gap = abs((first.value or 0.0) - (second.value or 0.0))
    margin = 2 * math.hypot(first.stderr or 0.0, second.stderr or 0.0)
    # A gap of exactly two errors is a tie, whichever way its last binary digit is rounded.
    return gap > margin and not math.isclose(gap, margin, rel_tol=1e-9)


def verdicts(column: Column, rows: list[Row]) -> list[Verdict]:
    """One verdict per row for one column; see ``_judge`` for the rule."""
    marks: list[Verdict] = ["" for _ in rows]
    paired = [row.values[column.key].verdict if column.key in row.values else None for row in rows]
    if any(verdict is not None for verdict in paired):
        return [verdict or "" for verdict in paired]
    if not column.better:
        return marks
    entries = {
        index: row.values[column.key]
        for index, row in enumerate(rows)
        if row.role not in SPECTATORS and _has_value(row, column)
    }
    for index, verdict in _judge(entries, column.better == "higher").items():
        marks[index] = verdict
    return marks


def _has_value(row: Row, column: Column) -> bool:
    figure = row.values.get(column.key)
    return figure is not None and is_finite(figure.value)


def _judge(entries: dict[int, Figure], higher: bool) -> dict[int, Verdict]:
    """Best when clear of every competitor, else a tie of all that are not clear of the leader.

    Nothing is said of a lone competitor, nor when some standard error is unknown: without it
    neither "better" nor "tied" is a finding.
    """
    if len(entries) < 2 or not all(has_error(figure) for figure in entries.values()):
        return {}
    sign = 1 if higher else -1
    leader = max(entries, key=lambda index: sign * (entries[index].value or 0.0))
    tied = [i for i, fig in entries.items() if i != leader and not separated(fig, entries[leader])]
    return dict.fromkeys((leader, *tied), "tie") if tied else {leader: "best"}


def normalised(text: str) -> str:
    """What two answers are compared by."""
    return text.strip().lower()


def is_free_form(example: Example) -> bool:
    """True when no exact match can be asked for: a caption, or no reference at all."""
    category = example.category.lower()
    return not example.reference.strip() or any(word in category for word in FREE_FORM)


def mark(example: Example, name: str) -> Mark:
    """Right or wrong, by the benchmark's rule or by exact match after strip and lower; empty for
    free-form categories."""
    if example.scores:
        return _by_score(example.scores.get(name))
    return match(example, example.answers.get(name, ""))


def match(example: Example, answer: str) -> Mark:
    """By exact match alone."""
    if is_free_form(example):
        return ""
    return "right" if normalised(answer) == normalised(example.reference) else "wrong"


def _by_score(score: float | None) -> Mark:
    if not is_finite(score):
        return ""
    return "right" if score >= 1 else "partly" if score > 0 else "wrong"


def disagreement(example: Example) -> int:
    """2: some models are right and some wrong; 1: wrong in different ways; 0: one answer.

    Free-form answers count as 0, since they nearly always differ in wording.
    """
    if example.scores:
        return 2 if len(set(example.scores.values())) > 1 else 0
    if is_free_form(example):
        return 0
    answers = {normalised(answer) for answer in example.answers.values()}
    if len(answers) < 2:
        return 0
    return 2 if normalised(example.reference) in answers else 1
