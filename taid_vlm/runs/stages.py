"""Runs in stages: align the projector, then train all.

    stages:
      - {name: align, train: {freeze: [tower, language_model, head], max_steps: 500}}
      - {name: all, train: {learning_rates: {tower: 2e-6}}}

Each stage is a whole run that starts from the student of the one before. The last one writes into
`output_dir` itself, the others into `output_dir/stages/1-NAME`, ...

With `student.peft` every stage trains a fresh adapter on the student of the one before. The first
stage's folder holds its adapter; from the second on, where the base is itself a stage's student,
the adapter is merged and the folder holds all weights.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from taid_vlm.config.model import StudentSpec
from taid_vlm.config.recipe import Recipe, StageSpec
from taid_vlm.errors import TaidError
from taid_vlm.runs import run
from taid_vlm.runs.results import STUDENT_FOLDER


def expand(recipe: Recipe) -> list[Recipe]:
    """The recipe of every stage, in order; a recipe without stages is its own only one."""
    stages, made = recipe.stages or (), list[Recipe]()
    for number, stage in enumerate(stages, start=1):
        last = number == len(stages)
        folder = recipe.output_dir if last else _folder(recipe, number, stage)
        made.append(recipe.model_copy(update={
            "stages": None, "output_dir": folder,
            "student": _start(recipe, made[-1].output_dir) if made else recipe.student,
            "train": {**recipe.train, **stage.train},
            "data": recipe.data.model_copy(update=stage.data),
            "objective": recipe.objective if stage.objective is None else stage.objective,
        }))
    return made or [recipe]


def _folder(recipe: Recipe, number: int, stage: StageSpec) -> str:
    return str(Path(recipe.output_dir) / "stages" / f"{number}-{stage.name}")


def _start(recipe: Recipe, folder: str) -> StudentSpec:
    """The student that lies in a stage's folder, with the processor that it was trained with."""
    spec = recipe.student
    return spec.model_copy(update={
        "model_name_or_path": str(Path(folder) / STUDENT_FOLDER),
        "processor_name_or_path": spec.processor_name_or_path or spec.model_name_or_path})


def distill_stages(
    recipe: Recipe, resume: bool = False, report: run.WriteReport | None = None
) -> dict[str, Any]:
    """Carry out a recipe with or without stages.

    Args:
        resume: pass over the stages that are finished, and go on with the first that is not.
        report: writes every stage's report.html, if one is wanted.

    Returns:
        The results of the last stage; `stages` in them is an account of those before.

    Raises:
        TaidError: as `run.distill`; what can be checked of any stage is checked before the first.
    """
    if not recipe.stages:
        return run.distill(recipe, resume, report=report)
    stages = expand(recipe)
    _check(recipe, stages)
    first = _first_unfinished(recipe, stages) if resume else _fresh_start(stages)
    if first == len(stages):
        return read_results(stages[-1])
    resumable = resume and run.last_checkpoint(Path(stages[first].output_dir)) is not None
    PartialState().wait_for_everyone()  # until then, no process may change what another looks at
    results: dict[str, Any] = {}
    for number, stage in enumerate(stages[first:], start=first):
        earlier = [_account(recipe, *pair) for pair in enumerate(stages[:number])]
        later = [Path(other.output_dir) for other in stages[number + 1:]]
        results = run.distill(stage, resumable, run.Place(recipe, earlier, later), report)
        resumable = False
        _free_memory()
    return results


def _check(recipe: Recipe, stages: Sequence[Recipe]) -> None:
    """Open what every stage needs; later ones stand on the first student until theirs is there."""
    for spec, stage in zip(recipe.stages or (), stages, strict=True):
        try:
            run.gather(stage.model_copy(update={"student": recipe.student}))
        except TaidError as error:
            raise type(error)(f"stages '{spec.name}': {error}") from error


def _fresh_start(stages: Sequence[Recipe]) -> int:
    """Number of the stage to begin with, 0; never over an unfinished run."""
    for stage in stages:
        run.find_checkpoint(Path(stage.output_dir), resume=False)
    finished = [stage.output_dir for stage in stages if _is_finished(stage)]
    if finished and not _is_finished(stages[-1]):
        raise TaidError(f"'{finished[-1]}' is a finished stage of an unfinished run: continue it "
                        "with --resume, or choose another output_dir.")
    return 0


def _first_unfinished(recipe: Recipe, stages: Sequence[Recipe]) -> int:
    """Number of the stage to go on with (all finished: how many there are)."""
    for number, stage in enumerate(stages):
        if not _is_finished(stage):
            if number == 0:  # nothing is finished, so there has to be a checkpoint
                run.find_checkpoint(Path(stage.output_dir), resume=True)
            return number
        now = (recipe if stage is stages[-1] else stage).digest()
        then = read_results(stage)["recipe_hash"]
        if now != then:
            raise TaidError(
                f"--resume: '{stage.output_dir}' was finished with another recipe (hash {then}, "
                f"now {now}; it lies there as recipe.yaml). Take the change back, or choose "
                "another output_dir.")
    return len(stages)


def _is_finished(stage: Recipe) -> bool:
    return (Path(stage.output_dir) / "results.json").exists()


def read_results(stage: Recipe) -> dict[str, Any]:
    path = Path(stage.output_dir) / "results.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TaidError(f"'{path}' is not a run's results: {error}") from error


def _account(recipe: Recipe, number: int, stage: Recipe) -> dict[str, Any]:
    """What the last stage's results tell about an earlier one."""
    results = read_results(stage)
    return {
        "name": (recipe.stages or ())[number].name,
        "folder": str(Path(stage.output_dir).relative_to(recipe.output_dir)),
        "recipe_hash": results["recipe_hash"],
        "steps": results["train"]["steps"],
        "eval": results["eval"],
    }


def _free_memory() -> None:
    """Give back what the models of a finished stage held."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
