"""What a cache of a recipe's teacher would take on disk, in every form that is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from taid_vlm.alignment import teacher_positions
from taid_vlm.config.recipe import Recipe
from taid_vlm.errors import TaidError
from taid_vlm.models.forward import unwrap
from taid_vlm.models.loading import weight_bytes
from taid_vlm.objectives import parse_objective
from taid_vlm.plan.longest import Looked
from taid_vlm.runs.cache import BESIDE
from taid_vlm.teachers.cache import DTYPES
from taid_vlm.teachers.sparse import DEFAULT_K, Signal
from taid_vlm.training.trainer import DistillationTrainer


@dataclass(frozen=True)
class CacheForm:
    """One form. options: of `taid-vlm cache`; exact: whether it says all that the teacher says;
    per_token: bytes of a token that is trained on; bytes: of all of it, with the teacher's head."""

    options: str
    exact: bool
    per_token: int
    bytes: int


@dataclass(frozen=True)
class CacheSize:
    """Of a live teacher: tokens that are compared, of how many records, estimated from the first
    of them, and what they take. refused: why a form is not among them."""

    tokens: int
    records: int
    forms: tuple[CacheForm, ...]
    refused: tuple[str, ...] = ()


def cache_size(
    recipe: Recipe, trainer: DistillationTrainer, sides: Sequence[tuple[Looked, Any]]
) -> CacheSize | None:
    """Of data.train and data.eval, in this order; None where no cache can stand for the teacher, or
    nobody knows how many records there are."""
    spec, objective = recipe.teacher, parse_objective(recipe.objective)
    if spec is None or spec.cache or spec.server or objective.visual or \
            objective.visual_advantage or trainer.args.window is not None or \
            not all(hasattr(records, "__len__") for _, records in sides):
        return None
    teacher: Any = unwrap(trainer.teacher_model)
    rows, width = (int(n) for n in teacher.get_output_embeddings().weight.shape)
    stored, records = weight_bytes(spec, teacher), sum(len(data) for _, data in sides)
    tokens = [_tokens(looked, len(data)) for looked, data in sides]
    forms, refused = list[CacheForm](), list[str]()
    for options, signal, item in _kinds(stored):
        try:
            signal.check(trainer.pairing, objective)
        except TaidError as error:
            refused.append(error.message)
            continue
        each = [signal.token_bytes(not number, width, item) for number in range(len(tokens))]
        size = sum(n * per for n, per in zip(tokens, each, strict=True))
        forms.append(CacheForm(options, not signal.is_sparse and item == stored, each[0],
                               size + records * BESIDE + rows * width * stored))
    return CacheSize(sum(tokens), records, tuple(forms), tuple(refused))


def _kinds(stored: int) -> Iterator[tuple[str, Signal, int]]:
    """Options, signal, and bytes of a number in hidden states."""
    yield "", Signal(), stored
    half = DTYPES["bfloat16"].itemsize
    if stored > half:
        yield "--dtype bfloat16", Signal(), half
    for kind, k in DEFAULT_K.items():
        yield f"--signal {kind} --k {k}", Signal(kind, k), stored


def _tokens(looked: Looked, records: int) -> int:
    seen = sum(len(teacher_positions(pair)) for _, one in looked.usable for pair in one.aligned)
    return round(seen * records / looked.records)
