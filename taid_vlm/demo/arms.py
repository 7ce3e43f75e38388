"""One arm of the demo: a student trained by one objective from the shared warm start, measured.

Every arm is an ordinary recipe, written into its output folder, so that
`taid-vlm distill runs/demo/scenes/TAID/recipe.yaml` repeats it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from taid_vlm.adapters import ModelAdapter
from taid_vlm.config.recipe import Recipe, parse_recipe
from taid_vlm.evaluation.held_out import AnswerTotals, Tally, evaluate_pair, summarise
from taid_vlm.evaluation.statistics import mean_of
from taid_vlm.io.files import write_text
from taid_vlm.io.jsonl import read_lines
from taid_vlm.models.generation import generate_answers
from taid_vlm.models.loading import load_model
from taid_vlm.records import Record, first_rows
from taid_vlm.runs.run import gather, save_student
from taid_vlm.training.trainer import DistillationTrainer

TEACHER, START = "Teacher", "Warm start"
OBJECTIVES: dict[str, dict[str, Any]] = {
    "SFT": {"name": "sft"},
    "KL": {"name": "forward_kl"},
    "RKL": {"name": "reverse_kl"},
    "TAID": {"name": "taid"},
}
CAPTION = "caption"
EXAMPLES = 24  # records whose answers go into the gallery


@dataclass(frozen=True)
class World:
    """One half of the demo.

    records: held-out records measured; questions: how many of theirs are answered freely.
    """

    name: str
    title: str
    suffix: str
    steps: int = 250
    batch_size: int = 16
    learning_rate: float = 2e-3
    records: int = 400
    questions: int = 1000


WORLDS = (
    World("scenes", "Vision-language: drawn scenes", "parquet"),
    World("words", "Text: scenes told in words", "jsonl"),
)


@dataclass(frozen=True)
class Job:
    """What one worker process is handed.

    arm: a key of OBJECTIVES, START or TEACHER, or any name with an `objective` of its own.
    """

    world: World
    arm: str
    data: Path
    models: Path
    output: Path
    seed: int
    objective: Mapping[str, Any] | None = None

    @property
    def trained_by(self) -> dict[str, Any] | None:
        """The objective of an arm that trains."""
        return dict(self.objective) if self.objective else OBJECTIVES.get(self.arm)


def run_arm(job: Job) -> dict[str, Any]:
    """Train (where the arm trains) and measure; all plain data, ready for results.json."""
    torch.set_num_threads(1)  # as many workers as cores run side by side
    recipe = arm_recipe(job)
    set_seed(job.seed)
    ingredients, started = gather(recipe), time.perf_counter()
    assert recipe.teacher is not None
    trainer = DistillationTrainer(
        load_model(recipe.student, "student"), load_model(recipe.teacher, "teacher"),
        ingredients.args, ingredients.train, ingredients.eval,
        ingredients.student_processor, ingredients.teacher_processor)
    if job.trained_by:
        trainer.train()
        write_text(recipe.to_yaml(), Path(recipe.output_dir) / "recipe.yaml")
        save_student(trainer, Path(recipe.output_dir) / "student")
    trained = time.perf_counter()
    measured = _measure(job, trainer, ingredients.eval)
    return {
        "arm": job.arm, "world": job.world.name, **measured,
        "recipe": recipe.to_yaml(), "recipe_hash": recipe.digest(),
        "alignment": f"case {trainer.pairing.case}: {trainer.pairing.reason}",  # type: ignore[union-attr]
        "history": trainer.state.log_history, "train_seconds": trained - started,
        "evaluate_seconds": time.perf_counter() - trained,
        "adaptive_share": trainer.schedule.active_share if trainer.schedule else None,
        "left_out": trainer.all_dropped(),
    }


def arm_recipe(job: Job) -> Recipe:
    """The arm as a recipe: all arms share everything but the objective."""
    world, data, models = job.world, job.data / job.world.name, job.models
    return parse_recipe({
        "teacher": {"model_name_or_path": str(models / f"{world.name}-teacher")},
        "student": {"model_name_or_path": str(models / f"{world.name}-student")},
        "data": {
            "train": str(data / f"train.{world.suffix}"),
            "eval": {"path": str(data / f"eval.{world.suffix}"), "max_records": world.records},
        },
        "objective": job.trained_by or {"name": "taid"},
        "train": {
            "max_steps": world.steps, "per_device_train_batch_size": world.batch_size,
            "per_device_eval_batch_size": 50, "learning_rate": world.learning_rate,
            "lr_scheduler_type": "cosine", "warmup_steps": 10, "logging_steps": 10,
            "save_strategy": "no", "seed": job.seed, "disable_tqdm": True, "use_cpu": True,
        },
        "output_dir": str(job.output / world.name / job.arm),
    })


# ----- measuring ----------------------------------------------------------------------------


def _measure(job: Job, trainer: DistillationTrainer, records: Sequence[Record]) -> dict[str, Any]:
    collator = trainer.collator
    if job.arm == TEACHER:
        assert collator.teacher is not None
        model, adapter = trainer.teacher_model, collator.teacher
        tally = Tally()
    else:
        model, adapter = trainer.model, collator.student
        tally = evaluate_pair(trainer.model, trainer.teacher, records, collator, trainer.pairing,
                              batch_size=50, keep_answers=True)
    answers = _free_answers(job, model, adapter, records)
    return {"figures": summarise(tally) if tally.answers else {}, "answers": answers,
            "losses": [_loss(a) for a in tally.answers],
            "accuracy": _accuracy(answers)}


def _loss(answer: AnswerTotals) -> dict[str, Any]:
    """One answer's likelihoods under both models, KL and agreement, summed over its tokens."""
    kept = ("nll", "teacher_nll", "kl", "agreement")
    return {"source": answer.source, "turn": answer.turn, "category": answer.category,
            "tokens": answer.tokens, **{name: answer.totals[name] for name in kept}}


def _free_answers(
    job: Job, model: PreTrainedModel, adapter: ModelAdapter, records: Sequence[Record]
) -> list[dict[str, Any]]:
    """Greedy answers: to the first questions, and to every turn of the gallery's records."""
    rows: list[Any] = list(first_rows(records))
    asked = [(record, turn) for record in rows for turn in range(len(record.answers))]
    gallery = {record.source for record in rows[:EXAMPLES]}
    questions = [q for q in asked if q[0].category(q[1]) != CAPTION][: job.world.questions]
    questions += [q for q in asked if q[0].category(q[1]) == CAPTION and q[0].source in gallery]
    given = generate_answers(model, adapter, questions, max_new_tokens=48, batch_size=100)
    return [{"source": r.source, "turn": turn, "category": r.category(turn),
             "reference": r.answers[turn], "answer": answer, "right": answer == r.answers[turn]}
            for (r, turn), answer in zip(questions, given, strict=True)]


def _accuracy(answers: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | int]]:
    """Share of right answers with its standard error, over all questions ("") and by category;
    empty where nothing was asked (plain text)."""
    scored = [a for a in answers if a["category"] != CAPTION]
    if not scored:
        return {}
    groups = {"": scored} | {c: [a for a in scored if a["category"] == c]
                             for c in sorted({a["category"] for a in scored})}
    return {name: vars(mean_of([a["right"] for a in group])) for name, group in groups.items()}


def caption_entropies(job: Job) -> dict[str, float]:
    """-log p(caption | scene) in nats of every held-out record, by the record's source."""
    path = job.data / job.world.name / f"eval.{job.world.suffix}"
    if job.world.suffix == "jsonl":
        return {f"{path.name}:{i}": -row["caption_log_probability"]
                for i, (_, row) in enumerate(read_lines(path), start=1)}
    import pyarrow.parquet

    column = pyarrow.parquet.read_table(path, columns=["caption_log_probability"]).column(0)
    return {f"{path.name}[{i}]": -float(value) for i, value in enumerate(column.to_pylist())}
