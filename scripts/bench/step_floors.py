"""The trainer's whole step against what no step can do without, on the same rows and weights.

The trainer's own loop runs, and is held at the end of every optimizer step, where the parts of the
floor have their turn: each step of the trainer stands between two of the floor. All is in seconds
of processor time of the process.
"""

from __future__ import annotations

import copy
import gc
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from bench.common import markdown_table
from bench.implementations import ours
from bench.measure import make_floor
from bench.problem import Case, Problem
from bench.step_output import title
from bench.step_setup import Setup, make_pair
from bench.step_trainers import TRAINERS
from bench.step_worker import PeakMemory
from taid_vlm.models.forward import answer_hidden

WARM_UP = 3
FLOORS = ("trunk", "teacher", "products", "optimizer")  # together the floor
COLUMNS = ("pair", "whole step, CPU s", "x floor", "x parts", *FLOORS, "loss")


class Floors:
    """The parts of a step, one by one, on a copy of the student.

    trunk: the student's decoder (and tower) forward and backward, from hidden states' gradients.
    teacher: its hidden states. products: the four matrix products of the heads, as
    `bench_objective.py` has them. optimizer: one step of the trainer's own kind. loss: the fused
    objective alone, in the place of its products.
    """

    def __init__(self, setup: Setup, student: Any, teacher: Any, trainer: Any, rows: Any) -> None:
        self.student, self.teacher = student, teacher
        self.batch = trainer._prepare_inputs(trainer.data_collator(rows))
        self.autocast = trainer.accelerator.autocast
        kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args)
        self.optimizer = kind(student.parameters(), **options)
        self.gradient = torch.full_like(self._hidden(), 1e-3)
        self.answer_tokens = len(self.gradient)
        self.problem, case = self._problem(setup)
        self.floor, self.loss = make_floor(case, self.problem), ours(case)

    def _hidden(self) -> Tensor:
        with self.autocast():
            return answer_hidden(self.student, self.batch["student_inputs"],
                                 self.batch["student_mask"])

    def _problem(self, setup: Setup) -> tuple[Problem, Case]:
        """The heads' part of the step by itself."""
        dtype = torch.float32 if setup.dtype == "float32" else torch.bfloat16
        hidden, teacher = (x.detach().to(dtype) for x in (self._hidden(), self._teacher()))
        heads = [model.get_output_embeddings().weight.detach().to(dtype)
                 for model in (self.student, self.teacher)]
        mask = torch.ones(len(hidden), dtype=torch.bool)
        case = Case(len(hidden), len(hidden), len(heads[0]), hidden.shape[1], teacher.shape[1],
                    dtype, setup.objective)
        return Problem(hidden.requires_grad_(), heads[0].clone().requires_grad_(), teacher,
                       heads[1], mask, mask.nonzero()[:, 0]), case

    @torch.no_grad()
    def _teacher(self) -> Tensor:
        return answer_hidden(self.teacher, self.batch["teacher_inputs"],
                             self.batch["teacher_mask"])

    def run(self) -> dict[str, float]:
        """Seconds of processor time, by part."""
        took = {"trunk": _timed(lambda: self._hidden().backward(self.gradient)),
                "teacher": _timed(self._teacher),
                "products": _timed(lambda: self.floor(self.problem)),
                "loss": _timed(lambda: self.loss(self.problem).backward())}
        _, head = self.problem.take_gradients()
        own = self.student.get_output_embeddings().weight
        own.grad = head.to(own.dtype)
        took["optimizer"] = _timed(self.optimizer.step)
        self.optimizer.zero_grad()
        return took


def _timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


class Between(TrainerCallback):
    """Takes the time of the trainer's steps, with the floors' turn between them."""

    def __init__(self, make: Callable[[], Floors]) -> None:
        self.make, self.started = make, 0.0
        self.floors: Floors | None = None
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.memory, self.standing = PeakMemory("cpu"), 0
        self.taken: list[int] = []  # bytes that a step takes beside what stands before it

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        took = time.process_time() - self.started
        taken = (self.memory.peak() or 0) - self.standing
        self.floors = self.floors or self.make()
        parts = self.floors.run()
        if state.global_step > WARM_UP:
            for name, seconds in {**parts, "whole": took}.items():
                self.seconds[name].append(seconds)
            self.taken.append(taken)
        gc.collect()
        self.memory.restart()
        self.standing = self.memory.peak() or 0
        self.started = time.process_time()


def floors_of(setup: Setup, rounds: int) -> list[dict[str, Any]]:
    """One row: the whole step, the parts of its floor, and their ratio."""
    pair = make_pair(setup)
    student = copy.deepcopy(pair.models["student"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = TRAINERS["ours"](setup, pair, folder, WARM_UP + rounds)
        between = Between(lambda: Floors(setup, student, pair.models["teacher"], trainer,
                                         pair.rows))
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(between)
        trainer.train()
    assert between.floors is not None
    return [{**setup.described(), **compared(between.seconds), "rounds": rounds,
             "answer_tokens": between.floors.answer_tokens,
             "step_memory_bytes": median(between.taken)}]


def compared(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Medians over the rounds, and ratios of the whole step: to its floor, and to its parts, the
    floor with the fused loss in the place of the products."""
    floors, parts = ([sum(each) for each in zip(*(seconds[name] for name in names), strict=True)]
                     for names in (FLOORS, ("trunk", "teacher", "loss", "optimizer")))
    found: dict[str, Any] = {"cpu_seconds": median(seconds["whole"]), "floor": median(floors)}
    for name, below in (("floor", floors), ("parts", parts)):
        ratios = [a / b for a, b in zip(seconds["whole"], below, strict=True)]
        found |= {f"ratio_to_{name}": median(ratios),
                  f"ratio_to_{name}_spread": [min(ratios), max(ratios)]}
    return {**found, "parts": {name: median(seconds[name]) for name in (*FLOORS, "loss")}}


def floors_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    return markdown_table(COLUMNS, map(_cells, rows))


def _cells(row: Mapping[str, Any]) -> list[str]:
    ratios = [f"{row[key]:.3f} ({row[f'{key}_spread'][0]:.2f} to {row[f'{key}_spread'][1]:.2f})"
              for key in ("ratio_to_floor", "ratio_to_parts")]
    return [title(row), f"{row['cpu_seconds']:.3g}", *ratios,
            *(f"{seconds:.3f}" for seconds in row["parts"].values())]
