"""An evaluation's figures for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from taid_vlm.io.terminal import table

HEADER = ("model", "task", "rule", "figure", "value", "n", "unread", "seconds")


def as_text(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per figure of every model and task; "unread" counts answers that could not be read
    or that are missing, each of which is wrong in every figure."""
    rows = [row for name, each in results.items()
            for row in [*_rows(name, each["tasks"]), *_suites(name, each.get("suites", {}))]]
    head = [(name, "bold") for name in HEADER]
    return "\n".join([table([head, *rows], right=(4, 5, 6, 7)), *_left_out(results),
                      *_unscored(results), *_missing(results)])


def _suites(name: str, suites: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Averages over the tasks of a leaderboard."""
    return [(name, suite, "", figure, shown(found["value"], found["stderr"], 1), str(found["n"]),
             "", "") for suite, entry in suites.items()
            for figure, found in entry["figures"].items()]


def _left_out(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rows of the data that are no part of a benchmark, told once per task."""
    told = {task: ", ".join(f"{count} with {reason}" for reason, count in left_out.items())
            for each in results.values() for task, entry in each["tasks"].items()
            if (left_out := entry.get("left_out"))}
    return [f"{task}: rows left out: {counts}" for task, counts in told.items()]


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
        unread = entry["parse_failures"] + sum(entry.get("unanswered", {}).values())
        last = (f"{unread:g}", f"{entry['seconds']:.1f}")
        for figure, found in entry["figures"].items():
            value = shown(found["value"], found["stderr"], entry.get("decimals", 1))
            rows.append((*first, figure, value, str(found["n"]), *last))
            first, last = ("", "", ""), ("", "")
    return rows


def shown(value: float | None, stderr: float | None, decimals: int | None) -> str:
    """A share of 1 in per cent, or (decimals None) points as they are; with its standard error."""
    if value is None or math.isnan(value):
        return "-"
    scale, digits = (1.0, 2) if decimals is None else (100.0, decimals)
    error = "" if stderr is None or math.isnan(stderr) else f" ± {scale * stderr:.{digits}f}"
    return f"{scale * value:.{digits}f}{error}"
