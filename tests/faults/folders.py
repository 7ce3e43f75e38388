"""Broken folders (checkpoints, runs, evaluations, benchmarks), and what a command leaves."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from cli.recipes import command, picture_rows, write_jsonl, write_recipe
from faults.breaking import changed, flipped, noise
from safetensors import safe_open

from taid_vlm.io.manifest import NAME as MANIFEST
from taid_vlm.io.manifest import damage, read_manifest, seal

Words = Sequence[str | Path]
IN_THE_WAY = ("student", "results.json", "recipe.yaml", "report.html", "eval_answers.jsonl",
              "checkpoint-2", "checkpoint-3", ".student.partial", ".lock")
BENCHMARK = {"type": "multiple_choice", "data": "quiz.jsonl", "columns": {"question": "query"},
             "prompt": "{question}\n{options}\nAnswer.", "tags": ["kind"], "max_new_tokens": 3}


class Finished:
    """A run of two steps with both checkpoints, and an evaluation of its student; each kind of
    breaking makes a copy of what it breaks."""

    def __init__(self, folder: Path, tree: dict[str, Any]) -> None:
        self.folder, self.fresh = folder, folder / "broken"
        self.out, self.evaluation = folder / "finished", folder / "evaluated"
        self.tree = {**tree, "output_dir": str(self.out), "train": {
            **tree["train"], "max_steps": 2, "save_strategy": "steps", "save_steps": 1}}
        self.recipe = write_recipe(folder, self.tree, "finished.yaml")
        self.quiz = folder / "quiz.yaml"
        rows = [{"id": str(number), "query": row["prompt"].removeprefix("<image>"),
                 "image": row["image"], "options": ["red", "blue", row["completion"]],
                 "answer": "AB"[number % 2], "kind": "ab"[number % 2]}
                for number, row in enumerate(picture_rows(folder, 3, 5))]
        write_jsonl(folder / "quiz.jsonl", rows)
        self.quiz.write_text(yaml.safe_dump(BENCHMARK))
        assert command("distill", self.recipe) == 0
        assert command("evaluate", "--model", self.out, "--tasks", self.quiz, "--output-dir",
                       self.evaluation) == 0

    def broken(self, rng: random.Random) -> tuple[str, Words]:
        """What is broken, and the command that meets it."""
        shutil.rmtree(self.fresh, ignore_errors=True)
        self.fresh.mkdir()
        kinds: tuple[Callable[[random.Random], tuple[str, Words]], ...] = (
            self.checkpoint, self.run, self.evaluated, self.benchmark, self.in_the_way)
        kind = rng.choice(kinds)
        what, words = kind(rng)
        return f"{kind.__name__}: {what}", words

    def _copy(self) -> tuple[Path, Path]:
        """A copy of the run, and its recipe."""
        out = shutil.copytree(self.out, self.fresh / "out")
        return out, write_recipe(self.fresh, {**self.tree, "output_dir": str(out)})

    def checkpoint(self, rng: random.Random) -> tuple[str, Words]:
        """An unfinished run whose checkpoint is damaged, or altered and sealed again."""
        out, recipe = self._copy()
        (out / "results.json").unlink()
        folder = out / rng.choice(("checkpoint-1", "checkpoint-2"))
        facts = read_manifest(folder) or {}
        what = break_file(rng, folder, self.out)
        if rng.random() < 0.5 and (folder / MANIFEST).exists() and MANIFEST not in what:
            seal(folder, {key: value for key, value in facts.items() if key != "files"})
            what += ", sealed again"
            if folder.name == "checkpoint-1":
                shutil.rmtree(out / "checkpoint-2")
        tree = yaml.safe_load(recipe.read_text())
        tree["train"]["max_steps"] = rng.choice((2, 3))
        recipe.write_text(yaml.safe_dump(tree))
        return what, ["distill", recipe, rng.choice(("--resume", "--resume", "--overwrite"))]

    def run(self, rng: random.Random) -> tuple[str, Words]:
        out, recipe = self._copy()
        place = rng.choice((out, out, out / "student"))
        what = break_file(rng, place, self.out)
        words: Words = rng.choice([
            ["compare", f"a={out}", f"b={self.out}", "--html", self.fresh / "page.html"],
            ["compare", f"a={self.out}", f"b={out}", "--json"],
            ["evaluate", "--model", out, "--tasks", self.quiz, "--output-dir", self.fresh / "e"],
            ["distill", recipe, "--resume"], ["distill", recipe, "--overwrite"],
            ["distill", recipe], ["inspect", recipe]])
        return what, words

    def evaluated(self, rng: random.Random) -> tuple[str, Words]:
        folder = shutil.copytree(self.evaluation, self.fresh / "evaluation")
        if rng.random() < 0.3:  # interrupted: its answers lie in a partial file
            answers = folder / "answers"
            shutil.move(answers / "quiz.jsonl", answers / ".quiz.partial-0.jsonl")
        what = break_file(rng, rng.choice((folder, folder / "answers")), self.out)
        words: Words = rng.choice([
            ["evaluate", "--model", self.out, "--tasks", self.quiz, "--output-dir", folder],
            ["compare", f"a={self.evaluation}", f"b={folder}"],
            ["compare", f"a={folder}", f"b={self.evaluation}", "--html", self.fresh / "p.html"],
            ["compare", f"a={self.out},{folder}", f"b={self.out}", "--teacher", self.evaluation],
        ])
        return what, words

    def benchmark(self, rng: random.Random) -> tuple[str, Words]:
        quiz, data = self.fresh / "quiz.yaml", self.folder / "broken-quiz.jsonl"
        lines = (self.folder / "quiz.jsonl").read_text().splitlines()
        tree: Any = {**BENCHMARK, "data": str(data),
                     "type": rng.choice(("multiple_choice", "short_answer", "caption"))}
        what = rng.choice(("yaml", "yaml bytes", "rows", "row bytes", "image"))
        if what == "yaml":
            tree = changed(rng, tree)
        elif what == "rows":
            at = rng.randrange(len(lines))
            lines[at] = json.dumps(changed(rng, json.loads(lines[at])))
        elif what == "image":
            lines[0] = json.dumps({**json.loads(lines[0]), "image": str(noise(rng, self.fresh))})
        text = "\n".join(lines).encode()
        data.write_bytes(flipped(rng, text) if what == "row bytes" else text)
        quiz.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        if what == "yaml bytes":
            quiz.write_bytes(flipped(rng, quiz.read_bytes()))
        words: Words = ["evaluate", "--model", self.out, "--tasks", quiz, "--output-dir",
                        self.fresh / "e"]
        return what, rng.choice([words, words, [*words, "--method", "likelihood"],
                                 ["export", quiz, "--output-dir", self.fresh / "tables"]])

    def in_the_way(self, rng: random.Random) -> tuple[str, Words]:
        """Something of another kind stands where a run writes."""
        out, recipe = self._copy()
        name = rng.choice(IN_THE_WAY)
        remove(out / name)
        if rng.random() < 0.5:
            remove(out / "results.json")
        stand_in_the_way(rng, out / name)
        return name, ["distill", recipe, rng.choice(("--resume", "--overwrite"))]


def stand_in_the_way(rng: random.Random, path: Path) -> None:
    what = rng.randrange(4)
    if what == 0:
        path.write_text("mine")
    elif what == 1:
        path.mkdir()
        (path / "mine").write_text("mine")
    else:  # a link to nothing, or to itself
        path.symlink_to("nothing" if what == 2 else path.name)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def break_file(rng: random.Random, folder: Path, other: Path) -> str:
    """One file of a folder is cut, altered, removed, put in from elsewhere, or a folder."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    if not files:
        return "nothing"
    file = rng.choice(files)
    what = rng.choice(("changed", "changed", "flipped", "empty", "missing", "foreign", "folder"))
    if what == "changed" and file.suffix == ".json":
        file.write_text(json.dumps(changed(rng, json.loads(file.read_text()))))
    elif what == "changed" and file.suffix == ".jsonl":
        lines = file.read_text().splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(changed(rng, json.loads(lines[at])))
        file.write_text("\n".join(lines) + "\n")
    elif what in ("changed", "flipped"):
        file.write_bytes(flipped(rng, file.read_bytes()))
    elif what == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
        if what == "foreign":
            source = rng.choice([path for path in sorted(other.rglob("*")) if path.is_file()])
            shutil.copy(source, file)
        elif what == "folder":
            file.mkdir()
    return f"{file.name} {what}"


# ----- what a command leaves ----------------------------------------------------------------


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every file with its time and size."""
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size)
            for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


def half_written(folder: Path, before: dict[Path, tuple[int, int]]) -> Iterator[str]:
    """Files under a folder that a command has written since, and that are not whole."""
    for path, state in snapshot(folder).items():
        if before.get(path) == state:
            continue
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) and ".partial-" not in path.name:
            yield f"left behind: {name}"
        if path.suffix == ".json":
            with contextlib.suppress(OSError):
                try:
                    json.loads(path.read_text(encoding="utf-8"))
                except ValueError:
                    yield f"torn: {name}"
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt") as file:
                    file.keys()
            except Exception as error:
                yield f"torn: {name}: {error}"
        if path.name == MANIFEST and damage(path.parent):
            yield f"not as it says: {name}: {damage(path.parent)}"
