"""Several models on the same questions: their means, differences and shares of a gap.

Questions are drawn by group, all models' together, so that what a difference is taken of are
pairs. Another seed of a trained model is another draw, too: where there are several, a difference
gets the error of both.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from taid_vlm.evaluation.statistics import (
    LEVEL,
    Array,
    Draws,
    Groups,
    Part,
    as_table,
    binomial_reach,
    p_value,
    part_of,
    reach,
    seed_error,
    share_interval,
    student_t,
)

PAIRED_SEEDS = 3

Signs: TypeAlias = Sequence[tuple[float, str]]  # what is added up: 1 or -1, and whose mean


@dataclass(frozen=True)
class Arm:
    """A model's scores [seeds][questions]; a weighted figure's are totals.

    trained: whether another seed would have given another model. A teacher and the student before
        training are what they are.
    seeds: which they are, in the order of the scores. A seed decides the order of the data, so
        models of one seed are pairs, too.
    """

    scores: Sequence[Sequence[float]]
    trained: bool = True
    seeds: Sequence[int] = ()


@dataclass(frozen=True)
class Interval:
    """A figure or a difference with its interval.

    p: two-sided, against 0. seeds_known: whether the interval covers other seeds; it does not
    where every trained model has one.
    """

    value: float
    low: float
    high: float
    p: float
    n: int
    seeds_known: bool = True
    level: float = LEVEL

    @property
    def significant(self) -> bool:
        """Whether it excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Recovered:
    """(student - base) / (teacher - base): 0 at the base, 1 at the teacher.

    share: None where there is no gap to recover: base and teacher do not differ significantly.
    gap: teacher - base.
    """

    share: Interval | None
    gap: Interval


@dataclass(frozen=True)
class Block:
    """The questions of one benchmark.

    residuals: {model: [draws]}, what every draw adds to the model's error; their products over
        draws add up to (co)variances.
    rare: variance that a difference has besides, so that a few questions on which models differ are
        not taken for all there are: as if there were two more, one for each side (Bonett and
        Price, 2012).
    exact: whether draws are questions of their own with shares as scores, of which a mean has
        Clopper and Pearson's interval, which knows of rare answers.
    """

    residuals: Mapping[str, Array]
    freedom: float
    rare: float
    exact: bool

    def part(self, signs: Signs) -> Part:
        part = part_of(self.errors(signs), self.freedom)
        if self.exact and len(signs) == 1:
            return replace(part, freedom=self.freedom)
        return replace(part, variance=part.variance + (self.rare if len(signs) > 1 else 0.0))

    def errors(self, signs: Signs) -> Array:
        """[draws] of a sum of means."""
        return np.sum([sign * self.residuals[name] for sign, name in signs], axis=0)


class Paired:
    """Means of several models over the same questions.

    Args:
        arms: models by name; all with the same questions in the same order.
        weights: as in `ratio_of`; 1 by default. Questions of weight 0 are left out.
        groups: which questions are drawn together; each on its own by default.
        shares: whether scores are from 0 (wrong) to 1 (right).
    """

    def __init__(
        self, arms: Mapping[str, Arm], weights: Sequence[float] | None = None,
        groups: Groups = None, shares: bool = False,
    ) -> None:
        self.arms, self.shares = dict(arms), shares
        tables = {name: as_table(arm.scores) for name, arm in arms.items()}
        sizes = {table.shape[1] for table in tables.values()}
        if len(sizes) > 1:
            raise ValueError(f"the models have {sorted(sizes)} questions; pairs need the same.")
        self.n = sizes.pop() if sizes else 0
        weight = np.ones(self.n) if weights is None else np.asarray(weights, float)
        columns = np.vstack([*tables.values(), weight[None]]).T
        columns[~np.isfinite(columns)] = math.nan
        clustered = _by_group(columns[weight > 0], groups and
                              [g for g, w in zip(groups, weight, strict=True) if w > 0])
        whole, draws = clustered.sum(0), Draws.of(clustered[:, -1])
        self.clusters = draws.number
        self.seed_means: dict[str, Array] = {}
        residuals: dict[str, Array] = {}
        start = 0
        for name, table in tables.items():
            part = slice(start, start := start + len(table))
            means = whole[part] / whole[-1] if whole[-1] else np.full(len(table), math.nan)
            self.seed_means[name] = means
            residuals[name] = draws.factors * (
                clustered[:, part].mean(1) - means.mean() * clustered[:, -1])
        counted = shares and weights is None and self.n
        self.blocks = [Block(residuals, draws.freedom,
                             2.0 / (self.clusters * self.n) if counted else 0.0,
                             bool(counted) and self.clusters == self.n)]

    @classmethod
    def average(cls, several: Sequence[Paired]) -> Paired:
        """The plain mean over benchmarks, each with questions of its own.

        A method's seeds stand in one order everywhere: a good seed may be good at all of them.
        """
        first, k = several[0], len(several)
        whole = cls({name: Arm([[]] * len(arm.scores), arm.trained, arm.seeds)
                     for name, arm in first.arms.items()}, shares=all(p.shares for p in several))
        whole.n, whole.clusters = sum(p.n for p in several), min(p.clusters for p in several)
        whole.blocks = [Block({name: own / k for name, own in block.residuals.items()},
                              block.freedom, block.rare / k**2, block.exact)
                        for part in several for block in part.blocks]
        for name in first.arms:
            whole.seed_means[name] = np.mean([p.seed_means[name] for p in several], axis=0)
        return whole

    def mean(self, name: str) -> float:
        return float(self.seed_means[name].mean())

    def interval(self, name: str, level: float = LEVEL) -> Interval:
        """Of one model's mean; of a share never below 0 or above 1."""
        found = self._interval([(1.0, name)], level)
        if not self.shares or math.isnan(found.low):
            return found
        half = found.high - found.value
        scores = self.arms[name].scores
        if len(self.blocks) == len(scores) == 1 and all(score in (0, 1) for score in scores[0]):
            half = max(half, binomial_reach(found.value, self.n, self.blocks[0].freedom))
        low, high = share_interval(min(max(found.value, 0.0), 1.0), half, self.clusters, self.n,
                                   level)
        return replace(found, low=low, high=high)

    def difference(self, first: str, second: str, level: float = LEVEL) -> Interval:
        """Of first - second."""
        return self._interval([(1.0, first), (-1.0, second)], level)

    def recovered(self, student: str, base: str, teacher: str, level: float = LEVEL) -> Recovered:
        """How much of the gap between base and teacher the student has closed: Fieller's interval
        (1954), which is bounded where the gap is significant."""
        gap = self.difference(teacher, base, level)
        if not gap.significant:
            return Recovered(None, gap)
        moved, width = ([(1.0, name), (-1.0, base)] for name in (student, teacher))
        whole = self._interval(moved, level)
        value = whole.value / gap.value
        a, c = (x.value**2 - ((x.high - x.low) / 2) ** 2 for x in (gap, whole))
        b = whole.value * gap.value - math.fsum(
            float(block.errors(moved) @ block.errors(width)) * math.prod(
                student_t(block.part(signs).freedom, level) for signs in (moved, width))
            for block in self.blocks)
        root = math.sqrt(max(b * b - a * c, 0.0))
        return Recovered(replace(whole, value=value, low=(b - root) / a, high=(b + root) / a), gap)

    def _interval(self, signs: Signs, level: float) -> Interval:
        value = sum(sign * self.mean(name) for sign, name in signs)
        parts, seeds_known = self._parts(signs)
        if self.clusters < 2 or not math.isfinite(value):
            return Interval(value, math.nan, math.nan, math.nan, self.n, seeds_known, level)
        half = reach(parts, level)
        return Interval(value, value - half, value + half, p_value(value, parts, self.clusters),
                        self.n, seeds_known, level)

    def _parts(self, signs: Signs) -> tuple[list[Part], bool]:
        """What makes up the variance of a signed sum of means: other questions, and other seeds
        where several tell how much these matter; and whether they do, where it matters."""
        parts = [block.part(signs) for block in self.blocks]
        trained = [(sign, name) for sign, name in signs if self.arms[name].trained]
        means = [self.seed_means[name] for _, name in trained]
        if self._seeds_pair([name for _, name in trained]):
            means = [np.sum([sign * self.seed_means[name] for sign, name in trained], axis=0)]
        error = seed_error(means)
        if not error.freedom:
            return parts, not trained
        variance = error.spread**2 * sum(1 / len(of_seeds) for of_seeds in means)
        return [*parts, Part(variance, error.freedom)], True

    def _seeds_pair(self, names: Sequence[str]) -> bool:
        """Whether the same seeds stand behind these models, and enough of them: pairs have half
        the degrees of freedom, which with two seeds costs more than pairing can gain."""
        seeds = [tuple(self.arms[name].seeds) for name in names]
        return len(seeds) > 1 and len(seeds[0]) >= PAIRED_SEEDS and len(set(seeds)) == 1 and all(
            len(self.seed_means[name]) == len(seeds[0]) for name in names)


def paired_difference(
    first: Sequence[float], second: Sequence[float], weights: Sequence[float] | None = None,
    groups: Groups = None, shares: bool = False,
) -> Interval:
    """The difference first - second of two models' means over the same questions.

    Args:
        weights, groups, shares: as in `Paired`.
    """
    arms = {"first": Arm([first]), "second": Arm([second])}
    return Paired(arms, weights, groups, shares).difference("first", "second")


def _by_group(columns: Array, groups: Groups) -> Array:
    """Sums [groups, k] of rows [n, k]."""
    if groups is None:
        return columns
    places: dict[Hashable, int] = {}
    index = np.array([places.setdefault(group, len(places)) for group in groups], dtype=int)
    out = np.zeros((len(places), columns.shape[1]))
    np.add.at(out, index, columns)
    return out
