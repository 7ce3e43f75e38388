"""Recipes for the doctor: good ones, and ways to spoil them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.recipes import Checkpoints, Outcome, picture_rows, write_jsonl, write_recipe

from taid_vlm.config.recipe import load_recipe
from taid_vlm.doctor import Inspection, inspect_recipe

Rows = Sequence[dict[str, Any]]
ANSWER = "a red square on the left"
TEXT_ROWS: Rows = [{"prompt": "what is it", "completion": ANSWER}] * 4


@dataclass
class Patient:
    """Writes recipes into a folder of its own and has them inspected."""

    folder: Path
    checkpoints: Checkpoints
    cli: Callable[..., Outcome]

    def pictures(self, number: int = 4) -> Rows:
        return picture_rows(self.folder, number)

    def data(self, rows: Rows, name: str = "train.jsonl") -> str:
        return str(write_jsonl(self.folder / name, rows))

    def recipe(
        self, teacher: Any, student: Any, rows: Rows = TEXT_ROWS, **others: Any
    ) -> Path:
        """`others` replace or join the keys of the recipe; data.eval is not set."""
        tree = {"teacher": teacher, "student": student, "data": {"train": self.data(rows)},
                "output_dir": str(self.folder / "out"), "objective": "taid",
                "train": {"use_cpu": True, "disable_tqdm": True}}
        tree["train"] |= others.pop("train", {})
        return write_recipe(self.folder, {
            key: value for key, value in (tree | others).items() if value is not None})

    def inspect(self, path: Path, *overrides: str, **options: Any) -> Inspection:
        return inspect_recipe(load_recipe(path, overrides), **options)

    def spoilt(self, model: str, change: Callable[[Path], None]) -> str:
        """A copy of a checkpoint with something broken."""
        copy = self.folder / f"{Path(model).name}-spoilt"
        shutil.copytree(model, copy)
        change(copy)
        return str(copy)

    def with_template(self, model: str, template: str) -> dict[str, str]:
        return {"model_name_or_path": model, "chat_template": template}


def set_config(**values: Any) -> Callable[[Path], None]:
    """A change of config.json."""
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def without(*patterns: str) -> Callable[[Path], None]:
    """A change that loses files."""
    def change(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return change
