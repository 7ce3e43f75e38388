"""How sure a figure is: standard errors of means over questions, with or without groups, seeds and
comparisons of models on the same questions.

Questions are drawn anew by group, all models' together, so that what a difference is taken of are
pairs. Another seed of a trained model is another draw, too: where there are several, a difference
gets the error of both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

N_BOOT = 10_000
LEVEL = 0.95
PAIRED_SEEDS = 3
AT_ONCE = 2**22  # drawn groups in memory at a time

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Groups: TypeAlias = Sequence[Hashable] | None
Signs: TypeAlias = Sequence[tuple[float, str]]  # what is added up: 1 or -1, and whose mean


# ----- one model ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A figure: `value` and `stderr` in its own unit, over `n` questions; NaN where unknown."""

    value: float
    stderr: float
    n: int


def mean_of(scores: Sequence[float], groups: Groups = None) -> Estimate:
    """Mean with its standard error; questions of one group are not independent draws.

    Args:
        scores: one per question.
        groups: which group a question is of (the same image, the same item rotated); the error is
            then the cluster-robust one of a ratio of sums.

    Returns:
        `n` counts questions. NaN without questions; the error is NaN for a single group.
    """
    return ratio_of(scores, [1.0] * len(scores), groups)


def ratio_of(
    totals: Sequence[float], weights: Sequence[float], groups: Groups = None
) -> Estimate:
    """Sum of totals over sum of weights (an answer's figure summed over its tokens, and their
    number), with the error of `mean_of`."""
    n, weight = len(totals), math.fsum(weights)
    if not n or not weight:
        return Estimate(math.nan, math.nan, n)
    mean = math.fsum(totals) / weight
    residuals: dict[Hashable, float] = defaultdict(float)
    for index, (total, size) in enumerate(zip(totals, weights, strict=True)):
        residuals[index if groups is None else groups[index]] += total - mean * size
    squares = math.fsum(x * x for x in residuals.values())
    return Estimate(mean, standard_error(squares, len(residuals), weight), n)


def standard_error(squares: float, draws: int, weight: float) -> float:
    """Of a ratio of sums over independent draws; NaN for fewer than two.

    Args:
        squares: the sum of (total - ratio * size)^2 over the draws; weight: the sum of their sizes.
    """
    if draws < 2 or not weight:
        return math.nan
    return math.sqrt(max(squares, 0.0) * draws / (draws - 1)) / weight


def mean_of_means(scores: Sequence[float], parts: Sequence[Hashable]) -> Estimate:
    """Mean over parts (categories) of each part's mean, however many questions it has.

    Returns:
        `n` counts questions. The parts are given, not drawn: the error is that of their means,
        and NaN where a part has a single question.
    """
    by_part: dict[Hashable, list[float]] = defaultdict(list)
    for score, part in zip(scores, parts, strict=True):
        by_part[part].append(score)
    return mean_of_estimates([mean_of(of_part) for of_part in by_part.values()])


def mean_of_estimates(parts: Sequence[Estimate]) -> Estimate:
    """The plain mean of independent figures, however many questions each has; NaN without any."""
    if not parts:
        return Estimate(math.nan, math.nan, 0)
    return Estimate(math.fsum(part.value for part in parts) / len(parts),
                    root_mean_square([part.stderr for part in parts]) / math.sqrt(len(parts)),
                    sum(part.n for part in parts))


def root_mean_square(errors: Sequence[float]) -> float:
    """The error of one figure of several models on the same questions, over the models."""
    return math.sqrt(math.fsum(error**2 for error in errors) / len(errors))


def over_seeds(seeds: Sequence[Estimate]) -> Estimate:
    """The mean of one figure over seeds, with the error of the questions, which are the same for
    all seeds, and that of the seeds; one seed has none of its own."""
    values = [seed.value for seed in seeds]
    spread = seed_error([values]).spread if len(seeds) > 1 else 0.0
    questions = root_mean_square([seed.stderr for seed in seeds])
    return Estimate(math.fsum(values) / len(seeds),
                    math.hypot(questions, spread / math.sqrt(len(seeds))), seeds[0].n)


@dataclass(frozen=True)
class Pooled:
    """A figure over several seeds of one method.

    stderr_seeds: of the mean over seeds, from their spread; NaN for one seed.
    stderr_questions: of the mean over questions, each one's scores averaged over seeds first.
    """

    value: float
    stderr_seeds: float
    stderr_questions: float
    n: int
    seeds: int

    @property
    def stderr(self) -> float:
        """Both together, a little too large (chance within a seed's answers is in both). With one
        seed that of the questions, which says nothing about other seeds."""
        if math.isnan(self.stderr_seeds):
            return self.stderr_questions
        return math.hypot(self.stderr_seeds, self.stderr_questions)


def pool_seeds(
    scores: Sequence[Sequence[float]], weights: Sequence[float] | None = None,
    groups: Groups = None,
) -> Pooled:
    """Mean over seeds of the means over the same questions.

    Args:
        scores: [seeds][questions]. weights: as in `ratio_of`; 1 by default.
    """
    table = _scores(scores)
    sizes = np.ones(table.shape[1]) if weights is None else np.asarray(weights, float)
    by_question = ratio_of(table.mean(0).tolist(), sizes.tolist(), groups)
    seeds = seed_error([table.sum(1) / sizes.sum()]) if sizes.sum() else SeedError(math.nan, 0)
    return Pooled(by_question.value, seeds.spread / math.sqrt(len(table)), by_question.stderr,
                  by_question.n, len(table))


def _scores(scores: Sequence[Sequence[float]] | Array) -> Array:
    table = np.asarray(scores, float)
    if table.ndim != 2:
        raise ValueError(f"scores must be [seeds][questions], got the shape {table.shape}.")
    return table


@dataclass(frozen=True)
class SeedError:
    """Standard deviation of a figure between seeds (NaN where nothing tells), and its degrees of
    freedom."""

    spread: float
    freedom: int


def seed_error(seed_means: Sequence[Array | Sequence[float]]) -> SeedError:
    """Pooled over methods, each with the means of its seeds; they count as equally variable."""
    freedom = sum(len(means) - 1 for means in seed_means)
    if freedom < 1:
        return SeedError(math.nan, 0)
    squares = math.fsum(float(np.var(means) * len(means)) for means in seed_means)
    return SeedError(math.sqrt(squares / freedom), freedom)


# ----- several models on the same questions -------------------------------------------------


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
    """A figure or a difference with a bootstrap interval.

    p: two-sided, against 0; at least 2 / (n_boot + 1). seeds_known: whether the interval covers
    other seeds; it does not where every trained model has one.
    """

    value: float
    low: float
    high: float
    p: float
    n: int
    n_boot: int
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


class Bootstrap:
    """Means of several models over questions drawn anew, the same ones for all of them.

    Args:
        arms: models by name; all with the same questions in the same order.
        weights: as in `ratio_of`; 1 by default. Questions of weight 0 are left out.
        groups: which questions are drawn together; each on its own by default.
    """

    def __init__(
        self, arms: Mapping[str, Arm], weights: Sequence[float] | None = None,
        groups: Groups = None, n_boot: int = N_BOOT, seed: int = 0,
    ) -> None:
        self.arms, self.n_boot, self._seed = dict(arms), n_boot, seed
        tables = {name: _scores(arm.scores) for name, arm in arms.items()}
        sizes = {table.shape[1] for table in tables.values()}
        if len(sizes) > 1:
            raise ValueError(f"the models have {sorted(sizes)} questions; pairs need the same.")
        self.n = sizes.pop() if sizes else 0
        weight = np.ones(self.n) if weights is None else np.asarray(weights, float)
        columns = np.vstack([*tables.values(), weight[None]]).T
        columns[~np.isfinite(columns)] = math.nan  # infinity times no draw
        clustered = _by_group(columns[weight > 0], groups and
                              [g for g, w in zip(groups, weight, strict=True) if w > 0])
        self.clusters, whole = len(clustered), clustered.sum(0)
        drawn = resampled_sums(clustered, n_boot, seed) if self.clusters > 1 else \
            np.full((n_boot, len(whole)), math.nan)
        self.seed_means: dict[str, Array] = {}
        self._draws: dict[str, Array] = {}
        start = 0
        for name, table in tables.items():
            part = slice(start, start := start + len(table))
            self.seed_means[name] = whole[part] / whole[-1] if whole[-1] else \
                np.full(len(table), math.nan)
            self._draws[name] = drawn[:, part].mean(1) / drawn[:, -1]

    @classmethod
    def average(cls, parts: Sequence[Bootstrap]) -> Bootstrap:
        """The plain mean over benchmarks, each with questions (and a `seed`) of its own.

        A method's seeds stand in one order everywhere: a good seed may be good at all of them.
        """
        first = parts[0]
        whole = cls({name: Arm([[]] * len(arm.scores), arm.trained, arm.seeds)
                     for name, arm in first.arms.items()}, n_boot=first.n_boot, seed=first._seed)
        whole.n, whole.clusters = sum(p.n for p in parts), min(p.clusters for p in parts)
        for name in first.arms:
            whole.seed_means[name] = np.mean([p.seed_means[name] for p in parts], axis=0)
            whole._draws[name] = np.mean([p._draws[name] for p in parts], axis=0)
        return whole

    def mean(self, name: str) -> float:
        return float(self.seed_means[name].mean())

    def interval(self, name: str, level: float = LEVEL) -> Interval:
        """Of one model's mean."""
        return self._interval([(1.0, name)], level)

    def difference(self, first: str, second: str, level: float = LEVEL) -> Interval:
        """Of first - second."""
        return self._interval([(1.0, first), (-1.0, second)], level)

    def recovered(self, student: str, base: str, teacher: str, level: float = LEVEL) -> Recovered:
        """How much of the gap between base and teacher the student has closed.

        Draws in which the gap has the other sign, of which there are few where it is significant,
        count as infinitely far on the side that the student moved to.
        """
        gap = self.difference(teacher, base, level)
        if not gap.significant:
            return Recovered(None, gap)
        moved, seeds_known = self._drawn([(1.0, student), (-1.0, base)])
        width = (self._draws[teacher] - self._draws[base]) * math.copysign(1.0, gap.value)
        moved = moved * math.copysign(1.0, gap.value)
        share = np.where(width > 0, moved / np.where(width > 0, width, 1.0),
                         np.copysign(math.inf, moved))
        value = (self.mean(student) - self.mean(base)) / gap.value
        return Recovered(self._summary(value, share, seeds_known, level), gap)

    def _interval(self, signs: Signs, level: float) -> Interval:
        value = sum(sign * self.mean(name) for sign, name in signs)
        draws, seeds_known = self._drawn(signs)
        return self._summary(value, draws, seeds_known, level)

    def _drawn(self, signs: Signs) -> tuple[Array, bool]:
        """Draws [n_boot] of a signed sum of means: other questions, and other seeds where several
        tell how much these matter (from Student's t, since they are few)."""
        draws = np.sum([sign * self._draws[name] for sign, name in signs], axis=0)
        trained = [(sign, name) for sign, name in signs if self.arms[name].trained]
        means = [self.seed_means[name] for _, name in trained]
        if self._seeds_pair([name for _, name in trained]):
            means = [np.sum([sign * self.seed_means[name] for sign, name in trained], axis=0)]
        error = seed_error(means)
        if not error.freedom:
            return draws, not trained
        scale = error.spread * math.sqrt(sum(1 / len(of_seeds) for of_seeds in means))
        chance = np.random.default_rng([self._seed, 1])
        return draws + scale * chance.standard_t(error.freedom, self.n_boot), True

    def _seeds_pair(self, names: Sequence[str]) -> bool:
        """Whether the same seeds stand behind these models, and enough of them: pairs have half
        the degrees of freedom, which with two seeds costs more than pairing can gain."""
        seeds = [tuple(self.arms[name].seeds) for name in names]
        return len(seeds) > 1 and len(seeds[0]) >= PAIRED_SEEDS and len(set(seeds)) == 1 and all(
            len(self.seed_means[name]) == len(seeds[0]) for name in names)

    def _summary(self, value: float, draws: Array, seeds_known: bool, level: float) -> Interval:
        if self.clusters < 2 or not math.isfinite(value):
            return Interval(value, math.nan, math.nan, math.nan, self.n, self.n_boot, seeds_known,
                            level)
        # "nearest", since a neighbour may be infinite
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], method="nearest")
        side = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
        p = min(1.0, 2 * (side + 1) / (self.n_boot + 1))
        return Interval(value, float(low), float(high), p, self.n, self.n_boot, seeds_known, level)


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], weights: Sequence[float] | None = None,
    groups: Groups = None, n_boot: int = N_BOOT, seed: int = 0,
) -> Interval:
    """The difference first - second of two models' means over the same questions.

    Args:
        weights, groups: as in `Bootstrap`.
    """
    arms = {"first": Arm([first]), "second": Arm([second])}
    return Bootstrap(arms, weights, groups, n_boot, seed).difference("first", "second")


def resampled_sums(rows: Array, n_boot: int, seed: int) -> Array:
    """Column sums [n_boot, k] over rows [n, k] drawn n at a time with replacement."""
    n, generator = len(rows), np.random.default_rng([seed, 0])
    at_once = max(1, AT_ONCE // n)
    out = np.empty((n_boot, rows.shape[1]))
    for start in range(0, n_boot, at_once):
        number = min(at_once, n_boot - start)
        picks = generator.integers(0, n, (number, n)) + n * np.arange(number)[:, None]
        times = np.bincount(picks.ravel(), minlength=number * n).reshape(number, n)
        out[start : start + number] = times.astype(float) @ rows
    return out


def _by_group(columns: Array, groups: Groups) -> Array:
    """Sums [groups, k] of rows [n, k]."""
    if groups is None:
        return columns
    places: dict[Hashable, int] = {}
    index = np.array([places.setdefault(group, len(places)) for group in groups], dtype=int)
    out = np.zeros((len(places), columns.shape[1]))
    np.add.at(out, index, columns)
    return out


# ----- tests --------------------------------------------------------------------------------


@dataclass(frozen=True)
class McNemar:
    """Exact two-sided test of two accuracies on the same independent questions.

    only_first, only_second: how many questions one model has right and the other has not.
    """

    p: float
    only_first: int
    only_second: int


def mcnemar(first: Sequence[float], second: Sequence[float]) -> McNemar:
    """Compare scores that are all 0 or 1."""
    if any(score not in (0, 1) for score in (*first, *second)):
        raise ValueError("McNemar's test is for scores of 0 and 1.")
    pairs = list(zip(first, second, strict=True))
    a, b = (sum(x > y for x, y in pairs), sum(x < y for x, y in pairs))
    return McNemar(min(1.0, 2 * _half_binomial(min(a, b), a + b)), a, b)


def _half_binomial(k: int, n: int) -> float:
    """P(X <= k) for n tosses of a fair coin."""
    logs = (math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)
            for i in range(k + 1))
    return math.fsum(math.exp(x) for x in logs)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for so many comparisons at once (Holm, 1979), in the given order; NaN stays, and
    does not count."""
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)),
                   key=lambda i: p_values[i])
    out, highest = [math.nan] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[index]))
        out[index] = highest
    return out
