"""How sure a figure is: standard errors and intervals of means over questions, with or without
groups and seeds, and exact tests.

Intervals hold for few draws as for many: by Student's t, with the degrees of freedom that draws of
unequal size leave, and for shares by Clopper and Pearson, so that 0 of 8 is not 0 without an error.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

LEVEL = 0.95
MOST = 1e5  # degrees of freedom that are worth telling apart
ROUNDING = 1e-12  # an error below it is that of adding up equal scores

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Groups: TypeAlias = Sequence[Hashable] | None


# ----- distributions ------------------------------------------------------------------------


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (DLMF 8.17.22)."""
    if not 0 < x < 1:
        return x if math.isnan(x) else float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_cdf(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
                     + a * math.log(x) + b * math.log1p(-x)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 10_000):
        change = 1.0
        for term in (m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
                     -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))):
            c, d = 1 + term / c, 1 / (1 + term * d)
            change = c * d
            value *= change
        if abs(change - 1) < 1e-14:
            break
    return front * value


@lru_cache(maxsize=10_000)
def beta_quantile(p: float, a: float, b: float) -> float:
    """Where `beta_cdf` is p: Newton's steps, halved where they lead outside."""
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    low, high, x = 0.0, 1.0, a / (a + b)
    while high - low > 1e-13 * high and high > 1e-200:
        above = beta_cdf(x, a, b) - p
        low, high = (low, x) if above > 0 else (x, high)
        slope = math.exp(scale + (a - 1) * math.log(x) + (b - 1) * math.log1p(-x))
        step = x - above / slope if slope else math.nan
        last, x = x, step if low < step < high else (low + high) / 2
        if abs(x - last) <= 1e-13 * x:
            break
    return x


def student_t(freedom: float, level: float = LEVEL) -> float:
    """How far Student's t is from 0 with probability `1 - level`, on either side."""
    freedom = min(freedom, MOST)
    x = beta_quantile(1 - level, freedom / 2, 0.5)
    return math.sqrt(freedom * (1 - x) / x)


@dataclass(frozen=True)
class Part:
    """What chance adds to a figure's variance, and the degrees of freedom it is known with."""

    variance: float
    freedom: float


def reach(parts: Sequence[Part], level: float = LEVEL) -> float:
    """Half an interval's width: every part by its own Student's t, their squares added up, which is
    never narrower than what Welch's degrees of freedom give (Cochran and Cox, 1950)."""
    return math.sqrt(math.fsum(part.variance * student_t(part.freedom, level) ** 2
                               for part in parts))


def p_value(value: float, parts: Sequence[Part], draws: int) -> float:
    """Two-sided, against 0: where `reach` is as far as the value is from 0.

    Args:
        draws: how many there are; where none differs, it is that all have one sign by chance.
    """
    parts = [part for part in parts if part.variance]
    if not value or not parts:
        return min(1.0, 2.0 ** (1 - draws)) if value else 1.0
    if len(parts) == 1:
        freedom = min(parts[0].freedom, MOST)
        return beta_cdf(freedom / (freedom + value**2 / parts[0].variance), freedom / 2, 0.5)
    low, high = -700.0, -1e-9  # of log p
    for _ in range(60):
        middle = (low + high) / 2
        near = reach(parts, -math.expm1(middle)) < abs(value)
        low, high = (low, middle) if near else (middle, high)
        if high - low < 1e-4:
            break
    return math.exp(high)


def share_interval(
    value: float, half: float, draws: int, size: float, level: float = LEVEL
) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share, with the number of questions that would have its
    error if they were independent (Korn and Graubard, 1998).

    Args:
        value: from 0 to 1. half: `reach` of it; its ends are within 0 and 1 and not symmetric.
        draws: independent ones, which count where all answers have one score.
        size: how many questions there are.
    """
    n = float(draws)
    if 0 < value < 1 and half > ROUNDING:
        n = value * (1 - value) * (student_t(size - 1, level) / half) ** 2 * size / (size - 1)
    k, tail = n * value, (1 - level) / 2
    low = beta_quantile(tail, k, n - k + 1) if k > 0 else 0.0
    high = beta_quantile(1 - tail, k + 1, n - k) if k < n else 1.0
    return low, high


# ----- one model ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A figure: `value` and `stderr` in its own unit, over `n` questions; NaN where unknown.

    low, high: its 95 % interval.
    """

    value: float
    stderr: float
    n: int
    low: float = field(default=math.nan, compare=False)
    high: float = field(default=math.nan, compare=False)

    def scaled(self, factor: float) -> Estimate:
        return Estimate(factor * self.value, factor * self.stderr, self.n, factor * self.low,
                        factor * self.high)


def mean_of(
    scores: Sequence[float], groups: Groups = None, shares: bool = True
) -> Estimate:
    """Mean with its standard error; questions of one group are not independent draws.

    Args:
        scores: one per question.
        groups: which group a question is of (the same image, the same item rotated); the error is
            then the cluster-robust one of a ratio of sums.
        shares: whether scores are from 0 to 1; where one is not, that settles it.

    Returns:
        `n` counts questions. NaN without questions; the error is NaN for a single group.
    """
    return ratio_of(scores, [1.0] * len(scores), groups, shares)


def ratio_of(
    totals: Sequence[float], weights: Sequence[float], groups: Groups = None, shares: bool = True
) -> Estimate:
    """Sum of totals over sum of weights (an answer's figure summed over its tokens, and their
    number), with the error of `mean_of`."""
    n, weight = len(totals), math.fsum(weights)
    if not n or not weight:
        return Estimate(math.nan, math.nan, n)
    mean = math.fsum(totals) / weight
    residuals: dict[Hashable, float] = defaultdict(float)
    sizes: dict[Hashable, float] = defaultdict(float)
    for index, (total, size) in enumerate(zip(totals, weights, strict=True)):
        group = index if groups is None else groups[index]
        residuals[group] += total - mean * size
        sizes[group] += size
    squares = math.fsum(x * x for x in residuals.values())
    stderr = standard_error(squares, len(residuals), weight)
    draws = Draws.of(list(sizes.values()))
    if draws.number < 2:
        return Estimate(mean, stderr, n)
    part = part_of(draws.factors * np.array(list(residuals.values())), draws.freedom)
    half = reach([part])
    if not shares or not all(0 <= total <= size for total, size in
                             zip(totals, weights, strict=True)):
        return Estimate(mean, stderr, n, mean - half, mean + half)
    number = weight**2 / math.fsum(x * x for x in weights)
    if len(residuals) == n:  # Clopper and Pearson know of rare answers
        half = reach([replace(part, freedom=draws.freedom)])
    if all(total in (0, size) for total, size in zip(totals, weights, strict=True)):
        half = max(half, binomial_reach(mean, number, draws.freedom))
    return Estimate(mean, stderr, n, *share_interval(mean, half, draws.number, number))


def binomial_reach(share: float, size: float, freedom: float) -> float:
    """`reach` of a share of right answers if all were independent, which few groups that happen to
    be alike must not fall below."""
    if size <= 1:
        return math.inf
    return reach([Part(share * (1 - share) / (size - 1), freedom)])


@dataclass(frozen=True)
class Draws:
    """Independent draws of unequal size behind a ratio of sums, and what they tell of its error.

    factors: what a draw's residual (total - ratio * size) is multiplied by, so that the squares'
    sum is the jackknife's variance, which is not too small on average (Hansen, 2025).
    freedom: Satterthwaite's, exact for draws of one variance (Bell and McCaffrey, 2002).
    """

    number: int
    factors: Array
    freedom: float

    @classmethod
    def of(cls, sizes: Sequence[float] | Array) -> Draws:
        """Those of size 0 are none; of fewer than two nothing is known (NaN)."""
        size = np.asarray(sizes, float)
        number = int((size > 0).sum())
        if number < 2:
            return cls(number, np.full(len(size), math.nan), 0.0)
        share = size / size.sum()
        scale = math.sqrt((number - 1) / number) / (1 - share)
        squares = float(share @ share)
        a = (scale * share) ** 2
        trace = float(a @ (1 - 2 * share + squares))
        cross = float(a @ share)
        whole = float(a.sum())
        norm = float(a**2 @ (1 + 2 * squares - 4 * share)) + squares**2 * whole**2 \
            + 2 * whole * float(a @ share**2) - 4 * squares * whole * cross + 2 * cross**2
        return cls(number, scale / size.sum(), max(1.0, trace**2 / norm))

def part_of(errors: Array, freedom: float) -> Part:
    """The variance that the squares of errors [draws] add up to. A few draws far from the others,
    or all on one side, make it hardly known, however many there are: it has fewer degrees of
    freedom by their kurtosis and skewness (none fewer for normal ones).

    Args:
        freedom: as if draws were normal.
    """
    number, variance = len(errors), float(errors @ errors)
    if not variance:
        return Part(variance, freedom)
    kurtosis, skewness = (number ** (power / 2 - 1) * float(np.sum(errors**power))
                          / variance ** (power / 2) for power in (4, 3))
    excess = kurtosis - 1 + skewness**2
    return Part(variance, max(1.0, min(freedom, 2 * number / excess)) if excess > 0 else freedom)


def standard_error(squares: float, draws: int, weight: float) -> float:
    """Of a ratio of sums over independent draws; NaN for fewer than two.

    Args:
        squares: the sum of (total - ratio * size)^2 over the draws; weight: the sum of their sizes.
    """
    if draws < 2 or not weight:
        return math.nan
    return math.sqrt(max(squares, 0.0) * draws / (draws - 1)) / weight


def known(value: float, stderr: float, n: int, share: bool = False) -> Estimate:
    """With the interval of `n` independent draws, where nothing else is known of a figure."""
    if n < 2 or not (math.isfinite(value) and math.isfinite(stderr)):
        return Estimate(value, stderr, n)
    half = student_t(n - 1) * stderr
    if share and 0 <= value <= 1:
        return Estimate(value, stderr, n, *share_interval(value, half, n, n))
    return Estimate(value, stderr, n, value - half, value + half)


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
    k = len(parts)
    return Estimate(math.fsum(part.value for part in parts) / k,
                    root_mean_square([part.stderr for part in parts]) / math.sqrt(k),
                    sum(part.n for part in parts), *combined([(1 / k, part) for part in parts]))


def combined(parts: Sequence[tuple[float, Estimate]], seeds: float = 0.0) -> tuple[float, float]:
    """The interval of a weighted sum of independent figures, from theirs, which need not be
    symmetric (Zou and Donner's MOVER, 2008).

    Args:
        seeds: `reach` of chance that is not in theirs.
    """
    value = math.fsum(weight * part.value for weight, part in parts)
    ends = [sorted((weight * part.low, weight * part.high)) for weight, part in parts]
    low, high = (math.hypot(seeds, *(weight * part.value - end[side] for end, (weight, part)
                                     in zip(ends, parts, strict=True))) for side in (0, 1))
    return value - low, value + high


def root_mean_square(errors: Sequence[float]) -> float:
    """The error of one figure of several models on the same questions, over the models."""
    return math.sqrt(math.fsum(error**2 for error in errors) / len(errors))


def over_seeds(seeds: Sequence[Estimate]) -> Estimate:
    """The mean of one figure over seeds, with the error of the questions, which are the same for
    all seeds, and that of the seeds; one seed has none of its own."""
    if len(seeds) == 1:
        return seeds[0]
    values, k = [seed.value for seed in seeds], len(seeds)
    error, mean = seed_error([values]), math.fsum(values) / k
    of_seeds = Part(error.spread**2 / k, error.freedom)
    low, high = (math.hypot(reach([of_seeds]), root_mean_square([end - x for end, x in
                            zip(ends, values, strict=True)]))
                 for ends in ([seed.low for seed in seeds], [seed.high for seed in seeds]))
    questions = root_mean_square([seed.stderr for seed in seeds])
    return Estimate(mean, math.hypot(questions, math.sqrt(of_seeds.variance)), seeds[0].n,
                    mean - low, mean + high)


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
    table = as_table(scores)
    sizes = np.ones(table.shape[1]) if weights is None else np.asarray(weights, float)
    by_question = ratio_of(table.mean(0).tolist(), sizes.tolist(), groups)
    seeds = seed_error([table.sum(1) / sizes.sum()]) if sizes.sum() else SeedError(math.nan, 0)
    return Pooled(by_question.value, seeds.spread / math.sqrt(len(table)), by_question.stderr,
                  by_question.n, len(table))


def as_table(scores: Sequence[Sequence[float]] | Array) -> Array:
    """[seeds][questions]; raises ValueError for another shape."""
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
