"""`compare_runs`: folders in, everything that can be said of them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taid_vlm.compare import check
from taid_vlm.compare.folders import Method
from taid_vlm.compare.judging import Judged, average, correct, judge
from taid_vlm.compare.measures import (
    Measure,
    Runs,
    benchmark_measure,
    held_out_measures,
    task_names,
)
from taid_vlm.report import Column

AVERAGE = Column("average", "average", "higher", ".1f", "%", "Plain mean over the benchmarks.")


@dataclass(frozen=True)
class Comparison:
    """Methods against each other, or one against its teacher and base.

    methods: those that compete, in the order given. references: teacher and base, where there are
    evaluations of them. held_out, benchmarks: every figure, judged; the average over benchmarks is
    the first of them where there is one. unequal: what the methods were not trained alike in.
    first: keys of the held-out figures that decide before the usual ones.
    """

    methods: Sequence[Method]
    references: Sequence[Method]
    baseline: str
    held_out: Sequence[Judged]
    benchmarks: Sequence[Judged]
    warnings: Sequence[str]
    unequal: Sequence[str] = ()
    first: Sequence[str] = ()

    @property
    def names(self) -> list[str]:
        return [method.name for method in self.methods]

    @property
    def seeds(self) -> dict[str, int]:
        """How many of each method."""
        return {m.name: max(len(m.runs), *(len(m.evaluated(j.measure.column.key))
                                           for j in self.benchmarks), 0)
                for m in self.methods}


def compare_runs(
    methods: Sequence[Method], teacher: Method | None = None, base: Method | None = None,
    baseline: str | None = None, more: Sequence[Measure] = (),
) -> Comparison:
    """Compare methods with each other, or one with its teacher and base.

    Args:
        methods: from `read_method`. teacher, base: from `read_reference`.
        baseline: whom differences are taken from; by default the first method, and of a single
            one its base or else its teacher.
        more: figures of the same held-out data that results.json does not have; they decide first.

    Raises:
        TaidError: runs that cannot be compared, with both values of what differs.
    """
    names, references = [m.name for m in methods], [m for m in (teacher, base) if m is not None]
    baseline = check.check_methods(methods, references, baseline)
    everyone = [*references, *methods]
    warnings: list[str] = []
    held_out: list[Measure] = []
    if any(method.runs for method in methods):
        warnings += check.check_held_out(methods)
        held_out = [*more, *held_out_measures(Runs(
            [m for m in methods if m.runs], check.same_base(methods),
            check.same_teacher(methods)))]
        if not check.same_base(methods):
            warnings.append("The runs started from different students, so there is no base.")
    warnings += check.check_evaluations(everyone)
    tasks = task_names(everyone)
    for task in tasks:
        warnings += check.check_benchmark(task, everyone)
    benchmarks = [benchmark_measure(task, everyone) for task in tasks]
    warnings += check.check_sizes([*held_out, *benchmarks])
    first, second = ([judge(measure, names, baseline) for measure in measures]
                     for measures in (held_out, benchmarks))
    second = [*average(second, Measure(AVERAGE, {}, scale=100.0), names, baseline), *second]
    judged = correct([*first, *second])
    return Comparison(methods, references, baseline, judged[:len(first)], judged[len(first):],
                      warnings, check.unequal(methods), [measure.column.key for measure in more])
