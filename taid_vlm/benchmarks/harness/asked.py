"""Names of tasks, groups, tags and suites -> what is changed of which of lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taid_vlm.benchmarks.harness.local_data import TaskChange, data_folder
from taid_vlm.benchmarks.harness.suites import SUITES, Member
from taid_vlm.errors import TaidError, nearest


@dataclass(frozen=True)
class Asked:
    """One task, group or tag as it was asked for, by its name or by a suite's.

    Args:
        path: file or folder with its data; None leaves it to lm-eval, which asks the hub.
        num_fewshot: solved examples; None leaves the task's own.
    """

    name: str
    path: Path | None = None
    num_fewshot: int | None = None
    member: Member | None = None


def expand(tasks: Sequence[str], data: Mapping[str, str | Path], num_fewshot: int | None
           ) -> list[Asked]:
    """Suites as their tasks, each with its data; raises TaidError for what does not fit."""
    asked: list[Asked] = []
    for name in tasks:
        if name not in SUITES:
            asked.append(Asked(name, _path(data.get(name)), num_fewshot))
            continue
        if num_fewshot is not None:
            raise TaidError(f"num_fewshot = {num_fewshot}, but every task of the suite '{name}' "
                            "has its own; leave it out.")
        for member in SUITES[name]:
            inside = _path(data[name]) / member.task if name in data else None
            path = _path(data[member.task]) if member.task in data else inside
            asked.append(Asked(member.task, path, member.num_fewshot, member))
    _check([task.name for task in asked], tasks, data)
    return asked


def changes_of(asked: Asked, index: Mapping[str, Any]) -> list[TaskChange]:
    """What is changed of every task under a name.

    Args:
        index: lm-eval's: name -> entry with `kind`, `cfg`, `tags` and `yaml_path`.

    Raises:
        TaidError: a name that lm-eval does not have, examples for a task that writes out its own.
    """
    if asked.name not in index:
        raise TaidError(f"lm-eval has no task '{asked.name}'."
                        f"{nearest(asked.name, [*index, *SUITES])}")
    changes = []
    for leaf in leaves(asked.name, index):
        config = index[leaf].cfg
        if asked.num_fewshot and asked.member is None and config.get("num_fewshot") == 0:
            raise TaidError(f"num_fewshot = {asked.num_fewshot}, but {leaf} is defined without "
                            "solved examples of its data; measure it in a run of its own.")
        path = asked.path and data_folder(asked.path, config, several=leaf != asked.name)
        split = None if asked.member is None else asked.member.fewshot_split
        changes.append(
            TaskChange(leaf, index[leaf].yaml_path, config, path, asked.num_fewshot, split))
    return changes


def leaves(name: str, index: Mapping[str, Any]) -> list[str]:
    """The single tasks under a task, group or tag."""
    entry = index[name]
    if entry.kind.name == "TAG":
        inner: list[Any] = sorted(entry.tags)
    elif entry.kind.name == "GROUP":
        inner = entry.cfg["task"] if isinstance(entry.cfg["task"], list) else [entry.cfg["task"]]
    else:
        return [name]
    names = [item if isinstance(item, str) else item.get("task") or item.get("group")
             for item in inner]
    return [leaf for inside in names if inside in index for leaf in leaves(inside, index)]


def _path(value: str | Path | None) -> Any:
    return None if value is None else Path(value).expanduser()


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
