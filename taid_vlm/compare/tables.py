"""The comparison as tables: figures, differences, gaps recovered, categories, cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from taid_vlm.compare.compare import Comparison
from taid_vlm.compare.folders import Method
from taid_vlm.compare.judging import APART, EXACT, PAIRED, Difference, Judged, over_seeds
from taid_vlm.compare.measures import BASE, ITSELF, TEACHER, estimate, of_benchmark
from taid_vlm.evaluation.pairs import Recovered
from taid_vlm.evaluation.statistics import Estimate
from taid_vlm.report import Column, Figure, Row, Table
from taid_vlm.report.columns import FIGURES
from taid_vlm.report.data import Role
from taid_vlm.report.run import speed

ROLES: dict[str, Role] = {TEACHER: "teacher", BASE: "start"}
SPREAD = ("student_entropy", "head_mass", "tail_mass")
GAPS = ("kl", "agreement", "nll", "token_accuracy")
PARTS = "Nothing is compared here: read it for patterns."
MOST_TAGS = 8  # values of a tag that are worth a table

INTERVAL = "Below each value its 95 % interval"
FIGURES_KEY = (
    "★ Best: significantly better than every other method on the same questions (5 %, by Holm over "
    "all comparisons on this page). ≈ Tied: the best value, and those that it is not significantly "
    f"better than. {INTERVAL}, over questions and over seeds where there are several. Pairs are "
    "compared, so methods can differ significantly while their intervals overlap.")
STUDENTS_KEY = (
    f"{INTERVAL}, over questions. Nothing is marked best or tied: one seed per method speaks for "
    "one student, not for the method.")
ALONE_KEY = f"{INTERVAL}."
DIFFERENCE_KEY = (
    "▲ better, ▼ worse, ≈ no significant difference, at 5 % after Holm's correction for all "
    "comparisons on this page. Below each difference its own 95 % interval, without correction. ")
STUDENT_DIFFERENCE_KEY = (
    "This student against that student: one seed each, so nothing is marked. Below each difference "
    "its own 95 % interval over questions, without correction. ")
TESTS = {
    PAIRED: "Student's t of pairs, over records or groups of questions",
    EXACT: "McNemar's exact test where every answer is right or wrong",
    APART: "independent errors where there are no pairs",
}
COST = (
    Column("steps", "steps", "", ",.0f"),
    Column("answer_tokens", "answer tokens", "", ",.0f", "seen in training"),
    Column("minutes", "time", "", ",.1f", "minutes of training"),
    Column("speed", "throughput", "", ",.0f", "answer tokens/s"),
    Column("memory", "peak memory", "", ".2f", "GiB"),
    Column("parameters", "parameters", "", ",.2f", "millions"),
)


# ----- figures and differences --------------------------------------------------------------


def figures_table(
    title: str, judged: Sequence[Judged], comparison: Comparison, caption: str = ""
) -> Table:
    """One row per model, teacher and base first."""
    present = {name for j in judged for name in j.figures}
    names = [name for name in (TEACHER, BASE, *comparison.names) if name in present]
    rows = [Row(name, ROLES.get(name, "baseline"),
                {j.measure.column.key: _marked(j, name) for j in judged if _tells(j, name)},
                _seeds(name, comparison)) for name in names]
    key = ALONE_KEY if len(comparison.names) < 2 else \
        FIGURES_KEY if any(j.verdicts for j in judged) else STUDENTS_KEY
    return Table(title, [j.measure.column for j in judged], rows, caption, key)


def _tells(judged: Judged, name: str) -> bool:
    """A teacher against itself is what it is by definition."""
    return name in judged.figures and not (name == TEACHER and judged.measure.column.key in ITSELF)


def _marked(judged: Judged, name: str) -> Figure:
    return replace(judged.figures[name], verdict=judged.verdicts.get(name, ""))


def _seeds(name: str, comparison: Comparison) -> str:
    seeds = comparison.seeds.get(name, 1)
    return f"{seeds} seeds" if seeds > 1 else ""


def against_table(judged: Sequence[Judged], comparison: Comparison) -> Table | None:
    """Every method's differences from the baseline."""
    kept = [j for j in judged if j.against]
    others = [name for name in comparison.names if any(name in j.against for j in kept)]
    if not others:
        return None
    columns = [_of_differences(j.measure.column) for j in kept]
    rows = [Row(name, "baseline", {j.measure.column.key: difference_figure(j, name)
                                   for j in kept if name in j.against}) for name in others]
    return Table(f"Difference from {comparison.baseline}", columns, rows,
                 key=_difference_key([d for j in kept for d in j.against.values()]))


def _of_differences(column: Column) -> Column:
    unit = "points" if column.unit == "%" else column.unit
    return replace(column, format=f"+{column.format}", unit=unit)


def difference_figure(judged: Judged, name: str) -> Figure:
    """Scaled, with its mark; p-values in the note."""
    difference, scale = judged.against[name], judged.measure.scale
    interval = difference.interval
    note = (f"p = {difference.p:.2g}, corrected {difference.adjusted:.2g} ({difference.test})")
    return Figure(scale * interval.value, None, interval.n, scale * interval.low,
                  scale * interval.high, verdict="", mark=sign(judged, difference), note=note)


def direction(judged: Judged, difference: Difference) -> Any:
    """Whether a significant difference is for the better, of methods or of two students."""
    if math.isnan(difference.adjusted):
        return ""
    if not difference.significant:
        return "even"
    higher = judged.measure.column.better == "higher"
    return "better" if (difference.interval.value > 0) == higher else "worse"


def sign(judged: Judged, difference: Difference) -> Any:
    """The mark of a difference of methods; two students get none."""
    return direction(judged, difference) if difference.of_methods else ""


def _difference_key(every: Sequence[Difference]) -> str:
    used = [TESTS[test] for test in dict.fromkeys(d.test for d in every)]
    marked = any(d.of_methods for d in every)
    seeds = "Intervals cover other seeds, by Student's t. " if marked else ""
    return f"{DIFFERENCE_KEY if marked else STUDENT_DIFFERENCE_KEY}{seeds}Tests: " \
        f"{'; '.join(used)}."


def recovered_table(judged: Sequence[Judged], comparison: Comparison, keys: Sequence[str] = ()
                    ) -> Table | None:
    """(student - base) / (teacher - base) in percent."""
    kept = [j for j in judged if j.recovered and (not keys or j.measure.column.key in keys)]
    names = [name for name in comparison.names if any(name in j.recovered for j in kept)]
    if not names:
        return None
    columns = [Column(j.measure.column.key, j.measure.column.label, "", ".0f", "% of the gap")
               for j in kept]
    rows = [Row(name, "baseline", {j.measure.column.key: _share(j.recovered[name])
                                   for j in kept if name in j.recovered}) for name in names]
    return Table("Gap recovered", columns, rows,
                 "(student − base) / (teacher − base): 0 % is the base, 100 % the teacher.",
                 key="Below each share its 95 % interval (Fieller). – where base and teacher do "
                     "not differ significantly, so that there is no gap to recover.")


def _share(recovered: Recovered) -> Figure:
    share = recovered.share
    if share is None:
        return Figure(None, note="no gap to recover")
    return Figure(100 * share.value, None, share.n, 100 * share.low, 100 * share.high)


# ----- categories and tags ------------------------------------------------------------------


def category_table(methods: Sequence[Method], key: str) -> Table | None:
    """One held-out figure per category, mean over seeds."""
    parts = {m.name: [run.results.eval.after.by_category for run in m.runs
                      if run.results.eval.after is not None] for m in methods if m.runs}
    categories = [c for c in next(iter(parts.values()), [{}])[0]
                  if all(c in of and key in of[c].figures for row in parts.values() for of in row)]
    if len(categories) < 2:
        return None
    column = next(c for c in FIGURES if c.key == key)
    columns = [Column(c, c, column.better, column.format, column.unit) for c in categories]
    rows = [Row(name, "baseline", {c: _unmarked([estimate(of[c], key) for of in row])
                                   for c in categories}) for name, row in parts.items()]
    return Table(f"{column.label} by category", columns, rows, PARTS, ALONE_KEY)


def tag_tables(task: str, title: str, methods: Sequence[Method]) -> list[Table]:
    """A benchmark's headline figure by every tag that has a few values."""
    having = [m for m in methods if m.evaluated(task)]
    reports = {m.name: [e.results["tasks"][task] for e in m.evaluated(task)] for m in having}
    some = next(iter(reports.values()))[0]
    headline = next(iter(some["figures"]))
    scale, unit = (1.0, "points") if some.get("decimals", 1) is None else (100.0, "%")
    tables = []
    for tag in some.get("by_tag") or {}:
        values = [value for value in some["by_tag"][tag]
                  if all(_tagged(r, tag, value, headline) for of in reports.values() for r in of)]
        if not 2 <= len(values) <= MOST_TAGS:
            continue
        columns = [Column(value, value, "higher", ".1f", unit) for value in values]
        rows = [Row(name, ROLES.get(name, "baseline"), {
            value: _unmarked([of_benchmark(_tagged(r, tag, value, headline), unit == "%")
                              for r in row], scale)
            for value in values}) for name, row in reports.items()]
        tables.append(Table(f"{title} by {tag}", columns, rows, PARTS, ALONE_KEY))
    return tables


def _unmarked(estimates: Sequence[Estimate], scale: float = 1.0) -> Figure:
    return replace(over_seeds(estimates, scale), verdict="")


def _tagged(report: dict[str, Any], tag: str, value: str, figure: str) -> dict[str, Any]:
    """{} where it is not there."""
    return (report.get("by_tag") or {}).get(tag, {}).get(value, {}).get(figure, {})


def failures_table(comparison: Comparison) -> Table | None:
    """How many answers could not be read, in percent; they count as wrong."""
    tasks = [j.measure.column for j in comparison.benchmarks if j.measure.estimates]
    rows = []
    for method in (*comparison.references, *comparison.methods):
        cells = {}
        for column in tasks:
            reports = [e.results["tasks"][column.key] for e in method.evaluated(column.key)]
            if reports:
                failed = sum(r["parse_failures"] for r in reports) / sum(r["n"] for r in reports)
                cells[column.key] = Figure(100 * failed, None, reports[0]["n"])
        if cells:
            rows.append(Row(method.name, ROLES.get(method.name, "baseline"), cells))
    if not any(figure.value for row in rows for figure in row.values.values()):
        return None
    columns = [replace(column, better="", format=".1f", unit="% of answers") for column in tasks]
    return Table("Answers that could not be read", columns, rows,
                 "They count as wrong. Methods that differ here differ in following instructions.")


# ----- cost ---------------------------------------------------------------------------------


def cost_table(methods: Sequence[Method]) -> Table | None:
    """What training took, mean over seeds."""
    rows = [Row(m.name, "baseline", _cost(m)) for m in methods if m.runs]
    devices = dict.fromkeys(str(run.results.machine.get("device", "")) for m in methods
                            for run in m.runs)
    caption = f"Measured on: {', '.join(devices)}." if rows else ""
    columns = [column for column in COST if any(column.key in row.values for row in rows)]
    return Table("Cost", columns, rows, caption) if rows else None


def _cost(method: Method) -> dict[str, Figure]:
    every = [run.results for run in method.runs]
    parts: dict[str, list[Any]] = {
        "steps": [r.train.steps for r in every],
        "answer_tokens": [r.train.answer_tokens for r in every],
        "minutes": [r.train.seconds / 60 for r in every],
        "speed": [speed(r) for r in every],
        "memory": [r.memory.get("peak_device_bytes", r.memory["peak_rss_bytes"]) / 2**30
                   for r in every],
        "parameters": [r.models["student"].parameters / 1e6 for r in every],
    }
    return {key: Figure(sum(values) / len(values), verdict="") for key, values in parts.items()
            if None not in values}


def spread_table(judged: Sequence[Judged], comparison: Comparison) -> Table | None:
    """How concentrated the models are: entropy, mass on the teacher's head and tail."""
    if not judged:
        return None
    return replace(figures_table("Where the probability goes", judged, comparison,
                                 "Nearest to the teacher is best, so there is no ranking."),
                   key=ALONE_KEY)
