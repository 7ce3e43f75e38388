"""Many small students in one tensor program: run r has its own weights, data and learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miniature.exposure import OwnTexts
from miniature.language import Language, contexts, figures
from miniature.methods import METHODS, Method, Objective

WARM_UP = 0.05  # share of a training's steps with a rising learning rate
BETAS, EPSILON = (0.9, 0.98), 1e-8
POINTS = 12  # of the curves over a training


@dataclass(frozen=True)
class Shape:
    """A low-rank model: both symbols as vectors of `rank`, one tanh layer of `width`."""

    rank: int
    width: int

    def parameters(self, symbols: int) -> int:
        return 2 * symbols * self.rank + (2 * self.rank + 1) * self.width + (
            self.width + 1) * symbols


class Students:
    """R models of one shape, from R seeds; weights are stacked along the first axis."""

    def __init__(self, shape: Shape, symbols: int, seeds: Sequence[int], device: str) -> None:
        each = [_initial(shape, symbols, seed) for seed in seeds]
        self.weights = [torch.stack(same).to(device) for same in zip(*each, strict=True)]
        self.every = contexts(symbols)[0].to(device) * symbols + contexts(symbols)[1].to(device)

    def __call__(self, context: Tensor) -> Tensor:
        """Logits [R, N, V] after contexts [R, N]."""
        first, second, inner, inner_bias, outer, outer_bias = self.weights
        symbols, run = first.shape[1], torch.arange(len(first), device=first.device)[:, None]
        x = torch.cat([first[run, context // symbols], second[run, context % symbols]], -1)
        hidden = torch.tanh(torch.baddbmm(inner_bias, x, inner))
        return torch.baddbmm(outer_bias, hidden, outer)

    @torch.no_grad()
    def laws(self) -> Tensor:
        """Logits after every context, [R, V * V, V]."""
        return self(self.every.expand(len(self.weights[0]), -1))

    def pick(self, runs: Sequence[int]) -> Students:
        """Copies of some runs, in this order; one may be taken several times."""
        chosen = object.__new__(Students)
        chosen.every = self.every
        chosen.weights = [w.detach()[list(runs)].clone() for w in self.weights]
        return chosen


def _initial(shape: Shape, symbols: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, fan: int = 1) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(fan)

    rank, width = shape.rank, shape.width
    return [normal(symbols, rank), normal(symbols, rank),
            normal(2 * rank, width, 2 * rank), torch.zeros(1, width),
            normal(width, symbols, width), torch.zeros(1, symbols)]


@dataclass(frozen=True)
class Course:
    """How long and on how many symbols a step; `seed` decides the contexts that are drawn."""

    steps: int
    batch: int
    seed: int


@dataclass
class Trained:
    """What a training leaves: curves of (step, mean over runs), and TAID's own account."""

    curves: dict[str, list[tuple[int, float]]]
    active_share: float | None


def train(
    students: Students, method: Method, language: Language, teacher: Tensor,
    rates: Sequence[float], course: Course,
) -> Trained:
    """Train `students` in place; the contexts of a course are the same for every method.

    Args:
        teacher: logits of every context, [V * V, V].
        rates: peak learning rate of every run; half a cosine leads down from it.
    """
    runs, weights = len(rates), students.weights
    peak = torch.tensor(rates, device=teacher.device)[:, None, None]
    objective, adam = Objective(method, runs, course.steps), Adam(weights)
    stream, own = Stream(language, runs, course), round(method.own * course.batch)
    texts = OwnTexts(language, runs, own, course.seed) if own else None
    curves: dict[str, list[tuple[int, float]]] = {"jeffreys": [], "entropy": [], "t": []}
    for weight in weights:
        weight.requires_grad_()
    for step in range(course.steps):
        if step % max(1, course.steps // POINTS) == 0:
            _note(curves, step, students, objective, language)
        context, label = stream.draw()
        if texts is not None:
            context[:, :own] = texts.context
        logits = students(context)
        if texts is not None:
            texts.go_on(logits[:, :own].detach())
        losses = objective(logits, teacher[context], label)
        adam.step(torch.autograd.grad(losses.sum(), weights), peak * factor(step, course.steps))
        objective.update(losses.detach(), step)
    _note(curves, course.steps, students, objective, language)
    for weight in weights:
        weight.requires_grad_(False)
    return Trained({k: v for k, v in curves.items() if v}, objective.active_share)


def _note(
    curves: dict[str, list[tuple[int, float]]], step: int, students: Students,
    objective: Objective, language: Language,
) -> None:
    found = figures(language, students.laws())
    for name in ("jeffreys", "entropy"):
        curves[name].append((step, float(found[name].mean())))
    if objective.t:
        curves["t"].append((step, sum(objective.t) / len(objective.t)))


def factor(step: int, steps: int) -> float:
    """The learning rate's factor: linear up, then half a cosine down."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Stream:
    """Contexts as the language visits them, and the symbol that it goes on with; one per run."""

    def __init__(self, language: Language, runs: int, course: Course) -> None:
        self.size, self.device = (runs, course.batch), language.law.device
        self.weights = language.weights.cpu()
        self.cumulative = language.law.cpu().cumsum(-1).float()
        self.generator = torch.Generator().manual_seed(course.seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Contexts and next symbols, both [R, N]."""
        number = self.size[0] * self.size[1]
        context = torch.multinomial(self.weights, number, True, generator=self.generator)
        uniform = torch.rand(number, 1, generator=self.generator)
        label = torch.searchsorted(self.cumulative[context], uniform)[:, 0]
        label.clamp_(max=self.cumulative.shape[-1] - 1)
        return (context.view(self.size).to(self.device), label.view(self.size).to(self.device))


class Adam:
    """Adam with a learning rate per run, which torch's own does not have within one tensor."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights, self.count = weights, 0
        self.first = [torch.zeros_like(w) for w in weights]
        self.second = [torch.zeros_like(w) for w in weights]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rates: Tensor) -> None:
        """One step with learning rates [R, 1, 1]."""
        self.count += 1
        (b1, b2), n = BETAS, self.count
        for weight, g, m, v in zip(self.weights, gradients, self.first, self.second, strict=True):
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            denominator = (v / (1 - b2**n)).sqrt_().add_(EPSILON)
            weight.sub_(rates * (m / (1 - b1**n)) / denominator)


def learned_by_text(
    shape: Shape, language: Language, seeds: Sequence[int], rate: float, course: Course
) -> Students:
    """Models from scratch, taught by the language's own text."""
    device = str(language.law.device)
    students = Students(shape, language.symbols, seeds, device)
    train(students, METHODS["SFT"], language, language.law.log().float(), [rate] * len(seeds),
          course)
    return students
