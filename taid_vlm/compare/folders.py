"""What is compared: folders that `taid-vlm distill` and `taid-vlm evaluate` have written, and logs
of other harnesses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from taid_vlm.benchmarks.harness.logs import read_logs
from taid_vlm.benchmarks.harness.vlmevalkit_logs import read_kit
from taid_vlm.benchmarks.scoring import check_results
from taid_vlm.errors import TaidError, nearest_sibling
from taid_vlm.evaluation.answers import AnswerPair, read_answers
from taid_vlm.io.files import read_json
from taid_vlm.io.jsonl import need, read_lines
from taid_vlm.runs.folders import ANSWERS, RESULTS
from taid_vlm.runs.results import KIND, Results, parse_results

LINE = {"id": str | int, "answer": str, "score": float | int | None}  # of an evaluation's answers
SCHEMAS = {"evaluation": (1,), KIND: (1, 2), "": (1,)}  # of results.json, by its kind


@dataclass(frozen=True)
class Distillation:
    """A finished run of `taid-vlm distill`."""

    folder: Path
    results: Results

    @cached_property
    def answers(self) -> list[AnswerPair]:
        """Every held-out answer's figures; none from a run without held-out data."""
        path = self.folder / ANSWERS
        return read_answers(path) if path.exists() else []

    @property
    def before(self) -> dict[str, float]:
        """Held-out figures by name; {} without held-out data."""
        return self.results.eval.before.figures if self.results.eval.before else {}

    @property
    def after(self) -> dict[str, float]:
        return self.results.eval.after.figures if self.results.eval.after else {}

    @property
    def versions(self) -> dict[str, str]:
        return self.results.versions


@dataclass(frozen=True)
class Evaluation:
    """A finished run of `taid-vlm evaluate`, or of another harness.

    rows: {task: one mapping per question}, where they are not in files of ours.
    """

    folder: Path
    results: dict[str, Any]
    rows: Mapping[str, list[dict[str, Any]]] | None = None

    @property
    def versions(self) -> dict[str, str]:
        return self.results["versions"]

    def answers(self, task: str) -> list[dict[str, Any]]:
        """One mapping per question; [] where the file is gone."""
        if self.rows is not None:
            return self.rows.get(task, [])
        path = self.folder / self.results["tasks"][task]["answers"]
        if not path.exists():
            return []
        return [need(line, where, LINE) for where, line in read_lines(path)]


@dataclass(frozen=True)
class Method:
    """One row of the comparison: several seeds of one method, or a single model.

    trained: False for a teacher and a base, which have no seeds.
    """

    name: str
    runs: Sequence[Distillation] = ()
    evaluations: Sequence[Evaluation] = field(default=())
    trained: bool = True

    @property
    def folders(self) -> list[Path]:
        return [part.folder for part in self.parts]

    @property
    def parts(self) -> list[Distillation | Evaluation]:
        return [*self.runs, *self.evaluations]

    @property
    def seeds(self) -> list[int]:
        """Of training; evaluations are taken to stand in the order of the runs."""
        return [run.results.seed for run in self.runs]

    def evaluated(self, task: str) -> list[Evaluation]:
        """The evaluations that have a benchmark, one per seed."""
        return [e for e in self.evaluations if task in e.results["tasks"]]


def read_method(argument: str) -> Method:
    """`FOLDER`, `NAME=FOLDER` or `NAME=FOLDER,FOLDER,...` (seeds of one method, and evaluations of
    their students).

    Raises:
        TaidError: a folder that is missing, unfinished or of another kind.
    """
    name, folders = _parse(argument)
    parts = [read_folder(folder) for folder in folders]
    return Method(name, [p for p in parts if isinstance(p, Distillation)],
                  [p for p in parts if isinstance(p, Evaluation)])


def read_reference(name: str, folder: Path) -> Method:
    """The evaluation of a teacher or a base."""
    evaluation = read_folder(folder)
    if not isinstance(evaluation, Evaluation):
        raise TaidError(f"--{name.lower()} '{folder}' is a distillation run; it needs the folder "
                        f"that taid-vlm evaluate wrote for the {name.lower()}.")
    return Method(name, (), (evaluation,), trained=False)


def _parse(argument: str) -> tuple[str, list[Path]]:
    if Path(argument).exists():
        return Path(argument).resolve().name, [Path(argument)]
    name, equals, rest = argument.partition("=")
    name, rest = (name.strip(), rest) if equals else ("", argument)
    folders = [Path(rest)] if Path(rest).exists() else [Path(part) for part in rest.split(",")]
    if (equals and not name) or not all(str(folder).strip(". ") for folder in folders):
        raise TaidError(f"'{argument}' is neither a folder nor NAME=FOLDER[,FOLDER...].")
    return name or folders[0].resolve().name, folders


def read_folder(folder: Path) -> Distillation | Evaluation:
    """A finished run; raises TaidError for anything else."""
    path = folder / RESULTS
    if not path.is_file():
        logs = _read_logs(folder) if folder.is_dir() else None
        if logs is not None:
            return Evaluation(folder, check_results(logs[0], folder), logs[1])
        raise TaidError(_without_results(folder))
    tree = read_json(path, "a run's results")
    if not isinstance(tree, dict) or "schema" not in tree:
        raise TaidError(f"'{path}' is not a run's results (it has no 'schema').")
    kind = str(tree.get("kind", ""))
    if kind not in SCHEMAS or (kind == "evaluation" and not {"tasks", "versions"} <= tree.keys()):
        raise TaidError(f"'{path}' is neither of a distillation nor of an evaluation (kind = "
                        f"'{kind}').")
    if tree["schema"] not in SCHEMAS[kind]:
        raise TaidError(f"'{path}' has schema {tree['schema']}, but this version reads "
                        f"{' and '.join(map(str, SCHEMAS[kind]))}.")
    return Evaluation(folder, check_results(tree, path)) if kind == "evaluation" else \
        Distillation(folder, parse_results(tree, path))


def _read_logs(folder: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]] | None:
    """Of another harness, in the folder or, as they put them, in that of the one model in it."""
    inside = [path for path in folder.iterdir() if path.is_dir()]
    places = [folder, *inside] if len(inside) == 1 else [folder]
    logs = (read_logs(place) or read_kit(place) for place in places)
    return next((found for found in logs if found is not None), None)


def _without_results(folder: Path) -> str:
    if not folder.is_dir():
        return f"'{folder}' is no folder.{nearest_sibling(folder)}"
    inside = sorted(p.parent.name for p in folder.glob(f"*/{RESULTS}"))
    if inside:
        return (f"'{folder}' has no results.json; the folders in it that have one: "
                f"{', '.join(inside)}.")
    unfinished = any(folder.glob("checkpoint-*")) or (folder / "recipe.yaml").exists()
    why = "the run is not finished" if unfinished else \
        "it is not the output of taid-vlm distill or taid-vlm evaluate"
    return f"'{folder}' has no results.json: {why}."
