"""Who is best, by how much, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from taid_vlm.compare.measures import BASE, TEACHER, Measure
from taid_vlm.evaluation import statistics
from taid_vlm.evaluation.statistics import (
    LEVEL,
    Bootstrap,
    Estimate,
    Interval,
    Recovered,
    holm,
    mcnemar,
    pool_seeds,
)
from taid_vlm.report import Figure
from taid_vlm.report.judge import Verdict

ALPHA = 1 - LEVEL
WIDTH = 1.959964  # standard errors to each side of a 95 % interval
PAIRED, EXACT, APART = "paired bootstrap", "McNemar", "independent errors"


@dataclass(frozen=True)
class Difference:
    """method - other, for one figure.

    p: of the test named; adjusted: by Holm for all comparisons of its table.
    """

    interval: Interval
    p: float
    test: str
    adjusted: float = math.nan

    @property
    def significant(self) -> bool:
        return self.adjusted < ALPHA


@dataclass(frozen=True)
class Judged:
    """A measure with all that can be said of it.

    figures: {model: mean over seeds}. verdicts: {method: "best", "tie" or ""}.
    against: {method: its difference from the baseline}. recovered: {method: of the gap}.
    """

    measure: Measure
    bootstrap: Bootstrap | None
    figures: Mapping[str, Figure]
    verdicts: Mapping[str, Verdict]
    against: Mapping[str, Difference]
    recovered: Mapping[str, Recovered]

    @property
    def leaders(self) -> list[str]:
        return [name for name, verdict in self.verdicts.items() if verdict]


def judge_all(
    measures: Sequence[Measure], names: Sequence[str], baseline: str, seed: int, n_boot: int,
    average: Measure | None = None,
) -> list[Judged]:
    """Every measure of one table; differences from the baseline are corrected over all of it.

    Args:
        names: the methods that compete.
        average: how the mean over those measures that are shares is called; it comes first, if
            all models have all of them.
    """
    judged = [_judge(measure, names, baseline, seed + index, n_boot)
              for index, measure in enumerate(measures)]
    if average is not None:
        shares = [j for j in judged if j.measure.column.unit == average.column.unit]
        judged = [*_average(shares, average, names, baseline), *judged]
    corrected = iter(correct([d for j in judged for d in j.against.values()]))
    return [replace(j, against={name: next(corrected) for name in j.against}) for j in judged]


def correct(differences: Sequence[Difference]) -> list[Difference]:
    adjusted = holm([difference.p for difference in differences])
    return [replace(difference, adjusted=p) for difference, p in
            zip(differences, adjusted, strict=True)]


def _average(
    judged: Sequence[Judged], average: Measure, names: Sequence[str], baseline: str
) -> list[Judged]:
    """The mean over benchmarks; nothing where pairs or models lack somewhere."""
    boots = [j.bootstrap for j in judged if j.bootstrap is not None]
    seeds = [{name: len(arm.scores) for name, arm in boot.arms.items()} for boot in boots]
    if len(boots) < 2 or len(boots) < len(judged) or any(s != seeds[0] for s in seeds):
        return []
    boot = Bootstrap.average(boots)
    figures = {name: _with_interval(boot.interval(name), average.scale) for name in boot.arms}
    return [_complete(average, boot, figures, names, baseline)]


# ----- one measure --------------------------------------------------------------------------


def _judge(
    measure: Measure, names: Sequence[str], baseline: str, seed: int, n_boot: int
) -> Judged:
    items = measure.items
    boot = None if items is None else Bootstrap(
        items.arms, items.weights, items.groups, n_boot, seed)
    figures = {name: _figure(measure, name, seeds) for name, seeds in measure.estimates.items()}
    if not measure.comparable:
        return Judged(measure, boot, figures, {}, {}, {})
    return _complete(measure, boot, figures, names, baseline)


def _complete(
    measure: Measure, boot: Bootstrap | None, figures: Mapping[str, Figure],
    names: Sequence[str], baseline: str,
) -> Judged:
    """With everything that follows from figures and pairs."""
    competing = [name for name in names if name in figures]
    against = {} if baseline not in figures or not measure.column.better else {
        name: difference(measure, boot, name, baseline)
        for name in competing if name != baseline}
    recovered = {}
    if boot is not None and measure.column.better and {TEACHER, BASE} <= figures.keys():
        recovered = {name: boot.recovered(name, BASE, TEACHER) for name in competing}
    return Judged(measure, boot, figures, _verdicts(measure, boot, figures, competing), against,
                  recovered)


def _figure(measure: Measure, name: str, seeds: Sequence[Estimate]) -> Figure:
    """Mean over seeds; from the questions themselves where they are there."""
    scale = measure.scale
    if measure.items is not None:
        pooled = pool_seeds(measure.items.arms[name].scores, measure.items.weights,
                            measure.items.groups)
        note = "" if pooled.seeds == 1 else (
            f"{pooled.seeds} seeds; standard error over seeds {scale * pooled.stderr_seeds:.2g}, "
            f"over questions {scale * pooled.stderr_questions:.2g}")
        return Figure(scale * pooled.value, scale * pooled.stderr, seeds[0].n, note=note)
    return over_seeds(seeds, scale)


def over_seeds(estimates: Sequence[Estimate], scale: float = 1.0) -> Figure:
    """Mean; the error of the questions, which are the same for all seeds, and of the seeds."""
    mean = statistics.over_seeds(estimates)
    return Figure(scale * mean.value, scale * mean.stderr, mean.n,
                  note=f"{len(estimates)} seeds" if len(estimates) > 1 else "")


def _with_interval(interval: Interval, scale: float) -> Figure:
    return Figure(scale * interval.value, None, interval.n, scale * interval.low,
                  scale * interval.high)


def difference(measure: Measure, boot: Bootstrap | None, first: str, second: str) -> Difference:
    """first - second: in pairs where there are pairs, exactly where McNemar's test is."""
    if boot is None:
        return _apart(measure, first, second)
    interval = boot.difference(first, second)
    items = measure.items
    if items is not None and items.binary:
        arms = items.arms[first].scores, items.arms[second].scores
        if len(arms[0]) == len(arms[1]) == 1:
            return Difference(interval, mcnemar(arms[0][0], arms[1][0]).p, EXACT)
    return Difference(interval, interval.p, PAIRED)


def _apart(measure: Measure, first: str, second: str) -> Difference:
    """As if both were measured on other questions: too wide, but all there is."""
    a, b = (_figure(replace(measure, scale=1.0), name, measure.estimates[name])
            for name in (first, second))
    value = (math.nan if a.value is None or b.value is None else a.value - b.value)
    stderr = math.hypot(a.stderr or 0.0, b.stderr or 0.0)
    p = math.erfc(abs(value) / stderr / math.sqrt(2)) if stderr else math.nan
    several = all(len(measure.estimates[name]) > 1 for name in (first, second))
    return Difference(Interval(value, value - WIDTH * stderr, value + WIDTH * stderr, p, a.n or 0,
                               0, several), p, APART)


def _verdicts(
    measure: Measure, boot: Bootstrap | None, figures: Mapping[str, Figure],
    competing: Sequence[str],
) -> dict[str, Verdict]:
    """Best when significantly better than every competitor, else a tie of all that the leader is
    not significantly better than (Holm over the competitors)."""
    values = {name: figures[name].value for name in competing}
    finite = {name: x for name, x in values.items() if x is not None and math.isfinite(x)}
    if not measure.column.better or len(finite) < 2 or len(finite) < len(values):
        return {}
    sign = 1 if measure.column.better == "higher" else -1
    leader = max(finite, key=lambda name: sign * finite[name])
    others = [name for name in finite if name != leader]
    rivals = correct([difference(measure, boot, leader, name) for name in others])
    if any(math.isnan(rival.p) for rival in rivals):
        return {}
    tied = [name for name, rival in zip(others, rivals, strict=True) if not rival.significant]
    verdict: Verdict = "tie" if tied else "best"
    return dict.fromkeys((leader, *tied), verdict)
