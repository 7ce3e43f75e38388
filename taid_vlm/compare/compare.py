"""`compare_runs`: folders in, everything that can be said of them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taid_vlm.compare import check
from taid_vlm.compare.folders import Method
from taid_vlm.compare.judging import Judged, judge_all
from taid_vlm.compare.measures import (
    Measure,
    Runs,
    benchmark_measure,
    held_out_measures,
    task_names,
)
from taid_vlm.evaluation.statistics import N_BOOT
from taid_vlm.report import Column

AVERAGE = Column("average", "average", "higher", ".1f", "%", "Plain mean over the benchmarks.")


@dataclass(frozen=True)
class Comparison:
    """Methods against each other.

    methods: those that compete, in the order given. references: teacher and base, where there are
    evaluations of them. held_out, benchmarks: every figure, judged; the average over benchmarks is
    the first of them where there is one. first: keys of the held-out figures that decide before
    the usual ones.
    """

    methods: Sequence[Method]
    references: Sequence[Method]
    baseline: str
    held_out: Sequence[Judged]
    benchmarks: Sequence[Judged]
    warnings: Sequence[str]
    n_boot: int
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
    baseline: str | None = None, n_boot: int = N_BOOT, seed: int = 0,
    more: Sequence[Measure] = (),
) -> Comparison:
    """Compare two methods or more.

    Args:
        methods: from `read_method`. teacher, base: from `read_reference`.
        baseline: whom differences are taken from; the first method by default.
        n_boot, seed: of the bootstrap.
        more: figures of the same held-out data that results.json does not have; they decide first.

    Raises:
        TaidError: runs that cannot be compared, with both values of what differs.
    """
    baseline = methods[0].name if baseline is None and methods else baseline or ""
    check.check_methods(methods, baseline)
    names, references = [m.name for m in methods], [m for m in (teacher, base) if m is not None]
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
    average = Measure(AVERAGE, {}, scale=100.0)
    return Comparison(
        methods, references, baseline, judge_all(held_out, names, baseline, seed, n_boot),
        judge_all(benchmarks, names, baseline, seed, n_boot, average), warnings, n_boot,
        [measure.column.key for measure in more])
