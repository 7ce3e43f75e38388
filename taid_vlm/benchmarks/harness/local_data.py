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
    def question_split(self) -> str:
        """The split whose questions are asked."""
        return str(self.config.get("test_split") or self.config.get("validation_split"))

    @property
    def shots(self) -> int:
        own = self.config.get("num_fewshot")
        return int((own if self.num_fewshot is None else self.num_fewshot) or 0)

    @property
    def examples(self) -> str | None:
        """The split that examples are drawn from, None where the task writes them out."""
        if "samples" in (self.config.get("fewshot_config") or {}):
            return None
        named = (self.config.get(key) for key in ("fewshot_split", *_SPLITS))
        return str(next(filter(None, (self.fewshot_split, *named)), None))


def task_yaml(change: TaskChange) -> str:
    """The task file; raises TaidError where the data lacks a split that is needed."""
    lines: dict[str, Any] = {"include": str(change.packaged), "task": change.task,
                             "tag": None}  # a tag of its own would shrink the packaged one to it
    chosen = {"num_fewshot": change.num_fewshot, "fewshot_split": change.fewshot_split}
    lines |= {key: value for key, value in chosen.items() if value is not None}
    if change.path is not None:
        lines |= _dataset(change.config, split_files(change))
    return yaml.safe_dump(lines, sort_keys=False, allow_unicode=True)


def _dataset(config: Mapping[str, Any], files: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    first = next(iter(files.values()))[0]
    return {
        "dataset_path": BUILDERS[first.suffix], "dataset_name": None,
        "dataset_kwargs": {"data_files": {name: [str(path.resolve()) for path in paths]
                                          for name, paths in files.items()}},
        **{key: None for key in (*_SPLITS, "fewshot_split")
           if config.get(key) and config[key] not in files},
    }


def split_files(change: TaskChange) -> dict[str, list[Path]]:
    """The files of every split the task can use, that of the questions first.

    Raises:
        TaidError: nothing at `path`, files of several kinds, or a needed split is not there.
    """
    path, questions = change.path, change.question_split
    assert path is not None
    if not path.exists():
        raise TaidError(f"{change.task}: '{path}' does not exist.{nearest_sibling(path)}")
    names = [questions, change.examples, *(change.config.get(key) for key in _SPLITS)]
    files = {questions: [path]} if path.is_file() else {
        str(name): _files_of(change.task, path, str(name)) for name in names if name}
    if not files[questions]:
        held = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
        raise TaidError(f"{change.task}: its questions are in split '{questions}', and '{path}' "
                        f"has no such file. It holds: {held}.")
    given = [file for each in files.values() for file in each]
    kinds = {BUILDERS.get(file.suffix) for file in given}
    if None in kinds or len(kinds) != 1:
        raise TaidError(f"{change.task}: data must be of one kind, JSON, Parquet or CSV (got "
                        f"{', '.join(file.name for file in given)}).")
    if change.shots and change.examples and not files.get(change.examples):
        raise TaidError(
            f"{change.task}: its {change.shots} solved examples come from split "
            f"'{change.examples}', which '{path}' does not hold; give a folder with "
            f"{change.examples}.jsonl and {questions}.jsonl, or set num_fewshot to 0.")
    return {name: each for name, each in files.items() if each}


def _files_of(task: str, folder: Path, split: str) -> list[Path]:
    """Files whose name has the split as a word: test.jsonl, gsm8k_test.jsonl, shards."""
    word = re.compile(rf"(?:^|[-_.]){re.escape(split)}(?:[-_.]|$)")
    files = sorted(p for p in folder.iterdir() if p.suffix in BUILDERS and word.search(p.stem))
    if len({_SHARD.sub("", path.stem) for path in files}) > 1:
        raise TaidError(f"{task}: split '{split}' could be any of "
                        f"{', '.join(path.name for path in files)} in '{folder}'; leave one.")
    return files


def data_folder(base: Path, config: Mapping[str, Any], several: bool) -> Path:
    """Where a task's files lie under `base`, which may be a copy of its repository on the hub.

    Args:
        config: the task's; `dataset_name` is the folder of one of the dataset's configurations.
        several: `base` was given for several tasks, so that one file cannot be meant for each.
    """
    if base.is_file() and not several:
        return base
    name = str(config.get("dataset_name") or "")
    if several and name and not (base / name).is_dir():
        raise TaidError(f"'{base}' was given for several tasks and has no folder '{name}' for "
                        f"{config.get('task')}.{nearest_sibling(base / name)}")
    inner = [base / part for part in (name, "data") if part]
    return next((folder for folder in inner if folder.is_dir()), base)


def source_of(changes: Sequence[TaskChange]) -> dict[str, Any]:
    """Where the questions of a task, or of a group's tasks, come from, as results.json has it."""
    first = changes[0]
    if first.path is None:
        names = (first.config.get(key) for key in ("dataset_path", "dataset_name"))
        return {"path": "/".join(str(name) for name in names if name),
                "split": first.question_split, "sha256": None}
    digest = file_sha256(*(path for change in changes
                           for path in split_files(change)[change.question_split]))
    path = first.path if len(changes) == 1 else first.path.parent
    return {"path": str(path), "split": first.question_split, "sha256": digest.hex()}
