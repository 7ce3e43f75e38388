"""What models are compared by: held-out figures and benchmarks, question by question."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from taid_vlm.compare.folders import Distillation, Method
from taid_vlm.evaluation.answers import AnswerPair, Key
from taid_vlm.evaluation.pairs import Arm
from taid_vlm.evaluation.statistics import Estimate, known
from taid_vlm.report import Column
from taid_vlm.report.columns import CHUNKS, FIGURES, MASSES
from taid_vlm.runs.results import Figures

TEACHER, BASE = "Teacher", "Base"
# what a teacher has against itself; the other figures against a teacher it has of its own
ITSELF = {"kl": 0.0, "reverse_kl": 0.0, "jsd": 0.0, "agreement": 1.0, "chunk_kl": 0.0}
AGAINST_TEACHER = (*ITSELF, "head_mass", "tail_mass")
SHARES = ("agreement", "token_accuracy", "head_mass", "tail_mass")  # from 0 to 1
OF_TEACHER = {"nll": "teacher_nll", "student_entropy": "teacher_entropy",
              "head_mass": "teacher_head_mass", "tail_mass": "teacher_tail_mass"}


@dataclass(frozen=True)
class Items:
    """The same questions as every model answered them.

    weights, groups, shares: as in `pairs.Paired`. binary: whether all scores are 0 or 1 and no two
    questions belong together, so that McNemar's test is exact.
    """

    arms: Mapping[str, Arm]
    weights: Sequence[float] | None
    groups: Sequence[str]
    binary: bool
    shares: bool = False


@dataclass(frozen=True)
class Measure:
    """One figure of all models that have it.

    column: how it is shown; values are multiplied by `scale` for that.
    estimates: {model: one per seed}, as results.json has them.
    items: None where they cannot be paired, with the reason in `unpaired`.
    comparable: whether the models' figures mean the same at all.
    """

    column: Column
    estimates: Mapping[str, Sequence[Estimate]]
    items: Items | None = None
    unpaired: str = ""
    scale: float = 1.0
    comparable: bool = True


# ----- held-out figures ---------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """The runs that are compared on held-out data.

    base: whether they started from one student, so that what it was is a row, too.
    teacher: whether all of them have the same one, so that figures against it compare.
    """

    methods: Sequence[Method]
    base: bool
    teacher: bool

    @property
    def all(self) -> list[Distillation]:
        return [run for method in self.methods for run in method.runs]


@dataclass(frozen=True)
class Shared:
    """The answers that all runs have, run by run; no keys, and why, where they are not the same."""

    keys: Sequence[Key]
    answers: Sequence[Mapping[Key, AnswerPair]]
    why: str = ""


def held_out_measures(runs: Runs) -> list[Measure]:
    """Every figure that some run has, in the report's order."""
    shared = _shared(runs.all)
    columns = (*FIGURES[:1], CHUNKS, *FIGURES[1:], *MASSES[:2])
    return [_held_out(column, runs, shared) for column in columns
            if any(column.key in run.after for run in runs.all)]


def _shared(runs: Sequence[Distillation]) -> Shared:
    answers = [{answer.key: answer for answer in run.answers} for run in runs]
    missing = [str(run.folder) for run, own in zip(runs, answers, strict=True) if not own]
    if missing:
        return Shared([], answers, f"no eval_answers.jsonl in {', '.join(missing)}")
    if any(own.keys() != answers[0].keys() for own in answers):
        return Shared([], answers, "the runs measured different answers")
    return Shared(list(answers[0]), answers)


def _held_out(column: Column, runs: Runs, shared: Shared) -> Measure:
    key = column.key
    estimates = _estimates(key, runs)
    comparable = runs.teacher or key not in AGAINST_TEACHER
    if not shared.keys or key == "ece":
        return Measure(column, estimates, None, shared.why or "it is no mean over answers",
                       comparable=comparable)
    sizes = [[own[place].size(key) for place in shared.keys] for own in shared.answers]
    if any(other != sizes[0] for other in sizes):
        return Measure(column, estimates, None, "the students' tokens are not the same",
                       comparable=comparable)
    arms = dict(_arms(key, shared, sizes[0], runs.methods, estimates))
    items = Items(arms, sizes[0], [source for source, *_ in shared.keys], binary=False,
                  shares=key in SHARES)
    return Measure(column, estimates, items, comparable=comparable)


def _estimates(key: str, runs: Runs) -> dict[str, list[Estimate]]:
    """The rows of a figure: teacher, base and methods, where they have it."""
    first = runs.all[0].results.eval
    rows = {TEACHER: [_teachers(key, first.after) if runs.teacher else None],
            BASE: [_known(first.before, key) if runs.base else None]}
    rows |= {method.name: [_known(run.results.eval.after, key) for run in method.runs]
             for method in runs.methods}
    return {name: [e for e in row if e is not None] for name, row in rows.items()
            if row and None not in row}


def _arms(
    key: str, shared: Shared, sizes: Sequence[float], methods: Sequence[Method],
    rows: Mapping[str, Any],
) -> Iterator[tuple[str, Arm]]:
    """Totals per answer of everything that has a row."""
    def totals(number: int, read: Callable[[AnswerPair], float | None]) -> list[float]:
        values = (read(shared.answers[number][place]) for place in shared.keys)
        return [(math.nan if value is None else value) if size else 0.0
                for value, size in zip(values, sizes, strict=True)]

    if TEACHER in rows:
        yield TEACHER, Arm([[ITSELF[key] * size for size in sizes] if key in ITSELF else
                            totals(0, lambda answer: answer.teacher.get(OF_TEACHER[key]))], False)
    if BASE in rows:
        yield BASE, Arm([totals(0, lambda answer: answer.before.get(key))], trained=False)
    start = 0
    for method in methods:
        numbers = range(start, start := start + len(method.runs))
        if method.name in rows:
            yield method.name, Arm([totals(n, lambda a: a.after.get(key)) for n in numbers],
                                   seeds=method.seeds)


def estimate(means: Figures, key: str) -> Estimate:
    """A figure that was measured."""
    return known(means.figures[key], means.figures.get(f"{key}_stderr", math.nan),
                 means.n_answers, key in SHARES)


def _known(means: Figures | None, key: str) -> Estimate | None:
    """None where it was not measured."""
    return None if means is None or key not in means.figures else estimate(means, key)


def _teachers(key: str, means: Figures | None) -> Estimate | None:
    own = _known(means, key if key in ITSELF else OF_TEACHER.get(key, ""))
    return own and (Estimate(ITSELF[key], 0.0, own.n, ITSELF[key], ITSELF[key])
                    if key in ITSELF else own)


# ----- benchmarks ---------------------------------------------------------------------------


def task_names(methods: Sequence[Method]) -> list[str]:
    """Benchmarks in the order of the evaluations, those of all models first."""
    every = [task for method in methods for e in method.evaluations for task in e.results["tasks"]]
    have = [{task for e in method.evaluations for task in e.results["tasks"]}
            for method in methods if method.evaluations]
    common = reduce(set.intersection, have) if have else set[str]()
    return sorted(dict.fromkeys(every), key=lambda task: task not in common)


def benchmark_measure(task: str, methods: Sequence[Method]) -> Measure:
    """A benchmark's headline figure, of the models that were asked it."""
    having = [method for method in methods if method.evaluated(task)]
    reports = {method.name: [e.results["tasks"][task] for e in method.evaluated(task)]
               for method in having}
    some = next(iter(reports.values()))[0]
    headline = next(iter(some["figures"]))
    decimals = some.get("decimals", 1)  # None: the benchmark has points of its own
    shares = decimals is not None
    estimates = {name: [of_benchmark(report["figures"][headline], shares) for report in of_seeds]
                 for name, of_seeds in reports.items()}
    column = Column(task, some["title"], "higher", f".{decimals if shares else 1}f",
                    "%" if shares else "points",
                    f"{headline}, rule {some['rule']} (version {some['rule_version']}).")
    items, unpaired = _questions(task, having, estimates, shares)
    return Measure(column, estimates, items, unpaired, 100.0 if shares else 1.0)


def of_benchmark(figure: Mapping[str, Any], share: bool = False) -> Estimate:
    """From results.json, where what is not finite is null, and older files have no interval."""
    value, stderr, low, high = (math.nan if figure.get(key) is None else figure[key]
                                for key in ("value", "stderr", "low", "high"))
    return known(value, stderr, figure["n"], share) if math.isnan(low) else \
        Estimate(value, stderr, figure["n"], low, high)


Rows = dict[str, Mapping[str, Any]]


def _questions(
    task: str, methods: Sequence[Method], estimates: Mapping[str, Sequence[Estimate]], shares: bool
) -> tuple[Items | None, str]:
    """Scores question by question, if their mean is the figure that is reported.

    Where it is not, a group (the rotations of one question) may count as right only as a whole.
    """
    answers: dict[str, list[Rows]] = {
        method.name: [{row["id"]: row for row in e.answers(task)} for e in method.evaluated(task)]
        for method in methods}
    every = [rows for seeds in answers.values() for rows in seeds]
    if not every[0] or any(rows.keys() != every[0].keys() for rows in every):
        return None, "the models' answers are not to the same questions, or not there"
    groups = {key: row.get("group") or key for key, row in every[0].items()}
    if any(row["score"] is None for rows in every for row in rows.values()):
        return None, "some answers have no score of their own"
    own = {group: group for group in groups.values()}
    for scores_of, grouped in ((_each, groups), (_worst_of_group, own)):
        scored = {name: [scores_of(rows, groups) for rows in seeds]
                  for name, seeds in answers.items()}
        if all(_mean_is(table, mean.value) for name, seeds in scored.items()
               for table, mean in zip(seeds, estimates[name], strict=True)):
            return replace(_items(scored, grouped, methods), shares=shares), ""
    return None, "its figure is no mean over questions"


def _each(rows: Rows, groups: Mapping[str, str]) -> dict[str, float]:
    return {key: float(rows[key]["score"]) for key in groups}


def _worst_of_group(rows: Rows, groups: Mapping[str, str]) -> dict[str, float]:
    worst: dict[str, float] = {}
    for key, group in groups.items():
        worst[group] = min(worst.get(group, math.inf), float(rows[key]["score"]))
    return worst


def _mean_is(scores: Mapping[str, float], value: float) -> bool:
    return math.isclose(math.fsum(scores.values()) / len(scores), value, rel_tol=1e-6,
                        abs_tol=1e-9)


def _items(
    scored: Mapping[str, Sequence[Mapping[str, float]]], groups: Mapping[str, str],
    methods: Sequence[Method],
) -> Items:
    keys = list(next(iter(scored.values()))[0])
    grouped = [groups[key] for key in keys]
    arms = {m.name: Arm([[table[key] for key in keys] for table in scored[m.name]], m.trained,
                        m.seeds) for m in methods}
    plain = all(score in (0, 1) for arm in arms.values() for table in arm.scores
                for score in table)
    return Items(arms, None, grouped, plain and len(set(grouped)) == len(keys))
