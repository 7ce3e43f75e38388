"""lm-eval's tasks on local data: a task file that includes the packaged one and names the files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from taid_vlm.errors import TaidError, nearest_sibling
from taid_vlm.io.hashing import file_sha256

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_SPLITS = ("training_split", "validation_split", "test_split")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class TaskChange:
    """What is changed of one packaged task.

    Args:
        task: its name.
        packaged: its own YAML file.
        config: its configuration, includes resolved.
        path: a file with the questions, or a folder with a file (or shards) for every split; None
            leaves the data to lm-eval, which asks the hub.
        num_fewshot: None leaves the task's own.
        fewshot_split: where examples come from; None leaves the task's own.
    """

    task: str
    packaged: Path
    config: Mapping[str, Any]
    path: Path | None = None
    num_fewshot: int | None = None
    fewshot_split: str | None = None

    @property
    def any(self) -> bool:
        """Whether anything is changed at all."""
        return not (self.path is self.num_fewshot is self.fewshot_split is None)

    @property
    def asked(self) -> str:
        """The split whose questions are asked."""
        return str(self.config.get("test_split") or self.config.get("validation_split"))

    @property
    def shots(self) -> int:
        given = self.config.get("num_fewshot") if self.num_fewshot is None else self.num_fewshot
        return int(given or 0)

    @property
    def examples(self) -> str | None:
        """The split that examples are drawn from, None where the task writes them out."""
        config = self.config
        if "samples" in (config.get("fewshot_config") or {}):
            return None
        first = self.fewshot_split or config.get("fewshot_split")
        return str(first or config.get("training_split") or config.get("validation_split")
                   or config.get("test_split"))


def task_yaml(change: TaskChange) -> str:
    """The task file; raises TaidError where the data lacks a split that is needed."""
    lines: dict[str, Any] = {"include": str(change.packaged), "task": change.task,
                             "tag": None}  # a tag of its own would shrink the packaged one to it
    if change.num_fewshot is not None:
        lines["num_fewshot"] = change.num_fewshot
    if change.fewshot_split is not None:
        lines["fewshot_split"] = change.fewshot_split
    if change.path is not None:
        lines |= _dataset(change, split_files(change))
    return yaml.safe_dump(lines, sort_keys=False, allow_unicode=True)


def split_files(change: TaskChange) -> dict[str, list[Path]]:
    """The files of every split the task can use, the asked one first.

    Raises:
        TaidError: nothing at `path`, or a needed split is not there.
    """
    assert change.path is not None
    if not change.path.exists():
        raise TaidError(f"{change.task}: '{change.path}' does not exist."
                        f"{nearest_sibling(change.path)}")
    if change.path.is_file():
        _builder(change, [change.path])
        found = {change.asked: [change.path]}
    else:
        names = [change.asked, change.examples, *(change.config.get(key) for key in _SPLITS)]
        found = {str(name): _files_of(change, str(name)) for name in names if name}
    _check(change, found)
    return {name: files for name, files in found.items() if files}


def data_folder(base: Path, config: Mapping[str, Any], several: bool) -> Path:
    """Where a task's files lie under `base`, which may be a copy of its repository on the hub.

    Args:
        config: the task's; `dataset_name` is the folder of one of the dataset's configurations.
        several: `base` was given for several tasks, so that one file cannot be meant for each.
    """
    if base.is_file() and not several:
        return base
    name = config.get("dataset_name")
    if several and name and not (base / str(name)).is_dir():
        raise TaidError(f"'{base}' was given for several tasks and has no folder '{name}' for "
                        f"{config.get('task')}.{nearest_sibling(base / str(name))}")
    inner = [str(name)] if name else []
    folders = [base / part for part in (*inner, "data") if (base / part).is_dir()]
    return folders[0] if folders else base


def _dataset(change: TaskChange, files: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    lost = {key: None for key in (*_SPLITS, "fewshot_split")
            if change.config.get(key) and change.config[key] not in files}
    return {
        "dataset_path": _builder(change, [path for paths in files.values() for path in paths]),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {name: [str(path.resolve()) for path in paths]
                                          for name, paths in files.items()}},
        **lost,
    }


def _files_of(change: TaskChange, split: str) -> list[Path]:
    """Files whose name has the split as a word: test.jsonl, gsm8k_test.jsonl, shards."""
    assert change.path is not None
    word = re.compile(rf"(?:^|[-_.]){re.escape(split)}(?:[-_.]|$)")
    files = sorted(p for p in change.path.iterdir() if p.suffix in BUILDERS and word.search(p.stem))
    if len({_SHARD.sub("", path.stem) for path in files}) > 1:
        raise TaidError(f"{change.task}: split '{split}' could be any of "
                        f"{', '.join(path.name for path in files)} in '{change.path}'; leave one.")
    return files


def _builder(change: TaskChange, files: Sequence[Path]) -> str:
    kinds = {BUILDERS.get(path.suffix) for path in files}
    if None in kinds or len(kinds) != 1:
        names = ", ".join(path.name for path in files)
        raise TaidError(f"{change.task}: data must be of one kind, JSON, Parquet or CSV (got "
                        f"{names}).")
    return str(kinds.pop())


def _check(change: TaskChange, found: Mapping[str, Sequence[Path]]) -> None:
    if not found[change.asked]:
        raise TaidError(f"{change.task}: its questions are in split '{change.asked}', and "
                        f"'{change.path}' has no such file. {_listing(change)}")
    if change.shots and change.examples and not found.get(change.examples):
        raise TaidError(
            f"{change.task}: its {change.shots} solved examples come from split "
            f"'{change.examples}', which '{change.path}' does not hold; give a folder with "
            f"{change.examples}.jsonl and {change.asked}.jsonl, or set num_fewshot to 0.")


def _listing(change: TaskChange) -> str:
    assert change.path is not None
    names = sorted(p.name for p in change.path.iterdir()) if change.path.is_dir() else []
    return f"It holds: {', '.join(names[:8]) or 'nothing'}."


def source_of(changes: Sequence[TaskChange]) -> dict[str, Any]:
    """Where the questions of a task, or of a group's tasks, come from, as results.json has it."""
    first = changes[0]
    if first.path is None:
        name = "/".join(str(first.config[key]) for key in ("dataset_path", "dataset_name")
                        if first.config.get(key))
        return {"path": name, "split": first.asked, "sha256": None}
    digest = file_sha256(*(path for change in changes
                           for path in split_files(change)[change.asked]))
    path = first.path if len(changes) == 1 else first.path.parent
    return {"path": str(path), "split": first.asked, "sha256": digest.hex()}
