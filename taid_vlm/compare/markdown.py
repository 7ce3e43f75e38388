"""The comparison as Markdown: for a terminal, and for a model card."""

from __future__ import annotations

from collections.abc import Sequence

from taid_vlm.compare import tables
from taid_vlm.compare.compare import Comparison
from taid_vlm.compare.findings import findings
from taid_vlm.compare.page import how_measured, provenance
from taid_vlm.report import Column, Figure, Table
from taid_vlm.report.judge import is_finite
from taid_vlm.report.page import MISSING, number

MARKS = {"better": " ▲", "worse": " ▼", "even": " ≈", "": ""}


def as_markdown(comparison: Comparison) -> str:
    """Findings, the tables that decide, how they were measured, data and versions."""
    parts = ["## Comparison", "\n".join(f"- {sentence}" for sentence in findings(comparison))]
    for title, judged in (("Benchmarks", comparison.benchmarks),
                          ("Held-out figures", _main(comparison))):
        if judged:
            parts.append(_table(tables.figures_table(title, judged, comparison)))
            against = tables.against_table(judged, comparison)
            parts += [_table(against)] if against else []
    cost = tables.cost_table(comparison.methods)
    parts += [_table(cost)] if cost else []
    if any(j.verdicts for j in (*comparison.benchmarks, *comparison.held_out)):
        parts.append("**Bold**: significantly better than every other method; *italic*: tied for "
                     "best. ▲ better, ▼ worse, ≈ no significant difference (5 %, Holm).")
    parts += ["### How this was measured", "\n".join(
        f"- {_escaped(line)}" for line in [*comparison.warnings, *how_measured(comparison)])]
    parts += ["### Provenance", "\n".join(
        f"- {_escaped(name)}: {_escaped(text)}" for name, text in provenance(comparison).items())]
    return "\n\n".join(parts) + "\n"


def _main(comparison: Comparison) -> list[tables.Judged]:
    return [j for j in comparison.held_out if j.measure.column.key not in tables.SPREAD]


def _table(table: Table) -> str:
    heads = ["", *(_head(column) for column in table.columns)]
    lines = [heads, [":--", *["--:"] * len(table.columns)]]
    for row in table.rows:
        note = f" ({row.note})" if row.note else ""
        lines.append([f"{row.name}{note}", *(
            _cell(row.values.get(column.key), column) for column in table.columns)])
    return f"### {table.title}\n\n" + "\n".join(_line(line) for line in lines)


def _line(cells: Sequence[str]) -> str:
    rule = cells[0] == ":--"
    return "| " + " | ".join(cells if rule else map(_escaped, cells)) + " |"


def _head(column: Column) -> str:
    arrow = {"higher": " ↑", "lower": " ↓", "": ""}[column.better]
    unit = f" ({column.unit})" if column.unit else ""
    return f"{column.label}{unit}{arrow}"


def _cell(figure: Figure | None, column: Column) -> str:
    if figure is None or not is_finite(figure.value):
        return MISSING
    text = number(figure.value, column.format)
    if figure.verdict == "best":
        text = f"**{text}**"
    elif figure.verdict == "tie":
        text = f"*{text}*"
    if is_finite(figure.low) and is_finite(figure.high):
        ends = (number(end, column.format) for end in (figure.low, figure.high))
        text += f" ({' to '.join(ends)})"
    elif is_finite(figure.stderr):
        text += f" ± {number(figure.stderr, column.format)}"
    return text + MARKS[figure.mark]


def _escaped(text: str) -> str:
    """A cell must neither end early nor begin another row."""
    return text.replace("|", "\\|").replace("\n", " ")
