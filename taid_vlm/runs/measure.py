"""What a run measures before and after training, and what it tells about itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from taid_vlm.config.data import listed
from taid_vlm.config.model import ModelSpec
from taid_vlm.config.recipe import Recipe
from taid_vlm.config.secrets import redact
from taid_vlm.errors import SampleDropped, TaidError
from taid_vlm.evaluation.answers import to_lines
from taid_vlm.evaluation.canary import Figures, Looks, account, canary, choose, in_own_words
from taid_vlm.evaluation.held_out import Tally, summarise
from taid_vlm.models.generation import Question, generate_answers
from taid_vlm.models.lora import own_parameters
from taid_vlm.models.parts import count_parameters
from taid_vlm.models.quantization import numel, stored_method
from taid_vlm.records import ImageRef, fingerprint
from taid_vlm.runs.machine import machine, peak_memory, versions
from taid_vlm.runs.results import Alignment, Example, HeldOutData, Results, Stage, Train
from taid_vlm.teachers import CachedTeacher, ServedTeacher, SharedTeacher, Teachers
from taid_vlm.training.on_policy import Rollouts
from taid_vlm.training.trainer import DistillationTrainer

PROGRESS = 3  # examples, where a recipe says nothing


@dataclass(frozen=True)
class Measured:
    """One moment of a run: figures of all held-out records, and answers to some questions.

    answers: by role.
    """

    tally: Tally | None
    looks: Looks
    answers: Mapping[str, list[str]]


@dataclass(frozen=True)
class Outcome:
    """What a run comes to.

    images: what the questions of `results.examples` are about, None for text.
    answers: the lines of eval_answers.jsonl; None without held-out records.
    """

    results: Results
    images: Sequence[ImageRef | None] = ()
    answers: str | None = None


@dataclass(frozen=True)
class Measuring:
    """How a run's models are measured. Moves no random state, no gradient and no schedule."""

    trainer: DistillationTrainer
    recipe: Recipe
    records: Any
    questions: Sequence[Question]

    def __call__(self, *roles: str) -> Measured:
        """Now; roles: which models answer the questions, "teacher" or "student"."""
        self.trainer.place_student()
        answers = {role: self.ask(role, self.questions) for role in roles}
        if self.records is None:
            return Measured(None, {}, answers)
        return Measured(self.trainer.tally(self.records, keep_answers=True),
                        self.trainer.look(self.records), answers)

    def ask(self, role: str, questions: Sequence[Question]) -> list[str]:
        """Greedy answers, the same in every process: a sharded model is asked by all at once."""
        trainer, model = self.trainer, model_of(self.trainer, role)
        if not questions or model is None:
            return []
        plain = trainer.accelerator.unwrap_model(model)
        try:
            with torch.random.fork_rng():
                return generate_answers(plain, getattr(trainer.collator, role), questions,
                                        max_new_tokens=self.recipe.evaluate.max_new_tokens)
        except SampleDropped as problem:
            raise TaidError(f"evaluate.examples: the {role} cannot be asked a question of "
                            f"data.eval: {problem}. Set evaluate.examples to 0.") from problem


class Progress(TrainerCallback, ExportableState):
    """What the student says to the first of the questions at every evaluation of a training.

    answers: by step; carried through checkpoints, so that none after the last one stays.
    """

    def __init__(self, measuring: Measuring) -> None:
        self.measuring, trainer = measuring, measuring.trainer
        number = measuring.recipe.evaluate.progress
        if number is None:
            number = 0 if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled else PROGRESS
        self.questions = measuring.questions[:number]
        self.answers: dict[int, list[str]] = {}
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        # of a checkpoint that was written without it there is nothing
        saved = state.stateful_callbacks.setdefault(type(self).__name__, {"attributes": {}})
        self.answers = {int(step): texts
                        for step, texts in saved["attributes"].get("answers", {}).items()}

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.answers[state.global_step] = self.measuring.ask("student", self.questions)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"answers": self.answers}}

    def of(self, index: int) -> dict[int, str]:
        """The answers to one of the questions."""
        return {step: texts[index] for step, texts in self.answers.items() if index < len(texts)}


def make_measuring(trainer: DistillationTrainer, recipe: Recipe, records: Any) -> Measuring:
    """With the first answer of the first conversations that both models can use."""
    usable = trainer.collator.usable(records or (), lambda record: record.messages)
    questions = [(record, record.learned[0]) for record in islice(usable, recipe.evaluate.examples)]
    return Measuring(trainer, recipe, records, questions)


def model_of(trainer: DistillationTrainer, role: str) -> Any:
    return trainer.teacher_model if role == "teacher" else trainer.model


# ----- results ------------------------------------------------------------------------------


def outcome_of(
    measuring: Measuring, before: Measured, after: Measured, progress: Progress, train: Train,
    recipe_hash: str, stages: Sequence[Stage],
) -> Outcome:
    """All that there is to say about a run that has been trained.

    Args:
        recipe_hash, stages: as in `Results`.
    """
    trainer, recipe = measuring.trainer, measuring.recipe
    answers = {"teacher": before.answers["teacher"], "before": before.answers["student"],
               "after": after.answers["student"]}
    results = Results.model_validate({
        "objective": recipe.objective, "seed": trainer.args.seed, "recipe_hash": recipe_hash,
        "data": {"eval": _data(recipe, measuring.records)},
        "eval": {when: moment.tally and summarise(moment.tally)
                 for when, moment in (("before", before), ("after", after))},
        "canary": account(before.looks, after.looks),
        "alignment": _alignment(trainer.pairing),
        "teachers": _teachers(trainer, recipe),
        "models": _models(trainer, recipe), "train": train, "memory": peak_memory(),
        "machine": {**machine(), "processes": trainer.accelerator.num_processes},
        "versions": versions(), "history": trainer.state.log_history,
        "examples": [_example(question, index, answers, progress.of(index))
                     for index, question in enumerate(measuring.questions)],
        "stages": list(stages),
    })
    results = Results.model_validate(redact(results.model_dump(by_alias=True)))
    lines = None if before.tally is None or after.tally is None else \
        to_lines(before.tally.answers, after.tally.answers)
    images = [record.images[0] if record.images else None for record, _ in measuring.questions]
    return Outcome(results, images, lines)


def train_account(
    trainer: DistillationTrainer, seconds: float, checkpoint: Path | None, records: Any
) -> Train:
    """What training did; records: held out, for the look of a student at its own answers."""
    schedule, rollouts = trainer.schedule, trainer.rollouts
    return Train.model_validate({
        "steps": trainer.state.global_step, "seconds": seconds,
        "resumed_from": None if checkpoint is None else checkpoint.name,
        "answer_tokens": trainer.answer_tokens, "records_left_out": trainer.all_dropped(),
        "without_effect": trainer.all_notes(),
        "texts_cut": trainer.cut, "unread_columns": trainer.all_unread(),
        "sources": trainer.intake.by_source(), "t": schedule and schedule.t,
        "alpha": schedule and schedule.alpha,
        "adaptive_share": schedule and schedule.active_share,
        "skipped_updates": schedule and schedule.state.skipped,
        "loss_implementation": trainer.loss_report, "skipped_steps": dict(trainer.guard.skipped),
        "on_policy": rollouts and rollouts.report() | {
            "look": own_look(trainer, rollouts, records or ()) or None},
    })


def own_look(trainer: DistillationTrainer, rollouts: Rollouts, dataset: Sequence[Any]) -> Figures:
    """`evaluation.canary.canary` of the student in answers that it samples itself."""
    adapter, options = trainer.collator.student, trainer.evaluation_options()
    say = partial(rollouts.say, model=trainer.model, size=options["batch_size"])
    records = choose(dataset, trainer.args.canary_records, trainer.collator)
    shown = in_own_words(adapter, records, say)
    return canary(trainer.model, adapter, [record for record, _ in shown],
                  rendered=[rendered for _, rendered in shown], **options)


def _data(recipe: Recipe, records: Any) -> HeldOutData | None:
    sources = listed(recipe.data.eval)
    return None if not sources else HeldOutData(
        path=", ".join(source.shown for source in sources), split=sources[0].split,
        records=len(records), sha256=fingerprint(records))


def _example(
    question: Question, index: int, answers: Mapping[str, list[str]], progress: dict[int, str]
) -> Example:
    record, turn = question
    return Example(
        source=record.source, turn=turn, category=record.category(turn),
        prompt=record.question(turn), reference=record.answers[turn],
        answers={role: texts[index] for role, texts in answers.items() if texts},
        progress=progress)


def _alignment(pairing: Any) -> Alignment | None:
    return None if pairing is None else Alignment.model_validate(pairing, from_attributes=True)


def _models(trainer: DistillationTrainer, recipe: Recipe) -> dict[str, dict[str, Any]]:
    student = _loaded(trainer, recipe.student, trainer.model)
    described = {"student": {**student, "parts": count_parameters(trainer.model)}}
    if trainer.teacher is None or isinstance(trainer.teacher, Teachers):
        return described
    (spec,) = recipe.teacher_specs.values()
    return {"teacher": _teacher(trainer, spec, trainer.teacher), **described}


def _teachers(trainer: DistillationTrainer, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Of several, by name: the model, and how it is compared."""
    teachers, by_name = trainer.teacher, recipe.teachers or {}
    return {} if not isinstance(teachers, Teachers) else {
        name: {"model": _teacher(trainer, by_name[name], teacher),
               "alignment": _alignment(teachers.pairings[name])}
        for name, teacher in teachers.by_name.items()}


def _teacher(trainer: DistillationTrainer, spec: ModelSpec, teacher: Any) -> dict[str, Any]:
    if isinstance(teacher, ServedTeacher):
        return {**teacher.report(), "model_type": teacher.skeleton.config.model_type,
                "parameters": sum(p.numel() for p in teacher.skeleton.parameters())}
    if isinstance(teacher, CachedTeacher):
        cache = teacher.cache
        return {**cache.identity["model"], "cache": {
            "folder": str(cache.folder), "identity": cache.facts["identity"],
            "signal": str(cache.signal), "bytes_per_token": cache.bytes_per_token}}
    shared = {"shared_parameters": teacher.shared_parameters} if isinstance(
        teacher, SharedTeacher) else {}
    return _loaded(trainer, spec, teacher.model) | shared


def _loaded(trainer: DistillationTrainer, spec: ModelSpec, model: Any) -> dict[str, Any]:
    parameters = own_parameters(model).values() if model is trainer.model else model.parameters()
    config = trainer.accelerator.unwrap_model(model).config
    return {"name": spec.model_name_or_path, "revision": spec.revision,
            "model_type": config.model_type, "parameters": sum(map(numel, parameters)),
            "quantization": spec.quantization or stored_method(config)}
