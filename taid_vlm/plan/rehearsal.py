"""A training step, rehearsed on tensors without values: what lies in memory, and when most.

The real DistillationTrainer trains for one optimizer step, on models of shapes and a real batch.
What it does with its batch, precision, frozen parts, adapters, recomputed activations and loss is
therefore what a run does, on a CPU: on a GPU other kernels keep about the same for backward.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from taid_vlm.alignment import Pairing
from taid_vlm.batch.collator import Batch
from taid_vlm.batch.forward import student_forward
from taid_vlm.evaluation.canary import compared
from taid_vlm.evaluation.held_out import teacher_figures
from taid_vlm.fused.work import Rows
from taid_vlm.models.forward import answer_logits, unwrap
from taid_vlm.models.head import LogitTransform, known_logit_transforms
from taid_vlm.models.parts import TOWER, frozen_modules
from taid_vlm.objectives import Objective
from taid_vlm.plan import ledger as kinds
from taid_vlm.plan.ledger import Ledger
from taid_vlm.plan.shapes import Shapes
from taid_vlm.teachers import CachedTeacher, LocalTeacher, SharedTeacher, Teacher, Teachers
from taid_vlm.teachers.several import each
from taid_vlm.training.figures import HEAD, fused_figures
from taid_vlm.training.loss import (
    FusedStep,
    ReferenceStep,
    Step,
    StepLoss,
    choose_step,
    plain_step,
)
from taid_vlm.training.several import SeveralStep
from taid_vlm.training.trainer import DistillationTrainer

ACTIVATIONS = {"student": (kinds.STUDENT_TOWER, kinds.STUDENT_LANGUAGE),
               "teacher": (kinds.TEACHER_TOWER, kinds.TEACHER_LANGUAGE)}


@dataclass(frozen=True)
class Memory:
    """The fullest moment of one phase, beside what an optimizer keeps.

    at_peak: bytes by kind at that moment. most: the most of every kind, each at its own moment.
    problem: why the models could not run, so that activations are from a formula; "" if they did.
    """

    at_peak: Mapping[str, int]
    most: Mapping[str, int]
    problem: str = ""

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())


class _Finished(Exception):
    """The step has been rehearsed as far as the optimizer."""


class _StopBeforeUpdate(TrainerCallback):
    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        raise _Finished


def rehearse_training(trainer: DistillationTrainer, batch: Batch, shapes: Shapes) -> Memory:
    """Forward and backward of one optimizer step, whose micro-batches all are `batch`.

    The trainer's arguments have to say max_steps = 1, and to log every step.
    """
    ledger, collate = _ledger(trainer, batch), trainer.data_collator
    trainer._steps[""] = _loss_step(trainer, batch)  # what the trainer chooses by values
    trainer.guard.judge = lambda *_: None  # type: ignore[method-assign]  # it looks at values
    trainer.add_callback(_StopBeforeUpdate())
    handles = [p.register_post_accumulate_grad_hook(
        lambda p: ledger.relabel(p.grad, kinds.GRADIENTS)) for p in trained(trainer)]
    trainer.data_collator = lambda rows: batch
    rollouts, trainer.rollouts = trainer.rollouts, None  # samples take a reference's place
    try:
        with _watched(ledger, trainer), shapes, ledger, contextlib.suppress(_Finished):
            trainer.train()
    finally:
        trainer.data_collator, trainer.rollouts = collate, rollouts
        for handle in handles:
            handle.remove()
    return Memory(ledger.at_peak, ledger.most)


def _loss_step(trainer: DistillationTrainer, batch: Batch) -> Step | SeveralStep:
    """The implementation of the loss that the trainer finds, where it compares logits.

    What a model does behind its head is taken from its configuration, and the arithmetic is the
    uncompiled one, whose scratch space has the same bound.
    """
    if isinstance(trainer.teacher, Teachers) and trainer.objective.needs_teacher:
        return _Several(trainer)
    return _one_step(trainer, trainer.objective, trainer.pairing, trainer.teacher, batch)


def _one_step(
    trainer: DistillationTrainer, objective: Objective, pairing: Pairing | None, teacher: Any,
    batch: Batch,
) -> Step:
    args = trainer.args
    plain = plain_step(objective, pairing, teacher)
    if not isinstance(plain, ReferenceStep):
        return plain
    if args.loss_implementation == "reference":
        return choose_step(
            args.loss_implementation, objective, pairing, trainer.model, teacher,
            batch, args.loss_memory_budget, trainer.accelerator.autocast)
    if isinstance(teacher, LocalTeacher):
        teacher.transform = _configured_transform(teacher.model)
    step = _FewFigures(objective, pairing, trainer.model,
                       _configured_transform(trainer.model), args.loss_memory_budget,
                       trainer.accelerator.autocast)
    step.fused.body = "eager"
    return step


class _Several(SeveralStep):
    """Every teacher's step as it is rehearsed."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer
        super().__init__(trainer.objective, trainer.teacher, trainer.model,
                         _configured_transform(trainer.model), trainer.args,
                         trainer.accelerator.autocast)

    def chosen(
        self, objective: Objective, pairing: Pairing | None, teacher: Teacher | None, probe: Batch
    ) -> Step:
        return _one_step(self.trainer, objective, pairing, teacher, probe)


def _configured_transform(model: nn.Module) -> LogitTransform:
    return [*known_logit_transforms(unwrap(model).config.get_text_config())][-1]


class _FewFigures(FusedStep):
    """Measures figures of the first two chunks of a map. Those of the others, most of a
    rehearsal's time, would find the same in memory as the second, that is the head's gradient too.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> StepLoss:
        self._chunks = Counter[int]()
        return super().__call__(*args, **kwargs)

    def _measure(
        self, batch: Mapping[str, Any], index: int, rows: Rows, s: Tensor, u: Tensor | None
    ) -> dict[str, Tensor]:
        self._chunks[index] += 1
        if self._chunks[index] <= 2:
            return super()._measure(batch, index, rows, s, u)
        return {}


@torch.no_grad()
def rehearse_evaluation(trainer: DistillationTrainer, batch: Batch, shapes: Shapes) -> Memory:
    """Both models and all figures of one batch, as `evaluation.evaluate_pair` does it, and what the
    canary has of each of them."""
    trainer.model.zero_grad()
    ledger = _ledger(trainer, batch)
    trainer.model.eval()
    with _watched(ledger, trainer), shapes, ledger:
        measure = fused_figures(trainer)
        if measure is not None:
            measure.fused.body = "eager"
            measure.known[HEAD] = _configured_transform(trainer.model)
        if measure is None or measure(trainer.model, trainer.teacher, batch) is None:
            with trainer.accelerator.autocast():
                s = student_forward(trainer.model, batch)
            teacher_figures(batch, s, trainer.teacher, trainer.pairing,
                            trainer.accelerator.autocast)
            del s
        if trainer.canary.number and int(batch["images"].sum()):
            _look(trainer, batch)
    return Memory(ledger.at_peak, ledger.most)


def _look(trainer: DistillationTrainer, batch: Batch) -> None:
    """All logits of a model at a time, with an image and with another."""
    sides = [(trainer.model, batch["student_inputs"], batch["student_mask"], batch["labels"])]
    if isinstance(trainer.teacher, LocalTeacher):
        sides.append((trainer.teacher.model, batch["teacher_inputs"], batch["teacher_mask"],
                      batch["teacher_labels"]))
    for model, inputs, mask, labels in sides:
        with trainer.accelerator.autocast():
            real, other = (answer_logits(model, inputs, mask) for _ in range(2))
        compared(real, labels, other)


def _ledger(trainer: DistillationTrainer, batch: Batch) -> Ledger:
    """A ledger that knows what lies there before the step begins."""
    ledger = Ledger()
    for teacher in each(trainer.teacher).values():
        ledger.adopt(teacher_tensors(teacher), kinds.TEACHER)
    ledger.adopt([*parameters(trainer), *trainer.model.buffers()], kinds.STUDENT)
    ledger.adopt(tree_leaves(dict(batch)), kinds.BATCH)
    ledger.adopt(kept(trainer), kinds.LOSS)
    return ledger


def teacher_tensors(teacher: Any) -> list[Tensor]:
    """A teacher in memory: of a cached one the head, of one inside of the student nothing."""
    if isinstance(teacher, SharedTeacher):
        return []
    if isinstance(teacher, CachedTeacher):
        return teacher.head.parameters()
    return [] if teacher.model is None else [*teacher.model.parameters(), *teacher.model.buffers()]


def kept(trainer: DistillationTrainer) -> list[Tensor]:
    """The room for logits that a step leaves to the next one, on a CPU."""
    step = trainer._step
    steps = [*step.steps.values(), step.data_step] if isinstance(step, SeveralStep) else [step]
    return [x for one in steps if isinstance(one, FusedStep) for x in one.fused.kept]


def trained(trainer: DistillationTrainer) -> list[nn.Parameter]:
    """Those that are trained."""
    return [p for p in parameters(trainer) if p.requires_grad]


def parameters(trainer: DistillationTrainer) -> list[nn.Parameter]:
    """The student's, and those of the map that belongs to the objective."""
    extra = [] if trainer.visual.map is None else list(trainer.visual.map.parameters())
    return [*trainer.model.parameters(), *extra]


# ----- what is being made -------------------------------------------------------------------


@contextlib.contextmanager
def _watched(ledger: Ledger, trainer: DistillationTrainer) -> Iterator[None]:
    """Tell the ledger which model is at work, and on what."""
    # what a teacher inside of the student makes is told as the student's, in whose modules it is
    models = [("student", trainer.model), *(
        ("teacher", getattr(teacher, "model", None)) for teacher in each(trainer.teacher).values()
        if not isinstance(teacher, SharedTeacher))]
    handles = [handle for role, model in models if model is not None
               for handle in _Labels(ledger, *ACTIVATIONS[role]).hook(unwrap(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Labels:
    """Hooks on one model that say what its tensors are for.

    The tower's modules interrupt what the model is doing. All that follows its last hidden state
    belongs to the loss, also in backward, until the gradient has come back there; what is made
    from then on, recomputed activations too, belongs to backward.
    """

    def __init__(self, ledger: Ledger, tower: str, language: str) -> None:
        self.ledger, self.tower, self.language = ledger, tower, language
        self._interrupted: list[str] = []

    def hook(self, model: Any) -> Iterator[Any]:
        yield model.base_model.register_forward_pre_hook(self._begin)
        yield model.base_model.register_forward_hook(self._to_loss)
        for module in frozen_modules(model, [TOWER]):
            yield module.register_forward_pre_hook(self._to_tower)
            yield module.register_forward_hook(self._from_tower)

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self.ledger.kind = self.language

    def _to_loss(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.ledger.kind = kinds.LOSS
        if output[0].requires_grad:
            output[0].register_hook(self._to_backward)

    def _to_backward(self, gradient: Tensor) -> None:
        self.ledger.kind = kinds.BACKWARD

    def _to_tower(self, module: nn.Module, inputs: Any) -> None:
        if self.ledger.kind != kinds.BACKWARD:
            self._interrupted.append(self.ledger.kind)
            self.ledger.kind = self.tower

    def _from_tower(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.ledger.kind != kinds.BACKWARD:
            self.ledger.kind = self._interrupted.pop()
