"""Leaderboards of benchmarks: their members, and the average that is printed where all are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taid_vlm.errors import TaidError, nearest
from taid_vlm.evaluation.statistics import Estimate, mean_of_estimates

ENDINGS = (".tsv", ".parquet", ".jsonl", ".json", "")  # of a member's data in a folder


@dataclass(frozen=True)
class Member:
    """A benchmark of a suite.

    Args:
        figure: which of its figures the suite averages.
        full: what the figure is at most.
    """

    task: str
    figure: str = "accuracy"
    full: float = 1.0


# The eight of the Open VLM Leaderboard, each as a share of its full score: OCRBench's points are
# tenths of a % (VLMEvalKit), HallusionBench's three accuracies are averaged first.
SUITES: dict[str, tuple[Member, ...]] = {
    "taid-vlm": (
        Member("mmbench", "circular"), Member("mmstar"), Member("mmmu"), Member("math_vista"),
        Member("ocrbench", "score", 1000.0), Member("ai2d"),
        Member("hallusion_bench", "average"), Member("mmvet", "score")),
}


def with_members(tasks: Sequence[str], suites: Sequence[str]) -> list[str]:
    """Tasks, and the members of suites that are not among them.

    Args:
        suites: NAME or NAME=FOLDER each. Of a folder the members are taken that lie in it as
            TASK.tsv, TASK.parquet, TASK.jsonl, TASK.json or a folder TASK; without one all are,
            from the hub.

    Raises:
        TaidError: no such suite, no such folder, or none of its members in it.
    """
    named = {task.partition("=")[0] for task in tasks}
    found = list(tasks)
    for text in suites:
        name, _, place = text.partition("=")
        if name not in SUITES:
            raise TaidError(f"--suite '{text}': no suite '{name}'.{nearest(name, SUITES)}")
        folder = Path(place).expanduser()
        if place and not folder.is_dir():
            raise TaidError(f"--suite '{text}': there is no folder '{place}'.")
        for member in (member for member in SUITES[name] if member.task not in named):
            files = [folder / f"{member.task}{end}" for end in ENDINGS]
            data = next((file for file in files if place and file.exists()), None)
            found += [f"{member.task}={data}"] if data else [] if place else [member.task]
        if place and len(found) == len(tasks):
            raise TaidError(f"--suite '{text}': '{place}' holds none of its benchmarks "
                            f"({', '.join(member.task for member in SUITES[name])}).")
    return found


def average(name: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """A suite's average as a share of 1, if every member has a figure; else what is missing.

    Args:
        entries: of results.json, by task.
    """
    figures = {member: entries.get(member.task, {}).get("figures", {}).get(member.figure)
               for member in SUITES[name]}
    missing = {member.task: _why(entries.get(member.task)) for member, figure in figures.items()
               if not _known(figure)}
    if missing:
        return {"figures": {}, "missing": missing}
    mean = mean_of_estimates([_share(figure, member.full) for member, figure in figures.items()])
    return {"figures": {"average": vars(mean)}, "missing": {}}


def _known(figure: Mapping[str, Any] | None) -> bool:
    return figure is not None and figure["value"] is not None and not math.isnan(figure["value"])


def _share(figure: Mapping[str, Any], full: float) -> Estimate:
    stderr = math.nan if figure["stderr"] is None else figure["stderr"]
    return Estimate(figure["value"] / full, stderr / full, figure["n"])


def _why(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "not evaluated"
    return "; ".join(entry.get("unscored", {})) or "no figure"
