"""A run: recipe in; student, results.json and report.html out."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import set_seed

from taid_vlm.config.model import ModelSpec, TeacherSpec
from taid_vlm.config.recipe import Recipe
from taid_vlm.errors import TaidError
from taid_vlm.evaluation.held_out import summarise
from taid_vlm.io.files import write_text
from taid_vlm.models.loading import load_model, load_skeleton
from taid_vlm.models.lora import find_adapter
from taid_vlm.models.quantization import half_precision, refuse_unavailable
from taid_vlm.objectives import parse_objective
from taid_vlm.runs.folders import (
    ANSWERS,
    RECIPE,
    REPORT,
    RESULTS,
    STUDENT,
    clear_results,
    find_checkpoint,
    locked,
    on_main,
    refuse_in_the_way,
)
from taid_vlm.runs.ingredients import Ingredients, gather, lora_config
from taid_vlm.runs.measure import Outcome, Progress, make_measuring, outcome_of, train_account
from taid_vlm.runs.narration import Narrator, TaidCurves, opening
from taid_vlm.runs.publish import Push, prepare_push, push_student
from taid_vlm.runs.results import Stage
from taid_vlm.runs.save import save_student
from taid_vlm.runs.sharing import in_words, sharing
from taid_vlm.teachers import ServedTeacher, TeacherInStudent
from taid_vlm.training.engine import Engine
from taid_vlm.training.pair import refuse_absent
from taid_vlm.training.several import of_teacher
from taid_vlm.training.trainer import DistillationTrainer

logger = logging.getLogger(__name__)

WriteReport = Callable[[Outcome, str, Path], None]  # with the recipe as YAML and the page's path


@dataclass(frozen=True)
class Place:
    """Where a run stands among the stages of a recipe; the last one speaks for all of them."""

    whole: Recipe
    earlier: Sequence[Stage]  # accounts of the stages before
    later: Sequence[Path]  # folders of the stages after, whose results no longer hold
    push: Push | None = None  # where the last one's student goes


def distill(
    recipe: Recipe, resume: bool = False, place: Place | None = None,
    report: WriteReport | None = None, overwrite: bool = False,
) -> Outcome:
    """Carry out a recipe; one with stages is for `taid_vlm.runs.stages.distill_stages`.

    Args:
        resume: go on from the last whole checkpoint in `output_dir`.
        place: which stage `recipe` is, if it is one.
        report: writes report.html, if one is wanted.
        overwrite: a finished run in `output_dir` may be replaced.

    Returns:
        What the run comes to. On disk, in this order: `recipe.yaml`, `student/` (loads with plain
        Auto classes), `eval_answers.jsonl`, `results.json`, report.html; then `student/` on the
        hub, with `train.push_to_hub`.

    Raises:
        TaidError: anything a user can mend, with nothing half-written left behind. Once the student
            is saved, whatever fails: it stays.
    """
    if recipe.stages:
        raise TaidError("a recipe with stages is carried out by `distill_stages`.")
    output, whole = Path(recipe.output_dir), place.whole if place and not place.later else recipe
    on_main(lambda: refuse_in_the_way(output), output)
    ingredients = gather(recipe)
    for role, spec in (("student", recipe.student), *recipe.teacher_specs.items()):
        refuse_unavailable(spec, role)
    with locked(output):
        checkpoint = on_main(lambda: find_checkpoint(recipe, resume, overwrite), output)
        push = place.push if place else prepare_push(recipe, saves_adapter(recipe))
        outcome = _carry_out(recipe, ingredients, checkpoint, whole, place, report)
        if push is not None:
            push_student(push, output / STUDENT)
    return outcome


def _carry_out(
    recipe: Recipe, ingredients: Ingredients, checkpoint: Path | None, whole: Recipe,
    place: Place | None, report: WriteReport | None,
) -> Outcome:
    output = Path(recipe.output_dir)
    trainer = _make_trainer(recipe, ingredients)
    trainer.recipe = recipe.resolved().tree()
    _take_over(trainer, whole, [*([] if checkpoint else [output]), *(place.later if place else ())])
    measure = make_measuring(trainer, recipe, ingredients.eval)
    before = measure("teacher", "student")
    if before.tally is not None:
        refuse_absent(trainer.args.metric_for_best_model, summarise(before.tally))
    progress = Progress(measure)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.perf_counter() - started
    base = _base_to_merge(recipe, place)
    save_student(trainer, output / STUDENT, base)
    with _student_is_safe(output / STUDENT):
        train = train_account(trainer, seconds, checkpoint, measure.records)
        outcome = outcome_of(measure, before, measure("student"), progress, train,
                             whole.digest(), place.earlier if place else ())
        if recipe.student.peft is not None:
            outcome = _saved_as(outcome, "adapter" if base is None else "merged")
        if trainer.is_world_process_zero():
            _write(outcome, output, whole.to_yaml(), report)
    trainer.accelerator.wait_for_everyone()
    return outcome


def saves_adapter(recipe: Recipe, stage: int = 0) -> bool:
    """Whether `student/` holds an adapter alone. Its folder must not depend on another adapter or
    on the student of an earlier stage: on those it is merged."""
    return (recipe.student.peft is not None and not stage
            and find_adapter(recipe.student, "student") is None)


def _base_to_merge(recipe: Recipe, place: Place | None) -> ModelSpec | None:
    """What an adapter is merged into before it is saved."""
    if recipe.student.peft is None or saves_adapter(recipe, len(place.earlier) if place else 0):
        return None
    return recipe.student


def _saved_as(outcome: Outcome, saved: str) -> Outcome:
    models = outcome.results.models
    student = models["student"].model_copy(update={"saved": saved})
    return replace(outcome, results=outcome.results.model_copy(
        update={"models": {**models, "student": student}}))


def _make_trainer(recipe: Recipe, ingredients: Ingredients) -> DistillationTrainer:
    set_seed(ingredients.args.seed)
    teachers: dict[str, Any] = dict(ingredients.caches)
    for key, spec in recipe.teacher_specs.items():
        if spec.server is not None:  # refused before the student is loaded
            teachers[key] = _served(key, spec)
    on_policy = parse_objective(ingredients.args.objective).on_policy
    if on_policy is not None and on_policy.engine is not None:  # refused before, too
        Engine(on_policy.engine, recipe.output_dir)
    half = half_precision(ingredients.args)
    student = load_model(recipe.student, "student", half)
    shared = sharing(recipe, ingredients)
    for key, spec in recipe.teacher_specs.items():
        if shared is not None and not shared.reason:
            teachers[key] = TeacherInStudent(student, shared.adapter)
        elif key not in teachers:
            teachers[key] = load_model(spec, key, half)
    sentence = "" if shared is None else in_words(shared, student)
    trainer = DistillationTrainer(
        student, recipe.of_teachers(teachers), ingredients.args, ingredients.train,
        ingredients.eval, ingredients.student_processor, ingredients.teacher_processor,
        peft_config=lora_config(recipe.student.peft),
    )
    Narrator(trainer)
    TaidCurves(trainer)
    if trainer.is_world_process_zero():
        for line in filter(None, (*opening(trainer, recipe), sentence)):
            logger.info(line)
    return trainer


def _served(key: str, spec: TeacherSpec) -> ServedTeacher:
    assert spec.server is not None
    try:
        return ServedTeacher(spec.server, load_skeleton(spec, key))
    except TaidError as error:
        raise of_teacher(error, key) from error


def _take_over(trainer: DistillationTrainer, whole: Recipe, stale: Sequence[Path]) -> None:
    """Make the folder this run's, now that nothing can be refused any more; in `stale` ones no
    results hold."""
    if trainer.is_world_process_zero():
        for folder in stale:
            clear_results(folder)
        write_text(whole.resolved().to_yaml(), Path(trainer.args.output_dir) / RECIPE)
    trainer.accelerator.wait_for_everyone()


@contextlib.contextmanager
def _student_is_safe(folder: Path) -> Iterator[None]:
    """What fails inside only describes a student that has been saved."""
    try:
        yield
    except Exception as error:  # of whatever kind: out of memory, a disk that is full, a mistake
        problem = str(error) if isinstance(error, TaidError) else f"{type(error).__name__}: {error}"
        raise TaidError(f"the trained student is saved in '{folder}', but what describes the run "
                        f"could not be finished: {problem}") from error


def _write(outcome: Outcome, output: Path, recipe_yaml: str, report: WriteReport | None) -> None:
    if outcome.answers is not None:
        write_text(outcome.answers, output / ANSWERS)
    outcome.results.write(output / RESULTS)
    if report is not None:
        report(outcome, recipe_yaml, output / REPORT)
