"""Pairs of different tokenizers in float64, for tests of case c."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, NamedTuple

from adapters.samples import KINDS, TEXT_KINDS, adapter, built, head_rows, row
from torch import Tensor, nn
from zoo import CORE_FAMILIES

from taid_vlm.adapters import ModelAdapter, Side
from taid_vlm.alignment import Pairing, pair_models
from taid_vlm.batch.collator import Batch, DistillationCollator


class Name(NamedTuple):
    """A model of the zoo."""

    family: str
    tokenizer: str = "plain"


class Pair(NamedTuple):
    teacher: ModelAdapter
    student: ModelAdapter
    pairing: Pairing

    def collator(self, side: Side = "right") -> DistillationCollator:
        return DistillationCollator(self.student, self.teacher, self.pairing, padding_side=side)


@cache
def pair(teacher: Name, student: Name, alignment: str = "chunks") -> Pair:
    t, s = adapter(teacher[0], "teacher", teacher[1]), adapter(student[0], "student", student[1])
    rows = head_rows(*teacher), head_rows(*student)
    return Pair(t, s, pair_models(t, s, *rows, alignment=alignment))


def kinds(*names: Name) -> tuple[str, ...]:
    """The sample conversations that all of these models can see."""
    return KINDS if all(name.family in CORE_FAMILIES for name in names) else TEXT_KINDS


@cache
def doubled(name: Name, seed: int = 0) -> nn.Module:
    """The model in float64: its figures depend on no padding and no batch mate."""
    return copy.deepcopy(built(name.family, name.tokenizer, seed).model).double()


def in_doubles(batch: Any) -> Any:
    """Pixels as float64."""
    if isinstance(batch, dict):
        return {key: in_doubles(value) for key, value in batch.items()}
    return batch.double() if isinstance(batch, Tensor) and batch.is_floating_point() else batch


def batch_of(teacher: Name, student: Name, side: Side = "right") -> Batch:
    found = pair(teacher, student).collator(side)([row(k) for k in kinds(teacher, student)])
    return in_doubles(found)
