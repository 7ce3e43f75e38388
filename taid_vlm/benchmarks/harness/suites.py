"""Names of suites, tasks, groups and tags -> what is changed of which of lm-eval's tasks.

A suite is a leaderboard's: tasks with the shots and the figure that it averages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taid_vlm.benchmarks.harness.local_data import TaskChange, data_folder
from taid_vlm.errors import TaidError, nearest


@dataclass(frozen=True)
class Member:
    """One task of a suite.

    Args:
        task: lm-eval's task or group.
        title: as it stands in a table.
        num_fewshot: solved examples before every question.
        figure: which of lm-eval's figures the suite averages.
        fewshot_split: where the examples are drawn from. None leaves it to the task; naming the
            task's own training split is not the same, for lm-eval then draws one example fewer.
    """

    task: str
    title: str
    num_fewshot: int
    figure: str
    fewshot_split: str | None = None


# Shots and splits: lm_eval/tasks/benchmarks/openllm.yaml. Of TruthfulQA's three tasks and GSM8K's
# two filters, the leaderboard showed these.
SUITES: dict[str, tuple[Member, ...]] = {
    "openllm": (
        Member("arc_challenge", "ARC", 25, "acc_norm", "train"),
        Member("hellaswag", "HellaSwag", 10, "acc_norm", "train"),
        Member("mmlu", "MMLU", 5, "acc"),
        Member("truthfulqa_mc2", "TruthfulQA", 0, "acc"),
        Member("winogrande", "Winogrande", 5, "acc", "train"),
        Member("gsm8k", "GSM8K", 5, "exact_match,strict-match"),
    ),
}


def member_of(task: str) -> Member | None:
    """How a suite sees a task; None for a task of no suite."""
    members = (member for suite in SUITES.values() for member in suite if member.task == task)
    return next(members, None)


@dataclass(frozen=True)
class TaskRequest:
    """One task, group or tag that is to be measured, by its name or by a suite's.

    Args:
        path: file or folder with its data; None leaves it to lm-eval, which asks the hub.
        num_fewshot: solved examples; None leaves the task's own.
    """

    name: str
    path: Path | None = None
    num_fewshot: int | None = None
    member: Member | None = None


def expand(tasks: Sequence[str], data: Mapping[str, str | Path], num_fewshot: int | None
           ) -> list[TaskRequest]:
    """Suites as their tasks, each with its data; raises TaidError for what does not fit."""
    paths = {name: Path(path).expanduser() for name, path in data.items()}
    requests: list[TaskRequest] = []
    for name in tasks:
        if name not in SUITES:
            requests.append(TaskRequest(name, paths.get(name), num_fewshot))
        elif num_fewshot is not None:
            raise TaidError(f"num_fewshot = {num_fewshot}, but every task of the suite '{name}' "
                            "has its own; leave it out.")
        for member in SUITES.get(name, ()):
            inside = paths[name] / member.task if name in paths else None
            requests.append(TaskRequest(member.task, paths.get(member.task, inside),
                                        member.num_fewshot, member))
    _check([request.name for request in requests], tasks, data)
    return requests


def _check(names: Sequence[str], tasks: Sequence[str], data: Mapping[str, Any]) -> None:
    if not names:
        raise TaidError("tasks: none is named.")
    for name in names:
        if names.count(name) > 1:
            raise TaidError(f"tasks: '{name}' is asked for twice.")
    for name in data:
        if name not in names and name not in tasks:
            raise TaidError(f"data: '{name}' is no task that was asked for."
                            f"{nearest(name, [*tasks, *names])}")


def changes_of(request: TaskRequest, index: Mapping[str, Any]) -> list[TaskChange]:
    """What is changed of every task under a name.

    Args:
        index: lm-eval's: name -> entry with `kind`, `cfg`, `tags` and `yaml_path`.

    Raises:
        TaidError: a name that lm-eval does not have, examples for a task that writes out its own.
    """
    name, shots, member = request.name, request.num_fewshot, request.member
    if name not in index:
        raise TaidError(f"lm-eval has no task '{name}'.{nearest(name, [*index, *SUITES])}")
    changes = []
    for leaf in leaves(name, index):
        config = index[leaf].cfg
        if shots and member is None and config.get("num_fewshot") == 0:
            raise TaidError(f"num_fewshot = {shots}, but {leaf} is defined without solved examples "
                            "of its data; measure it in a run of its own.")
        path = request.path and data_folder(request.path, config, several=leaf != name)
        changes.append(TaskChange(leaf, index[leaf].yaml_path, config, path, shots,
                                  member.fewshot_split if member else None))
    return changes


def leaves(name: str, index: Mapping[str, Any]) -> list[str]:
    """The single tasks under a task, group or tag."""
    entry = index[name]
    if entry.kind.name not in ("GROUP", "TAG"):
        return [name]
    inner: Any = sorted(entry.tags) if entry.kind.name == "TAG" else entry.cfg["task"]
    names = [item if isinstance(item, str) else item.get("task") or item.get("group")
             for item in (inner if isinstance(inner, list) else [inner])]
    return [leaf for inside in names if inside in index for leaf in leaves(inside, index)]
