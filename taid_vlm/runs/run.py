"""A run: recipe in; student, results.json and report.html out."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, set_seed

from taid_vlm.adapters import Processor, check_reloaded, make_adapter
from taid_vlm.alignment import check_modalities
from taid_vlm.config.data import DataSource
from taid_vlm.config.model import ModelSpec
from taid_vlm.config.recipe import Recipe
from taid_vlm.errors import TaidError
from taid_vlm.evaluation.answers import FILE as ANSWERS_FILE
from taid_vlm.evaluation.answers import to_lines
from taid_vlm.evaluation.canary import Looks, account
from taid_vlm.evaluation.held_out import Tally, summarise
from taid_vlm.io.files import write_json, write_text
from taid_vlm.io.folders import refuse_file_in_the_way, whole_or_absent
from taid_vlm.models.generation import generate_answers
from taid_vlm.models.loading import (
    load_config,
    load_model,
    load_processor,
    load_skeleton,
    sees_images,
)
from taid_vlm.models.lora import LoraFolder, check_names, is_adapter, write_merged
from taid_vlm.models.parts import count_parameters, freeze_parts
from taid_vlm.records import Record, Records, StreamedRecords, fingerprint, open_records
from taid_vlm.runs.results import SCHEMA, STUDENT_FOLDER, machine, peak_memory, versions
from taid_vlm.training.config import DistillationConfig, training_arguments
from taid_vlm.training.trainer import DistillationTrainer

logger = logging.getLogger(__name__)

# results, (questions, {who: answers}), the recipe as YAML, the page's path
WriteReport = Callable[[dict[str, Any], tuple[Any, Any], str, Path], None]


@dataclass(frozen=True)
class Ingredients:
    """What a recipe names, found and checked, before any weights are loaded."""

    args: DistillationConfig
    configs: Mapping[str, PretrainedConfig]  # by role
    train: Records | StreamedRecords
    eval: Any
    student_processor: Processor
    teacher_processor: Processor | None


@dataclass(frozen=True)
class Place:
    """Where a run stands among the stages of a recipe; the last one speaks for all of them."""

    whole: Recipe
    earlier: Sequence[Mapping[str, Any]]  # accounts of the stages before
    later: Sequence[Path]  # folders of the stages after, whose results no longer hold


def gather(recipe: Recipe) -> Ingredients:
    """Open data and processors; every mistake that can show without weights shows here."""
    args = training_arguments(recipe)
    adapter = lora_config(recipe.student.peft)
    if args.freeze or args.learning_rates or adapter is not None:
        skeleton = load_skeleton(recipe.student, "student")
        freeze_parts(skeleton, args.freeze, args.learning_rates)
        if adapter is not None:
            check_names(skeleton, adapter)
    configs = {"student": load_config(recipe.student, "student")}
    if recipe.teacher is not None:
        configs["teacher"] = load_config(recipe.teacher, "teacher")
    train = _open(recipe.data.train, recipe)
    held_out: Any = None if recipe.data.eval is None else _open(recipe.data.eval, recipe)
    if isinstance(train, StreamedRecords) and args.max_steps <= 0:
        raise TaidError("data.train is streamed, so its length is not known: set train.max_steps.")
    if held_out is None and args.eval_strategy != "no":
        raise TaidError(f"train.eval_strategy = '{args.eval_strategy}', but there is no data.eval.")
    if isinstance(held_out, StreamedRecords):
        if recipe.data.eval is None or recipe.data.eval.max_records is None:
            raise TaidError("data.eval is streamed: set data.eval.max_records.")
        held_out = list(held_out)
    sides = [side for side in (train, held_out) if side is not None]
    _refuse_blind(configs, any(_has_images(side) for side in sides))
    student = load_processor(recipe.student, "student")
    teacher = None if recipe.teacher is None else load_processor(recipe.teacher, "teacher")
    return Ingredients(args, configs, train, held_out, student, teacher)


def distill(
    recipe: Recipe, resume: bool = False, place: Place | None = None,
    report: WriteReport | None = None,
) -> dict[str, Any]:
    """Carry out a recipe; one with stages is for `taid_vlm.runs.stages.distill_stages`.

    Args:
        resume: go on from the last whole checkpoint in `output_dir`.
        place: which stage `recipe` is, if it is one.
        report: writes report.html, if one is wanted.

    Returns:
        What was written to results.json. On disk: `student/` (loads with plain Auto classes),
        `recipe.yaml`, `eval_answers.jsonl`, `results.json`.

    Raises:
        TaidError: anything a user can mend, with nothing half-written left behind.
    """
    if recipe.stages:
        raise TaidError("a recipe with stages is carried out by `distill_stages`.")
    ingredients, output = gather(recipe), Path(recipe.output_dir)
    args, told = ingredients.args, place.whole if place and not place.later else recipe
    checkpoint = find_checkpoint(output, resume)
    set_seed(args.seed)
    student = load_model(recipe.student, "student")
    teacher = None if recipe.teacher is None else load_model(recipe.teacher, "teacher")
    trainer = DistillationTrainer(
        student, teacher, args, ingredients.train, ingredients.eval,
        ingredients.student_processor, ingredients.teacher_processor,
        peft_config=lora_config(recipe.student.peft),
    )
    if trainer.is_world_process_zero():
        if checkpoint is None:
            clear_results(output)
        for later in place.later if place else ():
            clear_results(later)
        write_text(told.resolved().to_yaml(), output / "recipe.yaml")
    trainer.accelerator.wait_for_everyone()
    results = _measure(trainer, recipe, ingredients, checkpoint)
    results |= {"recipe_hash": told.digest(), "stages": list(place.earlier) if place else []}
    base = _base_to_merge(recipe, place)
    if recipe.student.peft is not None:
        results["models"]["student"]["saved"] = "adapter" if base is None else "merged"
    save_student(trainer, output / STUDENT_FOLDER, base)
    if trainer.is_world_process_zero():
        examples, answers = results.pop("_examples"), results.pop("_answers")
        if answers is not None:
            write_text(answers, output / ANSWERS_FILE)
        write_json(results, output / "results.json")
        if report is not None:
            report(results, examples, told.to_yaml(), output / "report.html")
    trainer.accelerator.wait_for_everyone()
    return results


def _measure(
    trainer: DistillationTrainer, recipe: Recipe, ingredients: Ingredients, checkpoint: Path | None
) -> dict[str, Any]:
    """Evaluate, train, evaluate; and all that there is to say about it."""
    questions = _questions(trainer, ingredients.eval, recipe.evaluate.examples)
    before, first_look = _tally(trainer, ingredients.eval), _look(trainer, ingredients.eval)
    answers = {"teacher": _answers(trainer, "teacher", questions, recipe),
               "before": _answers(trainer, "student", questions, recipe)}
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.perf_counter() - started
    answers["after"] = _answers(trainer, "student", questions, recipe)
    after, last_look = _tally(trainer, ingredients.eval), _look(trainer, ingredients.eval)
    schedule = trainer.schedule
    return {
        "schema": SCHEMA,
        "objective": recipe.objective,
        "seed": trainer.args.seed,
        "data": {"eval": _data(recipe.data.eval, ingredients.eval)},
        "eval": {when: tally and summarise(tally)
                 for when, tally in (("before", before), ("after", after))},
        "canary": account(first_look, last_look),
        "alignment": _alignment(trainer),
        "models": _models(trainer, recipe),
        "train": {
            "steps": trainer.state.global_step,
            "resumed_from": checkpoint and checkpoint.name,
            "seconds": seconds,
            "answer_tokens": trainer.answer_tokens,
            "records_left_out": trainer.all_dropped(),
            "texts_cut": trainer.cut,
            "t": schedule and schedule.t,
            "alpha": schedule and schedule.alpha,
            "adaptive_share": schedule and schedule.active_share,
            "skipped_updates": schedule and schedule.state.skipped,
        },
        "memory": peak_memory(),
        "machine": {**machine(), "processes": trainer.accelerator.num_processes},
        "versions": versions(),
        "history": trainer.state.log_history,
        "examples": _examples(questions, answers),
        "_examples": (questions, answers),
        "_answers": before and after and to_lines(before.answers, after.answers),
    }


# ----- before training ----------------------------------------------------------------------


def _open(source: DataSource, recipe: Recipe) -> Records | StreamedRecords:
    try:
        return open_records(source, recipe.start_of(source))
    except TaidError as error:
        side = "train" if source is recipe.data.train else "eval"
        raise type(error)(str(error).replace("data: ", f"data.{side}: ", 1)) from error


def _has_images(records: Any) -> bool:
    if isinstance(records, list):
        return any(record.images for record in records if isinstance(record, Record))
    return records.has_images


def _refuse_blind(configs: Mapping[str, Any], images: bool) -> None:
    blind = [role for role, config in configs.items() if not sees_images(config)]
    check_modalities(blind, images)


def find_checkpoint(output: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from; a fresh start never walks over an unfinished run."""
    refuse_file_in_the_way(output)
    last, finished = last_checkpoint(output), (output / "results.json").exists()
    if resume:
        if last is None:
            raise TaidError(f"--resume: '{output}' holds no whole checkpoint.")
        return last
    if last is not None and not finished:
        raise TaidError(f"'{output}' holds {last.name} of an unfinished run: continue it with "
                        "--resume, or choose another output_dir.")
    return None


def clear_results(output: Path) -> None:
    """Take away what an earlier, finished run left, so that this one cannot pass for finished."""
    if (output / "results.json").exists():
        logger.warning("'%s' holds a finished run; its results are replaced.", output)
        (output / "results.json").unlink()
        (output / ANSWERS_FILE).unlink(missing_ok=True)
    for folder in output.glob("checkpoint-*"):
        shutil.rmtree(folder)


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written whole (its trainer state comes last)."""
    found = [folder for folder in output.glob("checkpoint-*")
             if folder.name.removeprefix("checkpoint-").isdigit()
             and (folder / "trainer_state.json").exists()]
    return max(found, key=lambda folder: int(folder.name.rsplit("-", 1)[1]), default=None)


def lora_config(config: Mapping[str, Any] | None) -> Any:
    """The LoraConfig that `student.peft` stands for; raises TaidError for keys it lacks."""
    if config is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise TaidError("student.peft needs the peft library: pip install 'taid-vlm[peft]'."
                        ) from None
    valid = [f.name for f in dataclasses.fields(LoraConfig)]
    for key in config:
        if key not in valid:
            match = difflib.get_close_matches(key, [*valid, "rank"], n=1)
            hint = "r" if match == ["rank"] else "".join(match)
            raise TaidError(f"student.peft has no key '{key}'. Did you mean '{hint}'?")
    return LoraConfig(**config)


# ----- figures ------------------------------------------------------------------------------


def _tally(trainer: DistillationTrainer, records: Any) -> Tally | None:
    return None if records is None else trainer.tally(records, keep_answers=True)


def _data(source: DataSource | None, records: Any) -> dict[str, Any] | None:
    """What the held-out figures are of; two runs with one hash were measured on the same."""
    if source is None:
        return None
    return {"path": source.path, "split": source.split, "records": len(records),
            "sha256": fingerprint(records)}


def _examples(
    questions: list[tuple[Record, int]], answers: Mapping[str, list[str]]
) -> list[dict[str, Any]]:
    """Questions with their answers as text; the images are in the report."""
    return [{"source": record.source, "turn": turn, "category": record.category(turn),
             "prompt": record.question(turn), "reference": record.answers[turn],
             "answers": {name: texts[index] for name, texts in answers.items() if texts}}
            for index, (record, turn) in enumerate(questions)]


def _look(trainer: DistillationTrainer, records: Any) -> Looks:
    return {} if records is None else trainer.look(records)


def _alignment(trainer: DistillationTrainer) -> dict[str, Any] | None:
    pairing = trainer.pairing
    if pairing is None:
        return None
    return {"case": pairing.case, "reason": pairing.reason, "warnings": list(pairing.warnings)}


def _models(trainer: DistillationTrainer, recipe: Recipe) -> dict[str, Any]:
    described = {}
    for role, spec, model in (("teacher", recipe.teacher, trainer.teacher_model),
                              ("student", recipe.student, trainer.model)):
        if spec is not None and model is not None:
            described[role] = {
                "name": spec.model_name_or_path, "revision": spec.revision,
                "model_type": trainer.accelerator.unwrap_model(model).config.model_type,
                "parameters": sum(p.numel() for p in model.parameters()),
            }
    described["student"]["parts"] = count_parameters(trainer.model)
    return described


def _questions(
    trainer: DistillationTrainer, records: Any, number: int
) -> list[tuple[Record, int]]:
    """The first answer of the first conversations that can be used."""
    usable = trainer.collator.usable(records or (), lambda record: record.messages)
    return [(record, 0) for record in islice(usable, number)]


def _answers(
    trainer: DistillationTrainer, role: str, questions: list[tuple[Record, int]], recipe: Recipe
) -> list[str]:
    """Greedy answers, on the main process only (nothing is trained or sharded here)."""
    model = trainer.teacher_model if role == "teacher" else trainer.model
    adapter = getattr(trainer.collator, role)
    if not questions or model is None or not trainer.is_world_process_zero():
        return []
    plain: PreTrainedModel = trainer.accelerator.unwrap_model(model)
    with torch.random.fork_rng():
        return generate_answers(plain.to(trainer.args.device), adapter, questions,
                                max_new_tokens=recipe.evaluate.max_new_tokens)


# ----- the student on disk ------------------------------------------------------------------


def _base_to_merge(recipe: Recipe, place: Place | None) -> ModelSpec | None:
    """What an adapter is merged into before it is saved: a base that an adapter's folder must not
    depend on, another adapter or the student of an earlier stage."""
    if recipe.student.peft is None:
        return None
    inner = is_adapter(recipe.student.model_name_or_path) or bool(place and place.earlier)
    return recipe.student if inner else None


def save_student(
    trainer: DistillationTrainer, folder: Path, base: ModelSpec | None = None
) -> None:
    """Write model and processor, check that they load as they were, and only then put them in
    place.

    Args:
        base: an adapter is merged into this model, and written with all its weights.
    """
    main = trainer.is_world_process_zero()
    with whole_or_absent(folder, "the student could not be saved to '{}'", main) as partial:
        trainer.accelerator.wait_for_everyone()  # the main process has emptied it
        trainer.save_model(str(partial))
        if main:
            (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle nobody needs
            if base is not None:
                write_merged(load_model(base, "student"), LoraFolder(partial, base), "student")
                logger.info("'%s' holds all weights: the adapter was trained on '%s', and is "
                            "merged into it.", folder, base.model_name_or_path)
            _check_reload(trainer, partial)
            shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def _check_reload(trainer: DistillationTrainer, folder: Path) -> None:
    """Warn of a tokenizer that is not the same when it is loaded by its model's type."""
    from transformers import AutoProcessor, AutoTokenizer

    ours = trainer.collator.student
    auto = AutoProcessor if ours.sees_images else AutoTokenizer
    again = make_adapter(auto.from_pretrained(str(folder)), "student")
    check_reloaded(
        ours.tokenizer, again.tokenizer, "Saving and loading the tokenizer that was trained with",
        "transformers rebuilds it by the model's type; save the tokenizer that belongs to this "
        "model type.", fatal=False)
