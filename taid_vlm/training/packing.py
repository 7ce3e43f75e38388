"""`train.packing`: the records of a micro-batch in one row for each model that computes here.

Batches come padded, and are packed right before the models see them: all else (what is learned,
weights, figures, a served or cached teacher's side) is as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from taid_vlm.adapters.grids import View
from taid_vlm.batch.collator import Batch
from taid_vlm.batch.several import role_of
from taid_vlm.config.recipe import TEACHERS
from taid_vlm.errors import TaidError
from taid_vlm.fused.model_head import ALLOWED, ALLOWED_HALF
from taid_vlm.models.forward import answer_logits, unwrap
from taid_vlm.models.packing import (
    attend_by_record,
    packed,
    packing_error,
    why_unpackable,
)
from taid_vlm.teachers.several import each

MEND = "Leave out train.packing; train.tokens_per_batch alone saves most of the padding."


class Packing:
    """Packs batches, after a first one of several records has shown that it changes nothing.

    Args:
        on: whether it packs at all; without, batches are passed on as they are.
        accelerator: its processes check together, as a sharded model is asked by all at once.
    """

    def __init__(self, on: bool, accelerator: Accelerator) -> None:
        self.on, self.accelerator = on, accelerator
        self._unchecked: set[str] | None = None

    def __call__(self, batch: Batch, student: nn.Module, teacher: Any) -> Batch:
        """The batch packed; raises TaidError where packed rows are other rows."""
        if not self.on:
            return batch
        models = dict(_models(student, teacher))
        if self._unchecked is None:
            self._unchecked = set(models)
            for role, (model, _) in models.items():
                check_packable(model, role)
                attend_by_record(model)
        for role in sorted(self._unchecked):
            part, side = _part(batch, role)
            if all(gather_object([part is not None and len(part["row"].unique()) > 1])):
                self._check(part, side, role, *models[role])
                self._unchecked.remove(role)
        return _packed(batch, {role: model for role, (model, _) in models.items()})

    def _check(self, part: Any, side: str, role: str, model: nn.Module, teacher: Any) -> None:
        inputs, mask = part[f"{side}_inputs"], part[f"{side}_mask"]

        def find(inputs: Mapping[str, Tensor], mask: Tensor) -> Tensor:
            logits: Tensor = answer_logits(model, inputs, mask) if teacher is None else (
                teacher.logits({**part, "teacher_inputs": inputs, "teacher_mask": mask}))
            return logits

        with self.accelerator.autocast():
            error = packing_error(model, inputs, mask, find)
        kind = next(unwrap(model).parameters()).dtype
        half = self.accelerator.mixed_precision != "no" or kind not in ALLOWED
        if not max(gather_object([error])) <= (ALLOWED_HALF if half else ALLOWED[kind]):
            raise _refusal(model, role, f"its logits in a packed row differ by {error:.2g} of the "
                                        "largest one from those in rows of their own")


def check_packable(model: Any, role: str) -> None:
    """Raise TaidError for a model, which may have no weights, that is known to mix the records of a
    row."""
    if reason := why_unpackable(model):
        raise _refusal(model, role, reason)


def _refusal(model: Any, role: str, reason: str) -> TaidError:
    return TaidError(f"train.packing: the {role} ({unwrap(model).config.model_type}) cannot have "
                     f"several records in a row: {reason}.", mend=MEND)


def _models(student: nn.Module, teacher: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """By role, the models that compute in this process, and the teachers that they are."""
    yield "student", (student, None)
    for name, one in each(teacher).items():
        if (model := getattr(one, "model", None)) is not None:
            yield role_of(name) if name else "teacher", (model, one)


def _part(batch: Batch, role: str) -> tuple[Any, str]:
    """Of a batch what a model is shown, None where it is shown nothing; and the side it is."""
    name = role.removeprefix(f"{TEACHERS}.")
    if name != role:
        return batch["parts"].get(name), "teacher"
    return (batch if f"{role}_inputs" in batch else None), role


def _packed(batch: Batch, models: Mapping[str, nn.Module]) -> Batch:
    changed: Batch = {"parts": dict(batch["parts"])} if "parts" in batch else {}
    for role, model in models.items():
        part, side = _part(batch, role)
        if part is None:
            continue
        padded = part[f"{side}_inputs"]
        inputs, mask = packed(model, padded, part[f"{side}_mask"])
        own = {f"{side}_inputs": inputs, f"{side}_mask": mask}
        if views := part.get(f"{side}_views"):
            own[f"{side}_views"] = _moved(views, padded["attention_mask"])
        if part is batch:
            changed |= own
        else:
            name = role.removeprefix(f"{TEACHERS}.")
            changed["parts"][name] = {**part, **own}
    return {**batch, **changed}


def _moved(views: Sequence[View], mask: Tensor) -> list[View]:
    """Views of images where their tokens lie in the packed row."""
    places = (mask.flatten().cumsum(0) - 1).view_as(mask).tolist()
    return [replace(view, row=0, positions=tuple(places[view.row][p] for p in view.positions))
            for view in views]
