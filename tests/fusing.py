"""Small problems for the fused objective, and the same computed naively: all logits, autograd."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from objectives import reference
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taid_vlm.alignment import VocabularyMap
from taid_vlm.alignment.vocabulary import SideMap
from taid_vlm.config.objective import MOVING
from taid_vlm.fused.divergence import FusedDivergence
from taid_vlm.fused.heads import Head
from taid_vlm.models.head import LogitTransform
from taid_vlm.objectives import LOSSES, Objective, diagnose
from taid_vlm.objectives.divergences import row_chunks

LEAVES = ("hidden", "weight", "bias")


def problem(
    rows: int = 11, width: int = 23, teacher_width: int | None = None,
    dtype: torch.dtype = torch.float32, seed: int = 0, bias: bool = True,
) -> SimpleNamespace:
    """Hidden states, heads and labels; logits have a deviation of about 1.5."""
    generator = torch.Generator().manual_seed(seed)
    teacher_width = width if teacher_width is None else teacher_width

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        x = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(dtype)

    return SimpleNamespace(
        hidden=normal(rows, 7).requires_grad_(),
        weight=normal(width, 7, scale=0.5).requires_grad_(),
        bias=normal(width, scale=0.3).requires_grad_() if bias else None,
        teacher_hidden=normal(rows, 9), teacher_weight=normal(teacher_width, 9, scale=0.5),
        labels=torch.randint(width, (rows,), generator=generator),
        token_weights=torch.rand(rows, generator=generator) * 2)


def fuse(
    objective: Objective, p: SimpleNamespace, *, transform: LogitTransform | None = None,
    maps: tuple[VocabularyMap, ...] = (), memory_budget: int = 2**20, body: str = "eager",
    figures: bool = False, float32_logits: bool = False, **more,
):
    fused = FusedDivergence(objective, maps, memory_budget=memory_budget, body=body,
                            float32_logits=float32_logits)
    if figures:
        def measure(index, rows, s, u):
            vocabulary = fused.maps[index]
            if vocabulary is not None:
                s, u = vocabulary.map_student(s), vocabulary.map_teacher(u)
            parts = [diagnose(s[part], u[part])
                     for part in row_chunks(max(1, len(s)), 16 * s.shape[1])]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

        more["measure"] = measure
    return fused(p.hidden, Head(p.weight, p.bias, transform or LogitTransform()), p.teacher_hidden,
                 Head(p.teacher_weight, transform=transform or LogitTransform()), p.labels, **more)


def gradients(p: SimpleNamespace, loss: Tensor) -> dict[str, Tensor]:
    leaves = [name for name in LEAVES if getattr(p, name) is not None]
    found = torch.autograd.grad(loss, [getattr(p, name) for name in leaves])
    return dict(zip(leaves, found, strict=True))


def cast(p: SimpleNamespace, dtype: torch.dtype) -> SimpleNamespace:
    """The same numbers in another type, as new leaves."""
    return SimpleNamespace(**{
        name: x if x is None or not x.is_floating_point()
        else x.detach().to(dtype).requires_grad_(x.requires_grad)
        for name, x in vars(p).items()})


def bent(z: Tensor, transform: LogitTransform | None) -> Tensor:
    if transform is None:
        return z
    z = z * transform.scale
    return z if transform.softcap is None else transform.softcap * torch.tanh(z / transform.softcap)


def logits(p: SimpleNamespace, transform: LogitTransform | None = None) -> tuple[Tensor, Tensor]:
    s = torch.nn.functional.linear(p.hidden, p.weight, p.bias)
    return bent(s, transform), bent(p.teacher_hidden @ p.teacher_weight.T, transform)


def textbook(
    objective: Objective, s: Tensor, u: Tensor, labels: Tensor, t: float = 0.3,
    own: Tensor | None = None,
) -> dict[str, Tensor]:
    """Losses per token as their papers write them; CE on `own` where the others are mapped."""
    losses = {}
    for term in objective.terms:
        extra = {"t": t} if term.name in MOVING else {}
        data = not LOSSES[term.name].needs_teacher
        losses[term.name] = reference.loss_of(
            term.name, s if own is None or not data else own, u, labels,
            1.0 if data else objective.kd_temperature, **term.parameters, **extra)
    return losses


def total(objective: Objective, losses: dict[str, Tensor], weights: Tensor | None = None) -> Tensor:
    return sum(term.weight * (losses[term.name] * (
        1 if weights is None or term.name == "ce" else weights)).sum() for term in objective.terms)


def naive(
    objective: Objective, p: SimpleNamespace, t: float = 0.3,
    transform: LogitTransform | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss in float64 from textbook formulas, and its gradients through autograd."""
    p = cast(p, torch.float64)
    loss = total(objective, textbook(objective, *logits(p, transform), p.labels, t))
    return loss.detach(), gradients(p, loss)


def unfused(
    objective: Objective, p: SimpleNamespace, t: float = 0.3,
    transform: LogitTransform | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The package's own path over full logits, in the type of `p`."""
    s, u = logits(p, transform)
    loss = objective.weighted(objective.per_token(s, u, p.labels, t=t)).sum()
    return loss.detach(), gradients(p, loss)


def error(got: Tensor, want: Tensor) -> float:
    """Largest error, measured by the largest entry."""
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    assert list(got) == list(want)
    return {name: error(got[name], want[name]) for name in want}


def norm_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the error by norm, for types that round a single entry by up to 4e-3."""
    assert list(got) == list(want)
    return {name: ((got[name].double() - want[name]).norm() / want[name].norm()).item()
            for name in want}


# ----- vocabulary maps: students of 23 rows, teachers of 19 -----------------------------------


def side(shared: str, rest: str, rows: int, cells: str = "") -> SideMap:
    """Ids, separated by blanks; cells by commas; what is named nowhere is padding."""
    ids = [[int(i) for i in part.split()] for part in (shared, rest)]
    members = [(int(i), c) for c, cell in enumerate(cells.split(",")) for i in cell.split()]
    taken = {*ids[0], *ids[1], *(i for i, _ in members)}
    return SideMap(*(torch.tensor(x, dtype=torch.long) for x in (
        *ids, [i for i in range(rows) if i not in taken],
        [i for i, _ in members], [c for _, c in members])))


STUDENT_ROWS, TEACHER_ROWS = 23, 19
MAPS = {
    "rest": VocabularyMap(side("0 2 4 6 8", "1 3 5 7", TEACHER_ROWS),
                          side("9 3 0 20 11", "1 2 4 5 22", STUDENT_ROWS), False, True),
    "conditioned": VocabularyMap(side("0 2 4 6 8", "1 3 5 7", TEACHER_ROWS),
                                 side("9 3 0 20 11", "", STUDENT_ROWS), False, False),
    "cells": VocabularyMap(side("5 7 1", "3 11", TEACHER_ROWS, "0 2,4,6 8 9"),
                           side("9 3 0", "1 21", STUDENT_ROWS, "2 4 5 6,7 8,10"), False, True, 3),
    "cells alone": VocabularyMap(side("5", "3", TEACHER_ROWS, "0 2,4"),
                                 side("9", "", STUDENT_ROWS, "2,7 8"), False, False, 2),
}


def mapped(vocabulary: VocabularyMap, z: Tensor, name: str) -> Tensor:
    """One column after the other."""
    rows = getattr(vocabulary, name)
    columns = [z[:, rows.shared]]
    columns += [z[:, rows.members[rows.cell == c]].logsumexp(-1, keepdim=True)
                for c in range(vocabulary.cells)]
    if vocabulary.has_rest:
        columns.append(z[:, rows.rest].logsumexp(-1, keepdim=True))
    return torch.cat(columns, -1)


# ----- what is in memory ------------------------------------------------------------------------


class Watched(TorchDispatchMode):
    """The most bytes that tensors made inside take at a time, and the shapes of their storage."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.made.add(tuple(x.shape))
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out
