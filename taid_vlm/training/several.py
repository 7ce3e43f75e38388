"""Several teachers in training: what each says of its records, against one forward of the student.

The loss of a token is the sum over its teachers of share x (the terms against that teacher), and
the terms on the data once. It is divided as with one teacher, by what the student's tokens count.
TAID's t is one for all of them: its schedule sees the mean of the summed `taid` over these tokens,
which is what the student is trained on. Every teacher's loss makes a gradient of the student's head
of its own, and so do the terms on the data; backward adds them up.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain, islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from taid_vlm.alignment import Pairing
from taid_vlm.batch.collator import Batch, DistillationCollator
from taid_vlm.batch.forward import student_forward
from taid_vlm.batch.several import NamedCollator, SeveralCollator, joined_figures, role_of, shared
from taid_vlm.batch.shares import Shares, shares_of
from taid_vlm.errors import TaidError
from taid_vlm.fused.divergence import FusedLoss
from taid_vlm.fused.model_head import find_logit_transform
from taid_vlm.models.forward import (
    Answered,
    Autocast,
    accept_distill,
    answer_hidden,
    answer_logits,
    unwrap,
)
from taid_vlm.models.head import LogitTransform
from taid_vlm.objectives import Objective, parse_objective
from taid_vlm.objectives.divergences import LOSSES
from taid_vlm.records import Record, first_rows, parts_of
from taid_vlm.teachers import Teacher, Teachers
from taid_vlm.training.config import DistillationConfig
from taid_vlm.training.intake import PROBED_RECORDS, check_usable
from taid_vlm.training.loss import Step, StepLoss, choose_step, plain_step
from taid_vlm.training.pair import pair_for_training
from taid_vlm.training.served import place_teacher, serve, shapes_of

logger = logging.getLogger(__name__)

DATA = ""  # in the place of a teacher's name
TRAIN = "data.train"
SEARCHED = 2048  # rows of a source that are looked through for a teacher's first records


# ----- the step -----------------------------------------------------------------------------


class SeveralStep:
    """Every teacher's own step, on what one forward of the student gives for its tokens.

    Args:
        teachers: a teacher's step is chosen when it first has tokens.
        transform: what the student does behind its head; None where that is not known.
        args: implementation and memory budget as `choose_step` takes them.
    """

    def __init__(
        self, objective: Objective, teachers: Teachers, student: nn.Module,
        transform: LogitTransform | None, args: DistillationConfig, autocast: Autocast,
    ) -> None:
        self.objective, self.teachers, self.student = objective, teachers, student
        self.transform, self.args, self.autocast = transform, args, autocast
        against = [term for term in objective.terms if LOSSES[term.name].needs_teacher]
        data = [term for term in objective.terms if not LOSSES[term.name].needs_teacher]
        self.against = replace(objective, terms=tuple(against))
        self.steps: dict[str, Step] = {}
        self.data_step = self.chosen(
            replace(objective, terms=tuple(data)), None, None, {}) if data else None
        accept_distill(unwrap(student))

    @classmethod
    def of(
        cls, objective: Objective, teachers: Teachers, student: nn.Module, probe: Batch,
        args: DistillationConfig, accelerator: Accelerator,
    ) -> SeveralStep:
        """With what stands behind the student's head, as a batch with tokens shows it."""
        with accelerator.autocast():
            transform = find_logit_transform(
                unwrap(student), probe["student_inputs"], probe["student_mask"])
        return cls(objective, teachers, student, transform, args, accelerator.autocast)

    def report(self) -> dict[str, Any]:
        """For the run's results: which implementations ran for which teacher, and why."""
        reports = {name: step.report() for name, step in sorted(self.steps.items())}
        names = {report["name"] for report in reports.values()}
        told = [f"{name}: {report['name']}" + (f" ({report['reason']})" if report["reason"] else "")
                for name, report in reports.items()]
        return {"name": names.pop() if len(names) == 1 else "several", "reason": "; ".join(told),
                "bodies": sorted({body for r in reports.values() for body in r["bodies"]})}

    def __call__(
        self, model: nn.Module, teacher: Any, batch: Batch, t: float | None, with_figures: bool
    ) -> StepLoss:
        parts: Mapping[str, Batch] = batch["parts"]
        for name in parts:
            if name not in self.steps:
                self.steps[name] = self.chosen(
                    self.against, self.teachers.pairings[name], self.teachers.by_name[name],
                    parts[name])
        steps = {name: self.steps[name] for name in parts}
        results: dict[str, StepLoss] = {}

        def distill(student: Any, inputs: Mapping[str, Tensor]) -> FusedLoss:
            answers = self._answers(student, inputs, batch["student_mask"])
            for name, step in steps.items():
                results[name] = self._at(step, student, {**parts[name], "student_inputs": {
                    "answered": answers(parts[name]["student_at"])}}, name, t, with_figures)
            if self.data_step is not None:
                results[DATA] = self._at(self.data_step, student, {**batch, "student_inputs": {
                    "answered": answers(slice(None))}}, None, t, False)
            losses = [result.loss for result in results.values()]
            # without a token the student still takes part in the step, its head with it
            losses = losses or [answers(slice(0)).logits().float().sum() * 0]
            return FusedLoss(torch.stack(losses).sum(), {}, {})

        loss = model(**batch["student_inputs"], distill=distill).loss
        return StepLoss(loss, self._losses(batch, results), None, joined_figures(
            batch, {name: results[name].figures for name in parts} if with_figures else {}))

    def _at(
        self, step: Step, student: Any, batch: Batch, name: str | None, t: float | None,
        with_figures: bool,
    ) -> StepLoss:
        """A step where the student has answered; only a fused one computes under autocast."""
        teacher = None if name is None else self.teachers.by_name[name]
        direct: Any = _Direct(student)
        with torch.autocast(batch["labels"].device.type, enabled=False):
            return step(direct, teacher, {**batch, "student_mask": None}, t, with_figures)

    def chosen(
        self, objective: Objective, pairing: Pairing | None, teacher: Teacher | None, probe: Batch
    ) -> Step:
        """The step against one teacher, or on the data."""
        return choose_step(
            self.args.loss_implementation, objective, pairing, self.student, teacher, probe,
            self.args.loss_memory_budget, self.autocast, find=lambda: self.transform,
            float32_logits=self.args.loss_logits == "float32")

    def _answers(
        self, student: Any, inputs: Mapping[str, Tensor], mask: Tensor
    ) -> Callable[[Tensor | slice], Answered]:
        """What the student says at some of its tokens: hidden states where it is known what stands
        behind the head, or else logits."""
        transform, head = self.transform, student.get_output_embeddings()
        if transform is None:
            with self.autocast():
                logits = answer_logits(student, inputs, mask)
            return lambda at: Answered(None, lambda: logits[at])
        with self.autocast():
            hidden = answer_hidden(student, inputs, mask)

        def said(at: Tensor | slice) -> Tensor:
            with self.autocast():
                return transform.differentiable(head(hidden[at]))

        return lambda at: Answered(hidden[at], lambda: said(at))

    def _losses(self, batch: Batch, results: Mapping[str, StepLoss]) -> dict[str, Tensor]:
        """Every term per token of the student, summed over its teachers by share."""
        none = torch.zeros(len(batch["labels"]), device=batch["labels"].device)
        losses = {term.name: none for term in self.objective.terms}
        for name, result in results.items():
            for term, values in result.losses.items():
                values = values.detach() if name == DATA else shared(
                    batch, batch["parts"][name], values.detach())
                losses[term] = losses[term] + values
        return losses


class NoTokens:
    """The step of a batch without a token, before any that has one: the student takes part."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def report(self) -> None:
        """Nothing is known yet."""

    def __call__(
        self, model: nn.Module, teacher: Any, batch: Batch, t: float | None, with_figures: bool
    ) -> StepLoss:
        values = student_forward(model, batch).sum(-1)
        return StepLoss(values.sum() * 0, {term.name: values.detach()
                                           for term in self.objective.terms}, None, {})


class _Direct:
    """The student inside its own forward: what it gives for the batch is known by now."""

    def __init__(self, student: Any) -> None:
        self.student = student

    def __call__(self, *, distill: Any, answered: Answered) -> FusedLoss:
        result: FusedLoss = distill(self.student, {"answered": answered})
        return result


def step_of(
    objective: Objective, pairing: Pairing | None, student: nn.Module, teacher: Any, probe: Batch,
    args: DistillationConfig, accelerator: Accelerator,
) -> Step | SeveralStep:
    """As `choose_step`, for one teacher or several."""
    if isinstance(teacher, Teachers) and objective.needs_teacher:
        return SeveralStep.of(objective, teacher, student, probe, args, accelerator)
    return choose_step(args.loss_implementation, objective, pairing, student, teacher, probe,
                       args.loss_memory_budget, accelerator.autocast,
                       float32_logits=args.loss_logits == "float32")


def plain_step_of(objective: Objective, pairing: Pairing | None, teacher: Any) -> Step | NoTokens:
    """As `plain_step`; against several teachers only a batch without a token goes without them."""
    if isinstance(teacher, Teachers) and objective.needs_teacher:
        return NoTokens(objective)
    return plain_step(objective, pairing, teacher)


def with_all_names(sums: dict[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """With the same names in all processes: which teachers have records there may differ."""
    names = {name for part in gather_object([[*sums]]) for name in part}
    none = torch.zeros_like(sums["tokens"])
    return {name: sums.get(name, none) for name in names}


# ----- pairs --------------------------------------------------------------------------------


def put_together(
    student: Any, teacher: Any, processor: Any, teacher_processor: Any, args: DistillationConfig,
    train: Any, held_out: Any,
) -> tuple[Any, DistillationCollator]:
    """Pairing and collator of a student and its teacher, or (by name) its teachers, checked
    against the data.

    Raises:
        TaidError: as `pair_for_training` and `serve`, with the teacher's name; a name that no
            teacher has, with the source and how many rows have it.
    """
    datasets = [data for data in (train, held_out) if data is not None]
    objective = parse_objective(args.objective)
    if not isinstance(teacher, Mapping):
        pairing, collator = pair_for_training(
            student, shapes_of(teacher), processor, teacher_processor, args, datasets)
        return pairing, serve(collator, teacher, objective, train)
    sources = dict(_sources(train, held_out))
    shares = shares_of([*teacher], args.teacher_weights, {
        place: [row for row in first_rows(source, PROBED_RECORDS) if isinstance(row, Record)]
        for place, source in sources.items()})
    pairings, parts = {}, {}
    for name, one in teacher.items():
        taught = {place: list(islice(shares.taught(name, first_rows(source, SEARCHED)),
                                     PROBED_RECORDS)) for place, source in sources.items()}
        if not any(taught.values()):
            logger.warning("%s: none of the first %s records of any source is its own.",
                           role_of(name), f"{SEARCHED:,}")
        own = copy.copy(args)
        own.teacher_chat_template_kwargs = (args.teacher_chat_template_kwargs or {}).get(name)
        try:
            pairings[name], collator = pair_for_training(
                student, shapes_of(one), processor, (teacher_processor or {}).get(name), own,
                [*taught.values()])
            parts[name] = serve(collator, one, objective, list(chain.from_iterable(
                records for place, records in taught.items() if place.startswith(TRAIN))))
        except TaidError as error:
            raise of_teacher(error, role_of(name)) from error
    return _joined(pairings, parts, shares, args, datasets)


def _joined(
    pairings: dict[str, Any], parts: dict[str, DistillationCollator], shares: Shares,
    args: DistillationConfig, datasets: Sequence[Any],
) -> tuple[Any, DistillationCollator]:
    objective, (first, *others) = parse_objective(args.objective), parts.values()
    pairing: Any = pairings
    if not others:
        (pairing,) = pairings.values()
        collator: DistillationCollator = NamedCollator(
            **{f.name: getattr(first, f.name) for f in fields(first)}, shares=shares)
    elif objective.visual or objective.visual_advantage or objective.on_policy:
        raise TaidError("objective: visual terms, token_weights and on_policy are of one teacher, "
                        f"and there are {len(parts)} teachers; take them out.")
    else:
        collator = SeveralCollator(first.student, None, None, first.supervise, first.padding_side,
                                   shares=shares, parts=parts)
    for number, data in enumerate(datasets):
        for part in data.values() if isinstance(data, dict) else [data]:
            check_usable(collator, part, 1.0 if number else args.max_left_out)
    return pairing, collator


def placed(
    teacher: Any, pairing: Any, accelerator: Accelerator, args: DistillationConfig
) -> tuple[Any, Pairing | None]:
    """The teacher, and how it is compared, on the process's device; several bring their own."""
    device = accelerator.device
    if isinstance(pairing, Mapping):
        return place_teacher(teacher, accelerator, {
            name: one.to(device) for name, one in pairing.items()}), None
    return (place_teacher(teacher, accelerator, sharding=args.teacher_sharding),
            pairing and pairing.to(device))


def the_only_one(teacher: Any) -> Any:
    """Of a mapping with one teacher that one."""
    if isinstance(teacher, Mapping) and len(teacher) == 1:
        (teacher,) = teacher.values()
    return teacher


def of_teacher(error: TaidError, key: str) -> TaidError:
    """The same error, saying by its key in a recipe which teacher it is of."""
    message = error.message
    told = message.startswith(("teacher:", "teacher."))
    placed = key + message.removeprefix("teacher") if told else f"{key}: {message}"
    return error if key == "teacher" or message.startswith(key) else type(error)(
        placed, mend=error.mend, code=error.code, reasons=error.reasons)


def _sources(train: Any, held_out: Any) -> Iterator[tuple[str, Any]]:
    """Every source of the data, by its place in a recipe."""
    for side, data in ((TRAIN, train), ("data.eval", held_out)):
        sets = data.values() if isinstance(data, dict) else [] if data is None else [data]
        sources = [source for part in sets for source in parts_of(part)]
        for number, source in enumerate(sources):
            yield f"{side}[{number}]" if len(sources) > 1 else side, source
