"""Errors, intervals and tests against naive loops, closed forms and published numbers."""

from __future__ import annotations

import ast
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taid_vlm.evaluation import statistics
from taid_vlm.evaluation.held_out import Moments
from taid_vlm.evaluation.pairs import Arm, Paired, paired_difference
from taid_vlm.evaluation.statistics import (
    Draws,
    Estimate,
    Part,
    holm,
    known,
    mcnemar,
    mean_of,
    mean_of_estimates,
    over_seeds,
    p_value,
    pool_seeds,
    ratio_of,
    seed_error,
    standard_error,
    student_t,
)

NORMAL = 1.959964
T2, T4, T49 = 4.302653, 2.776445, 2.009575  # 97.5th percentiles of Student's t


def scores(n: int = 300, seed: int = 0) -> tuple[list[float], list[float]]:
    """Two models of similar strength on the same questions: hard questions are hard for both."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(0.0, 1.0, n)
    return tuple((hard + shift + rng.normal(0.0, 0.3, n)).tolist()  # type: ignore[return-value]
                 for shift in (0.1, 0.0))


# ----- one model ----------------------------------------------------------------------------


def test_the_plain_mean_has_the_textbook_error() -> None:
    found = mean_of([1.0, 2.0, 3.0, 4.0])
    assert found == Estimate(2.5, pytest.approx(math.sqrt(5 / 3 / 4)), 4)


def test_groups_count_as_one_draw() -> None:
    values, _ = scores(40)
    once, groups = mean_of(values), [index for index in range(40) for _ in range(3)]
    repeated = mean_of([x for x in values for _ in range(3)], groups)
    assert repeated.value == pytest.approx(once.value)
    assert repeated.stderr == pytest.approx(once.stderr)
    assert repeated.n == 120


def test_a_ratio_is_what_the_held_out_figures_use() -> None:
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 9, 30).astype(float)
    totals = rng.normal(2.0, 1.0, 30) * sizes
    moments = Moments()
    for total, size in zip(totals, sizes, strict=True):
        moments.add(float(total), float(size))
    found = ratio_of(totals.tolist(), sizes.tolist())
    assert (found.value, found.stderr) == pytest.approx((moments.mean, moments.stderr))


def test_the_mean_of_independent_figures_weighs_them_alike() -> None:
    parts = [Estimate(1.0, 0.3, 10), Estimate(3.0, 0.4, 1000)]
    assert mean_of_estimates(parts) == Estimate(2.0, pytest.approx(0.25), 1010)
    assert math.isnan(mean_of_estimates([]).value)


def test_over_seeds_adds_the_error_of_the_seeds_to_that_of_the_questions() -> None:
    seeds = [Estimate(value, 0.1, 50) for value in (1.0, 2.0, 3.0)]
    found = over_seeds(seeds)
    assert found == Estimate(2.0, pytest.approx(math.hypot(0.1, 1 / math.sqrt(3))), 50)
    assert over_seeds(seeds[:1]) == Estimate(1.0, pytest.approx(0.1), 50)


@pytest.mark.parametrize(("squares", "draws", "weight", "expected"), [
    (5.0, 4, 4.0, math.sqrt(5 * 4 / 3) / 4), (-1e-18, 2, 1.0, 0.0), (1.0, 1, 1.0, math.nan),
    (1.0, 5, 0.0, math.nan)])
def test_the_one_formula_of_a_standard_error(
    squares: float, draws: int, weight: float, expected: float
) -> None:
    assert standard_error(squares, draws, weight) == pytest.approx(expected, nan_ok=True)


def test_statistics_need_no_torch() -> None:
    """All that compares figures calls this file, also where there are no models."""
    tree = ast.parse(Path(str(statistics.__file__)).read_text())
    named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names}
    named |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert named <= {"numpy", *sys.stdlib_module_names, "collections.abc"}


@pytest.mark.parametrize(("values", "weights"), [([], []), ([1.0, 2.0], [0.0, 0.0])])
def test_nothing_has_no_mean(values: list[float], weights: list[float]) -> None:
    found = ratio_of(values, weights)
    assert math.isnan(found.value)
    assert math.isnan(found.stderr)
    assert found.n == len(values)


def test_one_group_has_no_error() -> None:
    found = mean_of([1.0, 0.0, 1.0], ["a", "a", "a"])
    assert found.value == pytest.approx(2 / 3)
    assert math.isnan(found.stderr)


def test_pooled_seeds_by_hand() -> None:
    """Seed means 2 and 3, so stderr 0.5; question means 1.5, 2.5, 3.5, so stderr 1/sqrt(3)."""
    found = pool_seeds([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])
    assert found.value == 2.5
    assert found.stderr_seeds == pytest.approx(0.5)
    assert found.stderr_questions == pytest.approx(1 / math.sqrt(3))
    assert found.stderr == pytest.approx(math.hypot(0.5, 1 / math.sqrt(3)))
    assert (found.n, found.seeds) == (3, 2)


def test_one_seed_says_nothing_about_others() -> None:
    found = pool_seeds([[1.0, 2.0, 3.0]])
    assert math.isnan(found.stderr_seeds)
    assert found.stderr == found.stderr_questions == pytest.approx(1 / math.sqrt(3))


def test_pooled_weights() -> None:
    found = pool_seeds([[4.0, 1.0], [6.0, 3.0]], [4.0, 1.0])
    assert found.value == pytest.approx((1.0 + 9 / 5) / 2)


def test_the_spread_of_seeds_is_pooled_over_methods() -> None:
    found = seed_error([np.array([1.0, 3.0]), np.array([5.0]), np.array([0.0, 0.0, 3.0])])
    assert found.freedom == 3
    assert found.spread == pytest.approx(math.sqrt((2 + 6) / 3))
    assert math.isnan(seed_error([np.array([1.0])]).spread)


# ----- intervals of one figure --------------------------------------------------------------


@pytest.mark.parametrize(("freedom", "level", "published"), [
    (1, 0.95, 12.706205), (2, 0.95, T2), (4, 0.95, T4), (10, 0.99, 3.169273), (49, 0.95, T49),
    (1e9, 0.95, NORMAL)])
def test_students_t(freedom: float, level: float, published: float) -> None:
    assert student_t(freedom, level) == pytest.approx(published, rel=2e-5)
    tail = p_value(published, [Part(1.0, freedom)], 9)
    assert tail == pytest.approx(1 - level, rel=0.02)


@pytest.mark.parametrize(("right", "n", "low", "high"), [
    (0, 8, 0, 0.369417), (8, 8, 0.630583, 1), (3, 8, 0.085233, 0.755137),
    (1, 100, 0.000253, 0.054459), (50, 100, 0.398321, 0.601679)])
def test_shares_by_clopper_and_pearson(right: int, n: int, low: float, high: float) -> None:
    """As in their tables (scipy.stats.binomtest(k, n).proportion_ci(method="exact"))."""
    found = mean_of([1.0] * right + [0.0] * (n - right))
    assert (found.low, found.high) == pytest.approx((low, high), abs=2e-6)


def test_one_model_among_several_has_the_interval_that_it_has_alone() -> None:
    right, wrong = [1.0] * 118 + [0.0] * 2, [0.0] * 120
    pair = Paired({"a": Arm([right]), "b": Arm([wrong])}, groups=range(120), shares=True)
    for name, own in (("a", right), ("b", wrong)):
        found, alone = pair.interval(name), mean_of(own)
        assert (found.low, found.high) == pytest.approx((alone.low, alone.high))
    assert pair.interval("a").low == pytest.approx(0.941083, abs=1e-5)


def test_a_share_of_groups_is_wider_and_stays_within_0_and_1() -> None:
    scores_, groups = [1.0, 1.0, 1.0, 0.0] * 4, [i // 4 for i in range(16)]
    alone, alike = mean_of(scores_), mean_of(scores_, groups)
    assert alike.stderr == 0
    assert 0 <= alike.low < alone.low < alone.high < alike.high <= 1
    both = mean_of([1.0] * 8, [0] * 4 + [1] * 4)  # two draws, both right
    assert both.low == pytest.approx(0.158114, abs=1e-5)
    assert both.high == 1


def test_unequal_draws_have_fewer_degrees_of_freedom() -> None:
    """Two draws have one, whatever their sizes; equal ones have all but one."""
    assert Draws.of([5.0] * 12).freedom == pytest.approx(11)
    assert Draws.of([90.0, 10.0]).freedom == pytest.approx(1)
    assert 1 < Draws.of([50.0, *[1.0] * 30]).freedom < 3
    assert Draws.of([3.0, 0.0]).number == 1


def test_figures_that_are_only_known() -> None:
    found = known(0.0, 0.0, 8, share=True)
    assert (found.low, found.high) == (0, pytest.approx(0.369417, abs=2e-6))
    wide = known(2.0, 0.5, 3)
    assert wide.high == pytest.approx(2 + 0.5 * T2)
    assert math.isnan(known(2.0, math.nan, 3).low)


def test_sums_of_figures_keep_their_sides() -> None:
    parts = [mean_of([0.0] * 8), mean_of([1.0, 0.0] * 20)]
    mean = mean_of_estimates(parts)
    assert mean.value - mean.low < mean.high - mean.value
    assert mean.high == pytest.approx(mean.value + math.hypot(
        *(p.high - p.value for p in parts)) / 2)


# ----- pairs ------------------------------------------------------------------------------


def test_the_interval_is_the_paired_one() -> None:
    first, second = scores()
    found = paired_difference(first, second)
    of_pairs = mean_of([x - y for x, y in zip(first, second, strict=True)])
    assert found.value == pytest.approx(of_pairs.value)
    assert (found.high - found.low) / 2 == pytest.approx(NORMAL * of_pairs.stderr, rel=0.04)
    apart = math.hypot(mean_of(first).stderr, mean_of(second).stderr)
    assert found.high - found.low < NORMAL * apart  # half of what independent errors give
    assert found.significant
    assert found.n == 300
    assert not found.seeds_known


def test_groups_widen_the_interval() -> None:
    """Four copies of every question add no information."""
    first, second = scores(100)
    groups = [index for index in range(100) for _ in range(4)]
    wide = paired_difference(first, second)
    copies = [[x for x in values for _ in range(4)] for values in (first, second)]
    grouped, naive = paired_difference(*copies, groups=groups), paired_difference(*copies)
    assert (grouped.low, grouped.high) == pytest.approx((wide.low, wide.high))
    assert naive.high - naive.low < 0.6 * (wide.high - wide.low)


def test_weights_are_those_of_a_ratio() -> None:
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 20, 200).astype(float)
    a, b = (rng.normal(shift, 0.4, 200) * sizes for shift in (1.05, 1.0))
    found = paired_difference(a.tolist(), b.tolist(), sizes.tolist())
    closed = ratio_of((a - b).tolist(), sizes.tolist())
    assert found.value == pytest.approx(closed.value)
    assert (found.high - found.low) / 2 == pytest.approx(NORMAL * closed.stderr, rel=0.05)


def test_questions_without_weight_change_nothing() -> None:
    first, second = scores(50)
    plain = paired_difference(first, second, [1.0] * 50)
    more = paired_difference([*first, 99.0, math.nan], [*second, -99.0, 0.0],
                            [1.0] * 50 + [0.0] * 2)
    assert (more.value, more.low, more.high) == (plain.value, plain.low, plain.high)


def test_the_same_model_twice() -> None:
    first, _ = scores(60)
    found = paired_difference(first, first)
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)
    assert not found.significant


def test_the_sign_turns() -> None:
    first, second = scores(80)
    found, turned = paired_difference(first, second), paired_difference(second, first)
    assert (turned.value, turned.low, turned.high) == pytest.approx(
        (-found.value, -found.high, -found.low))
    assert turned.p == pytest.approx(found.p)


def test_where_nothing_varies_the_signs_are_counted() -> None:
    """A figure that differs by 1 at every question; as shares there could have been others."""
    found = paired_difference([1.0] * 50, [0.0] * 50)
    assert found.p == pytest.approx(2 / 2**50)
    assert found.low == found.high == 1.0
    assert paired_difference([1.0] * 4, [0.0] * 4).p == pytest.approx(2 / 2**4)
    rare = paired_difference([1.0] * 50, [0.0] * 50, shares=True)
    assert rare.low == pytest.approx(1 - T49 * math.sqrt(2) / 50)


def test_p_and_the_interval_say_the_same() -> None:
    """p is below 5 % where the 95 % interval excludes 0, with seeds, too."""
    rng = np.random.default_rng(8)
    for trial in range(12):
        shift = rng.normal(0, 0.03, 3) + 0.01 * trial
        arms = {"a": Arm([(rng.normal(s, 0.3, 50)).tolist() for s in shift]),
                "b": Arm([(rng.normal(0, 0.3, 50)).tolist() for _ in shift])}
        found = Paired(arms).difference("a", "b")
        assert found.significant == (found.p < 0.05)
        at_p = Paired(arms).difference("a", "b", level=1 - found.p)
        assert min(abs(at_p.low), abs(at_p.high)) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("first", "second", "groups"), [
    ([], [], None), ([1.0], [0.0], None), ([1.0, 0.5], [0.0, 0.0], ["a", "a"]),
    ([math.nan, 1.0, 1.0], [0.0, 1.0, 0.0], None), ([math.inf, 1.0], [0.0, 1.0], None),
])
def test_no_interval_is_made_up(first: Any, second: Any, groups: Any) -> None:
    found = paired_difference(first, second, groups=groups)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert math.isnan(found.p)
    assert not found.significant


def test_other_questions_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="same"):
        paired_difference([1.0, 0.0], [1.0])


# ----- seeds --------------------------------------------------------------------------------


def flat(*means: float) -> Arm:
    """Seeds whose questions all have the same score: nothing but the seed varies."""
    return Arm([[mean] * 20 for mean in means])


def test_two_seeds_each_give_students_interval() -> None:
    found = Paired({"a": flat(0.4, 0.6), "b": flat(0.1, 0.3)}).difference(
        "a", "b")
    assert found.value == pytest.approx(0.3)
    assert found.seeds_known
    spread = math.sqrt(0.02)  # pooled, on two degrees of freedom
    assert (found.high - found.low) / 2 == pytest.approx(T2 * spread, rel=0.05)
    assert not found.significant


def test_one_method_lends_another_its_spread() -> None:
    found = Paired({"a": flat(0.4, 0.6, 0.5, 0.3, 0.7), "b": flat(0.2)}).difference("a", "b")
    spread = math.sqrt(0.025) * math.sqrt(1 / 5 + 1)
    assert (found.high - found.low) / 2 == pytest.approx(T4 * spread, rel=0.05)


def test_models_of_one_seed_are_pairs() -> None:
    """A seed that is good for both methods says nothing of their difference."""
    means = [0.1, 0.5, 0.9, 0.4]
    shifts = [0.02, 0.04, 0.03, 0.03]

    def difference(seeds: tuple[int, ...], other: tuple[int, ...]) -> Any:
        arms = {"a": Arm([[m + s] * 20 for m, s in zip(means, shifts, strict=True)], seeds=seeds),
                "b": Arm([[m] * 20 for m in means], seeds=other)}
        return Paired(arms).difference("a", "b")

    paired, apart = difference((0, 1, 2, 3), (0, 1, 2, 3)), difference((0, 1, 2, 3), (4, 5, 6, 7))
    stderr = np.std(shifts, ddof=1) / 2
    assert (paired.high - paired.low) / 2 == pytest.approx(3.182446 * stderr, rel=0.05)
    assert apart.high - apart.low > 20 * (paired.high - paired.low)
    assert paired.value == pytest.approx(apart.value) == pytest.approx(0.03)


def test_two_seeds_are_too_few_for_pairs() -> None:
    both = {name: Arm([[0.4] * 9, [0.6] * 9], seeds=(0, 1)) for name in "ab"}
    found = Paired(both).difference("a", "b")
    assert found.high - found.low > 0.5


def test_a_teacher_has_no_seeds() -> None:
    arms = {"a": flat(0.4, 0.6, 0.5, 0.3, 0.7), "teacher": Arm([[0.9] * 20], trained=False)}
    boot = Paired(arms)
    found = boot.difference("a", "teacher")
    assert (found.high - found.low) / 2 == pytest.approx(T4 * math.sqrt(0.025 / 5), rel=0.05)
    alone = boot.interval("teacher")
    assert alone.seeds_known
    assert alone.low == pytest.approx(alone.high)


def test_questions_and_seeds_add_up() -> None:
    """With many seeds the interval is that of both errors together."""
    rng = np.random.default_rng(5)
    question, seeds = rng.normal(0, 1, 400), rng.normal(0, 0.1, 30)
    boot = Paired({"a": Arm([(question + s).tolist() for s in seeds]),
                      "b": Arm([[0.0] * 400], trained=False)})
    found = boot.difference("a", "b")
    pooled = pool_seeds([(question + s).tolist() for s in seeds])
    assert (found.high - found.low) / 2 == pytest.approx(NORMAL * pooled.stderr, rel=0.06)


def test_the_average_of_benchmarks() -> None:
    first, second = zip(*(scores(n, seed=n) for n in (60, 200)), strict=True)
    boots = [Paired({"a": Arm([a]), "b": Arm([b])})
             for a, b in zip(first, second, strict=True)]
    found = Paired.average(boots).difference("a", "b")
    parts = [mean_of([x - y for x, y in zip(a, b, strict=True)])
             for a, b in zip(first, second, strict=True)]
    assert found.value == pytest.approx(sum(p.value for p in parts) / 2)
    stderr = math.hypot(*(p.stderr for p in parts)) / 2
    assert (found.high - found.low) / 2 == pytest.approx(NORMAL * stderr, rel=0.05)
    assert found.n == 260


# ----- gap recovered ------------------------------------------------------------------------


def test_shares_of_the_gap() -> None:
    rng = np.random.default_rng(9)
    base = rng.normal(0.3, 0.1, 400)
    arms = {name: Arm([(base + share * 0.4 + rng.normal(0, 0.05, 400)).tolist()])
            for name, share in (("base", 0.0), ("student", 0.6), ("teacher", 1.0))}
    boot = Paired(arms)
    found = boot.recovered("student", "base", "teacher")
    assert found.share is not None
    assert found.share.value == pytest.approx(0.6, abs=0.02)
    assert found.share.low < 0.6 < found.share.high
    assert found.share.high - found.share.low < 0.1
    for name, share in (("base", 0.0), ("teacher", 1.0)):
        same = boot.recovered(name, "base", "teacher").share
        assert same is not None
        assert (same.value, same.low, same.high) == pytest.approx((share,) * 3)


def test_lower_may_be_better() -> None:
    first, second = scores(200)
    higher = {"base": second, "student": first, "teacher": [x + 1 for x in first]}
    lower = {name: [-x for x in values] for name, values in higher.items()}
    found, turned = (Paired({name: Arm([values]) for name, values in side.items()})
                     .recovered("student", "base", "teacher").share for side in (higher, lower))
    assert found is not None
    assert turned is not None
    assert (found.value, found.low, found.high) == pytest.approx(
        (turned.value, turned.low, turned.high))


def test_no_gap_is_not_divided_by() -> None:
    first, second = scores(30)
    arms = {"base": Arm([first]), "teacher": Arm([[x + 1e-9 for x in first]]),
            "same": Arm([first]), "student": Arm([second])}
    boot = Paired(arms)
    assert boot.recovered("student", "base", "same").share is None
    tiny = boot.recovered("student", "base", "teacher")  # a gap all the same, and a huge share
    assert tiny.share is not None
    assert math.isfinite(tiny.share.value)
    noisy = np.random.default_rng(0).normal(0, 1, 30)
    arms["noise"] = Arm([(np.array(first) + noisy - noisy.mean() + 0.01).tolist()])
    found = Paired(arms).recovered("student", "base", "noise")
    assert found.share is None
    assert found.gap.low < 0 < found.gap.high


def test_a_gap_that_is_barely_there_has_a_wide_interval() -> None:
    rng = np.random.default_rng(4)
    base = rng.normal(0, 1, 40)
    gap = rng.normal(0, 1, 40)
    gap += 2.3 / math.sqrt(40) - gap.mean()
    arms = {"base": Arm([base.tolist()]), "teacher": Arm([(base + gap).tolist()]),
            "student": Arm([(base + 0.2).tolist()])}
    found = Paired(arms).recovered("student", "base", "teacher").share
    assert found is not None
    assert not math.isnan(found.low)
    assert found.high > 2 * found.value


# ----- tests --------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(1, 9), (0, 5), (4, 4), (3, 6), (0, 0), (0, 1)])
def test_mcnemar_by_all_coin_tosses(first: int, second: int) -> None:
    """Two-sided: as unlikely a split of the questions that divide the models, or a worse one."""
    n = first + second
    heads = [sum(tosses) for tosses in itertools.product((0, 1), repeat=n)]
    naive = sum(abs(2 * k - n) >= abs(first - second) for k in heads) / len(heads)
    found = mcnemar([1] * first + [0] * second + [1, 0], [0] * first + [1] * second + [1, 0])
    assert found.p == pytest.approx(naive)
    assert (found.only_first, found.only_second) == (first, second)


def test_mcnemar_of_published_size() -> None:
    """scipy.stats.binomtest(1, 10).pvalue, and (480, 1000)."""
    assert mcnemar([1] + [0] * 9, [0] + [1] * 9).p == pytest.approx(0.021484375)
    found = mcnemar([1] * 480 + [0] * 520, [0] * 480 + [1] * 520)
    exact = 2 * sum(math.comb(1000, k) for k in range(481)) / 2**1000
    assert found.p == pytest.approx(exact, rel=1e-9)


def test_mcnemar_of_many_questions_does_not_overflow() -> None:
    found = mcnemar([1] * 20_000 + [0] * 20_400, [0] * 20_000 + [1] * 20_400)
    z = 400 / math.sqrt(40_400)
    assert found.p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)


def test_mcnemar_is_for_right_and_wrong() -> None:
    with pytest.raises(ValueError, match="0 and 1"):
        mcnemar([0.5, 1], [1, 0])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.7, 0.6]) == [1.0, 1.0]


def test_holm_leaves_out_what_was_not_tested() -> None:
    found = holm([math.nan, 0.02, math.nan, 0.03])
    assert found[1] == pytest.approx(0.04)
    assert found[3] == pytest.approx(0.04)
    assert math.isnan(found[0])


def test_equal_scores_between_nothing_and_all_have_an_interval() -> None:
    """Their spread is the rounding of a sum alone, and must not count as certainty."""
    estimate = mean_of([0.1] * 50)
    assert estimate.low < 0.05 and estimate.high > 0.2
