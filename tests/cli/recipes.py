"""What the command-line tests share: recipes on disk, data files, and one call of the command."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from zoo import build, save
from zoo.images import images

from taid_vlm.cli import main

WORDS = ("a", "red", "green", "blue", "square", "circle", "left", "right", "above", "of", "the",
         "two", "three", "naïve")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What one call of the command left behind."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@dataclass
class Checkpoints:
    """Saved zoo models, each made once per session."""

    folder: Path
    made: dict[str, str] = field(default_factory=dict)

    def __call__(self, family: str, tokenizer: str = "plain", seed: int = 0) -> str:
        name = f"{family}-{tokenizer}-{seed}"
        if name not in self.made:
            built = build(family, tokenizer=tokenizer, seed=seed)
            self.made[name] = str(save(built, self.folder / name))
        return self.made[name]


def command(*arguments: str | Path) -> int:
    """The command in this process; what argparse refuses counts as its exit status."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def write_recipe(folder: Path, tree: Mapping[str, Any], name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(dict(tree), sort_keys=False))
    return path


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    return path


def answer(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 8)))


def pairs(number: int = 16, seed: int = 0) -> Rows:
    rng = random.Random(seed)
    return [{"prompt": f"what is {answer(rng)}", "completion": answer(rng),
             "category": ("even", "odd")[index % 2]} for index in range(number)]


def texts(number: int = 16, seed: int = 0) -> Rows:
    rng = random.Random(seed)
    return [{"text": f"{answer(rng)} {answer(rng)}"} for _ in range(number)]


def picture_rows(folder: Path, number: int = 16, seed: int = 0) -> Rows:
    """Rows that name images in `folder`."""
    for index, picture in enumerate(images(4)):
        picture.save(folder / f"{index}.png")
    return [{"prompt": "<image>what is this", "completion": row["completion"],
             "image": f"{index % 4}.png"} for index, row in enumerate(pairs(number, seed))]


def byte_rows(number: int = 16, seed: int = 0) -> Rows:
    """Rows that hold their images, as data sets of the hub do."""
    return [{"prompt": "what is this", "completion": row["completion"],
             "image": {"bytes": png(index % 4), "path": None}}
            for index, row in enumerate(pairs(number, seed))]


def png(index: int) -> bytes:
    buffer = io.BytesIO()
    images(4)[index].save(buffer, "PNG")
    return buffer.getvalue()


def loaded(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def killed_at(step: int) -> str:
    """A script that is the command, and kills itself before it finishes this optimizer step."""
    return f"""
import os, signal, sys
from taid_vlm.training import trainer
finish_step = trainer.DistillationTrainer.finish_step
def finish(self):
    if self.state.global_step == {step}: os.kill(os.getpid(), signal.SIGKILL)
    finish_step(self)
trainer.DistillationTrainer.finish_step = finish
from taid_vlm.cli import main
main(sys.argv[1:])
"""
