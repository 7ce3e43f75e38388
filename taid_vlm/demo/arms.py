"""The arms of the demo: ordinary runs, and what their students answer to held-out questions.

    runs/demo/scenes/TAID/               a run of `taid-vlm distill`; its recipe.yaml repeats it
    runs/demo/scenes/questions/TAID/     its student's answers, as `taid-vlm evaluate` writes them;
                                         beside it Teacher and Base (the student before training)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from taid_vlm.benchmarks.asking import Asking
from taid_vlm.benchmarks.candidates import Candidate
from taid_vlm.benchmarks.evaluate import evaluate
from taid_vlm.compare import Method, read_method, read_reference
from taid_vlm.compare.measures import BASE, TEACHER
from taid_vlm.config.data import DataSource
from taid_vlm.config.recipe import Recipe, parse_recipe
from taid_vlm.demo.truth import questions_task
from taid_vlm.models.loading import ModelSpec
from taid_vlm.report.run import write_run_report
from taid_vlm.runs.folders import STUDENT
from taid_vlm.runs.run import distill

OBJECTIVES: dict[str, dict[str, Any]] = {
    "SFT": {"name": "sft"},
    "KL": {"name": "forward_kl"},
    "RKL": {"name": "reverse_kl"},
    "TAID": {"name": "taid"},
}


@dataclass(frozen=True)
class World:
    """One half of the demo, or the real one.

    objectives: names of its trained arms. records: held-out records measured. questions: how many
    of theirs are answered freely, 0 where no one right answer is known. examples: how many are, in
    every run's own report. bf16: whether products are.
    """

    name: str
    title: str
    suffix: str
    objectives: Sequence[str] = tuple(OBJECTIVES)
    steps: int = 250
    batch_size: int = 16
    eval_batch_size: int = 50
    learning_rate: float = 2e-3
    records: int = 400
    questions: int = 1000
    examples: int = 12
    max_new_tokens: int = 48
    bf16: bool = False

    @property
    def rows(self) -> list[str]:
        """Of the comparison: the arms that train, and what they are measured by."""
        return [*self.objectives, *((TEACHER, BASE) if self.questions else ())]

    def held_out(self, data: Path) -> DataSource:
        return DataSource(path=str(data / self.name / f"eval.{self.suffix}"),
                          max_records=self.records)


WORLDS = (
    World("scenes", "Drawn scenes", "parquet"),
    World("words", "Scenes told in words", "jsonl"),
)


@dataclass(frozen=True)
class Arm:
    """One row of the comparison, carried out by one worker process.

    objective: what trains it; None for Teacher and Base, which are what they are.
    """

    world: World
    name: str
    data: Path
    models: Path
    output: Path
    seed: int
    objective: Mapping[str, Any] | None = None

    @property
    def run(self) -> Path:
        return self.output / self.world.name / self.name

    @property
    def answers(self) -> Path:
        return self.output / self.world.name / "questions" / self.name

    @property
    def model(self) -> Path:
        """Who answers the questions."""
        role = "teacher" if self.name == TEACHER else "student"
        return self.run / STUDENT if self.objective else self.models / f"{self.world.name}-{role}"

    def recipe(self) -> Recipe:
        """All arms share everything but the objective."""
        world, held_out = self.world, self.world.held_out(self.data)
        teacher = str(self.models / f"{world.name}-teacher")
        half = {"bf16": True} if world.bf16 else {}
        return parse_recipe({
            "teacher": {"model_name_or_path": teacher, "dtype": "bfloat16"} if half else teacher,
            "student": str(self.models / f"{world.name}-student"),
            "data": {
                "train": str(self.data / world.name / f"train.{world.suffix}"),
                "eval": {"path": held_out.path, "max_records": held_out.max_records},
            },
            "objective": dict(self.objective or {}),
            "train": {
                "max_steps": world.steps, "per_device_train_batch_size": world.batch_size,
                "per_device_eval_batch_size": world.eval_batch_size,
                "learning_rate": world.learning_rate,
                "lr_scheduler_type": "cosine", "warmup_steps": 10, "logging_steps": 10,
                "save_strategy": "no", "seed": self.seed, "disable_tqdm": True, "use_cpu": True,
                **half,
            },
            "evaluate": {"examples": world.examples, "max_new_tokens": world.max_new_tokens,
                         "canary": 0},
            "output_dir": str(self.run),
        })


def carry_out(arm: Arm) -> Method:
    """Train (where the arm trains) and ask; what came of it is read from its folders."""
    torch.set_num_threads(1)  # as many workers as cores run side by side
    PartialState(cpu=True)
    if arm.objective:
        distill(arm.recipe(), report=write_run_report)
    if arm.world.questions:
        spec = ModelSpec(model_name_or_path=str(arm.model), dtype="float32")
        evaluate([Candidate(arm.name, spec)],
                 [questions_task(arm.world.held_out(arm.data), arm.world.questions)],
                 arm.answers, Asking(batch_size=100))
    if arm.name in (TEACHER, BASE):
        return read_reference(arm.name, arm.answers)
    folders = [arm.run, *([arm.answers] if arm.world.questions else [])]
    return read_method(f"{arm.name}={','.join(map(str, folders))}")
