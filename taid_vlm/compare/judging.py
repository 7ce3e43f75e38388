"""Who is best, by how much, and how sure that is: what every table and sentence says is from here.

All differences of a comparison, of whatever figure, are corrected together (Holm), once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from taid_vlm.compare.measures import BASE, TEACHER, Measure
from taid_vlm.evaluation import statistics
from taid_vlm.evaluation.pairs import Interval, Paired, Recovered
from taid_vlm.evaluation.statistics import LEVEL, Estimate, combined, holm, mcnemar, pool_seeds
from taid_vlm.report import Figure
from taid_vlm.report.judge import Verdict

ALPHA = 1 - LEVEL
WIDTH = 1.959964  # standard errors to each side of a 95 % interval
PAIRED, EXACT, APART = "paired t", "McNemar", "independent errors"


@dataclass(frozen=True)
class Difference:
    """One model's figure minus another's.

    p: of the test named; adjusted: by Holm for all differences of the comparison.
    """

    interval: Interval
    p: float
    test: str
    adjusted: float = math.nan

    @property
    def significant(self) -> bool:
        return self.adjusted < ALPHA

    @property
    def of_methods(self) -> bool:
        """Whether it holds for other seeds; otherwise it is of this student and that student."""
        return self.interval.seeds_known

    def turned(self) -> Difference:
        i = self.interval
        return replace(self, interval=replace(i, value=-i.value, low=-i.high, high=-i.low))


@dataclass(frozen=True)
class Judged:
    """A measure with all that can be said of it.

    names: who competes, of those that have the figure. figures: {model: mean over seeds}.
    pairs: {(first, second): first - second}, one for every two that are compared.
    recovered: {name: of the gap}.
    """

    measure: Measure
    paired: Paired | None
    figures: Mapping[str, Figure]
    names: Sequence[str]
    baseline: str
    pairs: Mapping[tuple[str, str], Difference] = field(default_factory=dict)
    recovered: Mapping[str, Recovered] = field(default_factory=dict)

    def between(self, first: str, second: str) -> Difference:
        """first - second."""
        found = self.pairs.get((first, second))
        return self.pairs[second, first].turned() if found is None else found

    @property
    def against(self) -> dict[str, Difference]:
        """{name: its difference from the baseline}."""
        return {name: self.between(name, self.baseline) for name in self.names
                if name != self.baseline and any({name, self.baseline} == {*pair}
                                                 for pair in self.pairs)}

    @property
    def ranking(self) -> dict[str, Verdict]:
        """Best when significantly better than every competitor, else a tie of all that the leader
        is not significantly better than; of the students that were measured."""
        values = {name: self.figures[name].value for name in self.names}
        finite = {name: x for name, x in values.items() if x is not None and math.isfinite(x)}
        among = [d for pair, d in self.pairs.items() if {*pair} <= {*self.names}]
        if not among or len(finite) < len(values) or any(math.isnan(d.p) for d in among):
            return {}
        sign = 1 if self.measure.column.better == "higher" else -1
        leader = max(finite, key=lambda name: sign * finite[name])
        tied = [name for name in self.names
                if name != leader and not self.between(leader, name).significant]
        verdict: Verdict = "tie" if tied else "best"
        return dict.fromkeys((leader, *tied), verdict)

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """The ranking of methods: none where a difference is of one seed each, which speaks for
        the two students alone."""
        return self.ranking if all(d.of_methods for d in self.pairs.values()) else {}

    @property
    def leaders(self) -> list[str]:
        return list(self.ranking)


def judge(measure: Measure, names: Sequence[str], baseline: str) -> Judged:
    """Not corrected yet.

    Args:
        names: the methods that compete. baseline: one of them, or a reference.
    """
    items = measure.items
    paired = None if items is None else Paired(
        items.arms, items.weights, items.groups, items.shares)
    figures = {name: _figure(measure, paired, name, seeds)
               for name, seeds in measure.estimates.items()}
    if not measure.comparable:
        return Judged(measure, paired, figures, [n for n in names if n in figures], baseline)
    return _complete(measure, paired, figures, names, baseline)


def average(judged: Sequence[Judged], measure: Measure, names: Sequence[str], baseline: str
            ) -> list[Judged]:
    """The mean over the benchmarks that are shares, as `measure`; nothing where pairs or models
    lack somewhere."""
    shares = [j for j in judged if j.measure.column.unit == measure.column.unit]
    parts = [j.paired for j in shares if j.paired is not None]
    seeds = [{name: len(arm.scores) for name, arm in part.arms.items()} for part in parts]
    if len(parts) < 2 or len(parts) < len(shares) or any(s != seeds[0] for s in seeds):
        return []
    paired = Paired.average(parts)
    figures = {name: _with_interval(paired.interval(name), measure.scale) for name in paired.arms}
    return [_complete(measure, paired, figures, names, baseline)]


def correct(judged: Sequence[Judged]) -> list[Judged]:
    """All differences of all figures as one family."""
    adjusted = iter(holm([d.p for j in judged for d in j.pairs.values()]))
    return [replace(j, pairs={pair: replace(d, adjusted=next(adjusted))
                              for pair, d in j.pairs.items()}) for j in judged]


# ----- one measure --------------------------------------------------------------------------


def _complete(
    measure: Measure, paired: Paired | None, figures: Mapping[str, Figure],
    names: Sequence[str], baseline: str,
) -> Judged:
    """With everything that follows from figures and pairs."""
    competing = [name for name in names if name in figures]
    pairs, recovered = {}, {}
    if measure.column.better:
        two = [*combinations(competing, 2)]
        if baseline not in competing and baseline in figures:
            two += [(name, baseline) for name in competing]
        pairs = {pair: _difference(measure, paired, *pair) for pair in two}
        if paired is not None and {TEACHER, BASE} <= figures.keys():
            recovered = {name: paired.recovered(name, BASE, TEACHER) for name in competing}
    return Judged(measure, paired, figures, competing, baseline, pairs, recovered)


def _figure(measure: Measure, paired: Paired | None, name: str, seeds: Sequence[Estimate]
            ) -> Figure:
    """Mean over seeds; from the questions themselves where they are there."""
    scale = measure.scale
    if paired is None or measure.items is None:
        return over_seeds(seeds, scale)
    pooled = pool_seeds(measure.items.arms[name].scores, measure.items.weights,
                        measure.items.groups)
    note = "" if pooled.seeds == 1 else (
        f"{pooled.seeds} seeds; standard error over seeds {scale * pooled.stderr_seeds:.2g}, "
        f"over questions {scale * pooled.stderr_questions:.2g}")
    return replace(_with_interval(paired.interval(name), scale), n=seeds[0].n,
                   stderr=scale * pooled.stderr, note=note)


def over_seeds(estimates: Sequence[Estimate], scale: float = 1.0) -> Figure:
    """Mean; the error of the questions, which are the same for all seeds, and of the seeds."""
    mean = statistics.over_seeds(estimates).scaled(scale)
    return Figure(mean.value, mean.stderr, mean.n, mean.low, mean.high,
                  note=f"{len(estimates)} seeds" if len(estimates) > 1 else "")


def _with_interval(interval: Interval, scale: float) -> Figure:
    return Figure(scale * interval.value, None, interval.n, scale * interval.low,
                  scale * interval.high)


def _difference(measure: Measure, paired: Paired | None, first: str, second: str) -> Difference:
    """first - second: in pairs where there are pairs, exactly where McNemar's test is."""
    if paired is None:
        return _apart(measure, first, second)
    interval = paired.difference(first, second)
    items = measure.items
    if items is not None and items.binary:
        arms = items.arms[first].scores, items.arms[second].scores
        if len(arms[0]) == len(arms[1]) == 1:
            return Difference(interval, mcnemar(arms[0][0], arms[1][0]).p, EXACT)
    return Difference(interval, interval.p, PAIRED)


def _apart(measure: Measure, first: str, second: str) -> Difference:
    """As if both were measured on other questions: too wide, but all there is."""
    a, b = (statistics.over_seeds(measure.estimates[name]) for name in (first, second))
    value, (low, high) = a.value - b.value, combined([(1.0, a), (-1.0, b)])
    half = value - low if value > 0 else high - value
    p = math.erfc(abs(value) / half * WIDTH / math.sqrt(2)) if half else math.nan
    several = all(len(measure.estimates[name]) > 1 for name in (first, second)
                  if name not in (TEACHER, BASE))
    return Difference(Interval(value, low, high, p, a.n, several), p, APART)
