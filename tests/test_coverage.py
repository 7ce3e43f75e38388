"""How often intervals hold the truth, and how often equal models are called different.

By simulation, nominal 95 % intervals hold it in at least 93 % of draws, and at most 6 % of equal
models are marked: for 2 to 50 groups, shares near 0 and 1, ties, groups of unequal size, 1 to 8
seeds.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from taid_vlm.compare.judging import correct, judge
from taid_vlm.compare.measures import Items, Measure
from taid_vlm.evaluation.pairs import Arm, Paired
from taid_vlm.evaluation.statistics import mean_of
from taid_vlm.report import Column

COVERED, MARKED = 0.93, 0.06
REPEATS = [300, pytest.param(3000, marks=pytest.mark.slow)]
GROUPS = (2, 5, 10, 50)
NORMAL = NormalDist()
Rng = np.random.Generator


def sizes(groups: int, mean: int, unequal: bool) -> Any:
    return np.maximum(1, np.round(mean * np.geomspace(0.2, 3, groups))).astype(int) if unequal \
        else np.full(groups, mean)


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize(("mean", "alike", "unequal"), [
    (1, 0.0, False), (5, 0.2, False), (20, 0.1, True)])
@pytest.mark.parametrize("groups", GROUPS)
def test_a_share(groups: int, mean: int, alike: float, unequal: bool, repeats: int) -> None:
    """Near 0, near 1 and between; groups whose questions are alike (their correlation `alike`)."""
    rng, number = np.random.default_rng(groups), sizes(groups, mean, unequal)
    index = np.repeat(np.arange(groups), number)
    for share in (0.02, 0.3, 0.95):
        hits = 0
        for _ in range(repeats):
            own = rng.beta(share * (1 / alike - 1), (1 - share) * (1 / alike - 1), groups) \
                if alike else np.full(groups, share)
            right = rng.random(len(index)) < own[index]
            found = mean_of(right.astype(float).tolist(), index.tolist())
            hits += found.low <= share <= found.high
        assert hits / repeats >= COVERED, share


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("groups", GROUPS)
def test_a_mean_that_is_no_share(groups: int, repeats: int) -> None:
    """Divergences: skewed."""
    rng, hits = np.random.default_rng(groups), 0
    index = np.arange(groups).tolist()
    repeats *= 10
    for _ in range(repeats):
        own = rng.gamma(4.0, 0.25, groups)  # of mean 1
        found = mean_of(own.tolist(), index, shares=False)
        hits += found.low <= 1.0 <= found.high
    assert hits / repeats >= COVERED


def answered(rng: Rng, shares: tuple[float, float], index: Any, seeds: tuple[int, int],
             spread: float, same: float) -> dict[str, Arm]:
    """Two models right with these probabilities, whose seeds differ by `spread` (probits); hard
    questions and groups are hard for both."""
    common = math.sqrt(same / 2) * (rng.normal(size=index.max() + 1)[index]
                                    + rng.normal(size=len(index)))
    arms = {}
    for name, share, number in zip("ab", shares, seeds, strict=True):
        level = NORMAL.inv_cdf(share) * math.sqrt(1 + spread**2)
        draws = common + rng.normal(0, math.sqrt(1 - same), (number, len(index))) \
            - rng.normal(0, spread, (number, 1))
        arms[name] = Arm((draws < level).astype(float).tolist())
    return arms


def frequency(
    repeats: int, shares: tuple[float, float], index: Any, seeds: tuple[int, int] = (1, 1),
    spread: float = 0.0, same: float = 0.5,
) -> tuple[float, float]:
    """How often the difference of the shares is covered, and is said not to be 0."""
    rng, covered, marked = np.random.default_rng(5), 0, 0
    for _ in range(repeats):
        arms = answered(rng, shares, index, seeds, spread, same)
        found = Paired(arms, groups=index.tolist(), shares=True).difference("a", "b")
        covered += found.low <= shares[0] - shares[1] <= found.high
        marked += found.significant
    return covered / repeats, marked / repeats


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize(("mean", "unequal"), [(1, False), (5, True)])
@pytest.mark.parametrize("groups", GROUPS)
def test_a_difference(groups: int, mean: int, unequal: bool, repeats: int) -> None:
    index = np.repeat(np.arange(groups), sizes(groups, mean, unequal))
    for shares, same in (((0.5, 0.5), 0.5), ((0.02, 0.02), 0.2), ((0.98, 0.9), 0.5),
                         ((0.5, 0.5), 0.98), ((0.3, 0.6), 0.5)):
        covered, marked = frequency(repeats // 2, shares, index, same=same)
        assert covered >= COVERED, shares
        assert marked <= MARKED or shares[0] != shares[1], shares


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("seeds", [(2, 2), (3, 3), (8, 8), (2, 8), (1, 3)])
def test_a_difference_of_seeds(seeds: tuple[int, int], repeats: int) -> None:
    """Their spread small and large beside the error of 200 questions."""
    for shares, spread in (((0.5, 0.5), 0.1), ((0.5, 0.5), 0.4), ((0.95, 0.95), 0.2),
                           ((0.6, 0.5), 0.2)):
        covered, marked = frequency(repeats // 2, shares, np.arange(200), seeds, spread)
        assert covered >= COVERED, (shares, spread)
        assert marked <= MARKED or shares[0] != shares[1], (shares, spread)


@pytest.mark.parametrize("repeats", [60, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_marks_of_equal_methods(seeds: int, repeats: int) -> None:
    """Through the whole judgement, with the spread of seeds that single students hide: with one
    each most pairs of students differ, and no method is marked; with more few are."""
    rng, students, methods = np.random.default_rng(seeds), 0, 0
    index = np.arange(2000)
    for _ in range(repeats):
        arms = answered(rng, (0.6, 0.6), index, (seeds, seeds), 0.1, 0.6)
        measure = Measure(Column("x", "x", "higher"), {name: [mean_of(own) for own in arm.scores]
                                                       for name, arm in arms.items()},
                          Items(arms, None, index.tolist(), seeds == 1, True))
        found = correct([judge(measure, ["a", "b"], "a")])[0]
        students += "best" in found.ranking.values()
        methods += "best" in found.verdicts.values()
    assert methods / repeats <= MARKED
    assert (students / repeats > 0.3) == (seeds == 1)
