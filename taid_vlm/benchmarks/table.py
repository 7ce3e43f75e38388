"""An evaluation's figures for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from taid_vlm.io.terminal import table

HEADER = ("model", "task", "rule", "figure", "value", "n", "unread", "unanswered", "cut",
          "seconds")


def as_text(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per figure of every model and task, and below it what the numbers do not say.

    "unread" counts answers that the rule could not read, "unanswered" questions without an answer
    (both are wrong in every figure), "cut" answers that their limit of tokens ended.
    """
    rows = [row for name, each in results.items()
            for row in [*_rows(name, each["tasks"]), *_suites(name, each.get("suites", {}))]]
    head = [(name, "bold") for name in HEADER]
    return "\n".join([table([head, *rows], right=(4, 5, 6, 7, 8, 9)), *_notes(results),
                      *_left_out(results), *_unscored(results), *_missing(results)])


def _suites(name: str, suites: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Averages over the tasks of a leaderboard."""
    return [(name, suite, "", figure, shown(found, 1), str(found["n"]), "", "", "", "")
            for suite, entry in suites.items()
            for figure, found in entry["figures"].items()]


def _left_out(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rows of the data that are no part of a benchmark, told once per task."""
    told = {task: ", ".join(f"{count} with {reason}" for reason, count in left_out.items())
            for each in results.values() for task, entry in each["tasks"].items()
            if (left_out := entry.get("left_out"))}
    return [f"{task}: rows left out: {counts}" for task, counts in told.items()]


def _notes(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why questions have no answer, and what was taken off as thoughts."""
    notes = []
    for name, each in results.items():
        for task, entry in each["tasks"].items():
            reasons = [f"{number:g} x {reason}"
                       for reason, number in entry.get("unanswered", {}).items()]
            if reasons:
                notes.append(f"{name}, {task}: unanswered: {', '.join(reasons)}")
            if entry.get("guesses") and entry["parse_failures"]:
                notes.append(f"{name}, {task}: {entry['parse_failures']:g} unread answers were "
                             f"guessed at random, as the rule '{entry['rule']}' has it")
            notes += [f"{name}, {task}: {note}" for note in _thoughts(entry.get("thoughts", {}))]
    return notes


def _thoughts(entry: Mapping[str, Any]) -> Iterator[str]:
    if not entry.get("answers"):
        return
    unit = "tokens" if "tokens" in entry else "characters"
    by = ", ".join(f"{number} by {rule}" for rule, number in entry["answers"].items())
    yield (f"thoughts taken off ({entry['rule']} {entry['version']}): {by}; of "
           f"{entry[unit]['mean']:.0f} {unit} on average, at most {entry[unit]['max']}")
    if entry["cut"]:
        yield f"{entry['cut']} answers were cut inside their thought: raise --max-new-tokens"


def _unscored(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Answers that are in no figure, by model and task."""
    return [f"{name}: {task}: {sum(reasons.values()):g} of {entry['n']} answers have no score: "
            + "; ".join(f"{count:g}: {reason}" for reason, count in reasons.items())
            for name, each in results.items() for task, entry in each["tasks"].items()
            if (reasons := entry.get("unscored"))]


def _missing(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What keeps a leaderboard's average from being printed."""
    return [f"{name}: {suite}: no average, missing: " + ", ".join(
                f"{task} ({why})" for task, why in missing.items())
            for name, each in results.items() for suite, entry in each.get("suites", {}).items()
            if (missing := entry.get("missing"))]


def _rows(name: str, tasks: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for task, entry in tasks.items():
        first = (name, task, f"{entry['rule']} {entry['rule_version']}")
        unanswered = sum(entry.get("unanswered", {}).values())
        last = (f"{entry['parse_failures']:g}", f"{unanswered:g}",
                f"{entry['cut']:g}" if "cut" in entry else "", f"{entry['seconds']:.1f}")
        for figure, found in entry["figures"].items():
            value = shown(found, entry.get("decimals", 1))
            rows.append((*first, figure, value, str(found["n"]), *last))
            first, last = ("", "", ""), ("", "", "", "")
    return rows


def shown(figure: Mapping[str, Any], decimals: int | None) -> str:
    """A share of 1 in per cent, or (decimals None) points as they are; with its 95 % interval, or
    its standard error where that is all there is."""
    scale, digits = (1.0, 2) if decimals is None else (100.0, decimals)
    value, stderr, low, high = (
        "" if figure.get(key) is None or math.isnan(figure[key]) else
        f"{scale * figure[key]:.{digits}f}" for key in ("value", "stderr", "low", "high"))
    if not value:
        return "-"
    return f"{value} [{low}, {high}]" if low else f"{value} ± {stderr}" if stderr else value
