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
from collections.abc import Sequence
from pathlib import Path

import torch

from taid_vlm.config.model import StudentSpec
from taid_vlm.config.recipe import Recipe, StageSpec
from taid_vlm.config.training import of_hub
from taid_vlm.errors import RecipeError, TaidError, with_place
from taid_vlm.runs import run
from taid_vlm.runs.folders import (
    RESULTS,
    STUDENT,
    checkpoints,
    find_checkpoint,
    is_finished,
    on_main,
)
from taid_vlm.runs.ingredients import gather
from taid_vlm.runs.publish import prepare_push
from taid_vlm.runs.results import Results, Stage, read_results


def expand(recipe: Recipe) -> list[Recipe]:
    """The recipe of every stage, in order; a recipe without stages is its own only one."""
    stages, expanded = recipe.stages or (), list[Recipe]()
    for number, stage in enumerate(stages, start=1):
        last = number == len(stages)
        folder = recipe.output_dir if last else _folder(recipe, number, stage)
        expanded.append(recipe.model_copy(update={
            "stages": None, "output_dir": folder,
            "student": _start(recipe, expanded[-1].output_dir) if expanded else recipe.student,
            "train": {**recipe.train, **stage.train},
            "data": recipe.data.model_copy(update=stage.data),
            "objective": recipe.objective if stage.objective is None else stage.objective,
        }))
    return expanded or [recipe]


def parts_by_name(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """Every stage with its name ("" without stages), each on the first student: before a run,
    the later ones' own are not there."""
    names = [stage.name for stage in recipe.stages or ()] or [""]
    return [(name, part.model_copy(update={"student": recipe.student}))
            for name, part in zip(names, expand(recipe), strict=True)]


def _folder(recipe: Recipe, number: int, stage: StageSpec) -> str:
    return str(Path(recipe.output_dir) / "stages" / f"{number}-{stage.name}")


def _start(recipe: Recipe, folder: str) -> StudentSpec:
    """The student that lies in a stage's folder, with the processor that it was trained with."""
    spec = recipe.student
    return spec.model_copy(update={
        "model_name_or_path": str(Path(folder) / STUDENT),
        "processor_name_or_path": spec.processor_name_or_path or spec.model_name_or_path})


def distill_stages(
    recipe: Recipe, resume: bool = False, report: run.WriteReport | None = None,
    overwrite: bool = False,
) -> Results:
    """Carry out a recipe with or without stages.

    Args:
        resume: pass over the stages that are finished, and go on with the first that is not.
        report: writes every stage's report.html, if one is wanted.
        overwrite: a finished run in `output_dir` may be replaced.

    Returns:
        The results of the last stage; `stages` in them is an account of those before.

    Raises:
        TaidError: as `run.distill`; what can be checked of any stage is checked before the first.
    """
    if not recipe.stages:
        return run.distill(recipe, resume, None, report, overwrite).results
    stages = expand(recipe)
    _check(recipe)
    first, resumable = on_main(
        lambda: _start_at(recipe, stages, resume, overwrite), Path(recipe.output_dir))
    if first == len(stages):
        return _results(stages[-1])
    push = prepare_push(stages[-1], run.saves_adapter(recipe, len(stages) - 1))
    for number, stage in enumerate(stages[first:], start=first):
        earlier = [_account(recipe, *pair) for pair in enumerate(stages[:number])]
        later = [Path(other.output_dir) for other in stages[number + 1:]]
        place = run.Place(recipe, earlier, later, None if later else push)
        results = run.distill(stage, resumable, place, report, overwrite or resume).results
        resumable = False
        _free_memory()
    return results


def _check(recipe: Recipe) -> None:
    """Open what every stage needs."""
    for stage in (recipe.stages or ())[:-1]:
        for key in filter(of_hub, stage.train):
            raise RecipeError(f"stages '{stage.name}': train.{key}: only the last stage's student "
                              "is pushed. Write it under train.")
    for name, part in parts_by_name(recipe):
        try:
            gather(part)
        except TaidError as error:
            raise with_place(error, f"stages '{name}'") from error


def _start_at(
    recipe: Recipe, stages: Sequence[Recipe], resume: bool, overwrite: bool
) -> tuple[int, bool]:
    """Number of the stage to begin with, and whether it goes on from a checkpoint."""
    if not resume:
        return _fresh_start(stages, overwrite), False
    first = _first_unfinished(recipe, stages)
    return first, first < len(stages) and bool(checkpoints(Path(stages[first].output_dir)))


def _fresh_start(stages: Sequence[Recipe], overwrite: bool) -> int:
    """Number of the stage to begin with, 0; never over an unfinished run."""
    finished = [stage.output_dir for stage in stages if is_finished(Path(stage.output_dir))]
    if finished and finished[-1] != stages[-1].output_dir:
        raise TaidError(f"'{finished[-1]}' is a finished stage of an unfinished run: continue it "
                        "with --resume, or choose another output_dir.")
    for stage in stages:
        find_checkpoint(stage, False, overwrite)
    return 0


def _first_unfinished(recipe: Recipe, stages: Sequence[Recipe]) -> int:
    """Number of the stage to go on with (all finished: how many there are)."""
    for number, stage in enumerate(stages):
        if not is_finished(Path(stage.output_dir)):
            if number == 0 and not checkpoints(Path(stage.output_dir)):
                # nothing is finished, so there has to be one; if there is, its run looks at it
                find_checkpoint(stage, resume=True)
            return number
        now = (recipe if stage is stages[-1] else stage).digest()
        then = _results(stage).recipe_hash
        if now != then:
            raise TaidError(
                f"--resume: '{stage.output_dir}' was finished with another recipe (hash {then}, "
                f"now {now}; it lies there as recipe.yaml). Take the change back, or choose "
                "another output_dir.")
    return len(stages)


def _results(stage: Recipe) -> Results:
    return read_results(Path(stage.output_dir) / RESULTS)


def _account(recipe: Recipe, number: int, stage: Recipe) -> Stage:
    """What the last stage's results tell about an earlier one."""
    results = _results(stage)
    return Stage(name=(recipe.stages or ())[number].name,
                 folder=str(Path(stage.output_dir).relative_to(recipe.output_dir)),
                 recipe_hash=results.recipe_hash, steps=results.train.steps, eval=results.eval)


def _free_memory() -> None:
    """Give back what the models of a finished stage held."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
