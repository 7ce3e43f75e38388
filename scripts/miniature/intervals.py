"""95 % intervals over seeds, plain and paired."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from taid_vlm.evaluation.statistics import mean_of

# 97.5 % points of Student's t for 1 to 10 degrees of freedom; beyond, a series is exact to 1e-4
QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
NORMAL = 1.959964


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds, its standard error, and the ends of its 95 % interval.

    One seed has no spread: its error and ends are NaN.
    """

    value: float
    stderr: float
    low: float
    high: float
    n: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def student_t(freedom: int) -> float:
    """The 97.5 % point of Student's t; NaN without a degree of freedom."""
    if freedom < 1:
        return math.nan
    if freedom <= len(QUANTILES):
        return QUANTILES[freedom - 1]
    z, n = NORMAL, freedom
    return (z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3))


def around(value: float, stderr: float, n: int) -> Interval:
    """The interval of a mean over `n` seeds whose standard error is known."""
    reach = student_t(n - 1) * stderr
    return Interval(value, stderr, value - reach, value + reach, n)


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of one figure per seed."""
    mean = mean_of(values)
    return around(mean.value, mean.stderr, mean.n)


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """`first` minus `second`, seed by seed: what the seeds share cancels."""
    return interval([a - b for a, b in zip(first, second, strict=True)])
