"""The page itself: turns a report into the plain values that the template prints."""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from taid_vlm.io.files import write_text
from taid_vlm.report import charts, judge, palette
from taid_vlm.report.data import Column, Curve, Example, Figure, Report, Row, Section, Table
from taid_vlm.report.palette import Style

TEMPLATES = Path(__file__).with_name("templates")
SCRIPTS = ("charts.js", "gallery.js", "tables.js")
MISSING = "\u2013"  # en dash
ANSWER_LIMIT = 240  # characters shown of an answer; the rest is in its tooltip
PROMPT_LIMIT = 600
MOST_STEPS = 8  # answers of a student on its way that a card shows
DENSE = 6  # columns, beyond which a table is set closer
TINY_IMAGE = 160  # pixels; narrower images are enlarged with hard edges instead of blur
BETTER = {"higher": ("↑", "higher is better"), "lower": ("↓", "lower is better"), "": ("", "")}

Styles = Mapping[str, Style]


@dataclass(frozen=True)
class Clipped:
    """A text as shown, and the whole of it where something was cut off."""

    text: str
    full: str = ""


@dataclass(frozen=True)
class Bar:
    """A figure on the scale of its column: positions in percent of the width of the cell.

    ``zero``: where nothing lies, in a column of differences.
    """

    dot: float
    low: float
    high: float
    zero: float | None = None


@dataclass(frozen=True)
class Cell:
    """One cell of a table, ready to print."""

    value: str
    stderr: str = ""
    interval: str = ""
    title: str = ""
    verdict: judge.Verdict = ""
    mark: str = ""
    bar: Bar | None = None
    sort: float | None = None


def render(report: Report) -> str:
    """The page as HTML text; the same report always gives the same text."""
    styles = palette.assign(report)
    axes = charts.axes_of(curve for section in report.sections for curve in section.curves)
    sections = [_section(section, f"s{i}", styles, axes)
                for i, section in enumerate(report.sections, start=1)]
    return fill("report.html.j2", SCRIPTS, report=report, styles=styles, sections=sections)


def fill(
    template: str, scripts: Sequence[str], folder: Path = TEMPLATES, css: str = "", **values: Any
) -> str:
    """A page on the ground that all share.

    Args:
        template, scripts: files of `folder`. css: what it adds to the look of all pages.
    """
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in scripts)
    return charts.clean(environment(folder, TEMPLATES).get_template(template).render(
        css=stylesheet() + css, script=script, script_hash=csp_hash(script), **values))


def write_report(report: Report, path: Path) -> Path:
    """Write the page to ``path`` in one step; raises TaidError where that cannot be done."""
    return write_text(render(report), Path(path))


def stylesheet() -> str:
    """The look that every page shares, light and dark."""
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return palette.stylesheet() + "\n" + css


def environment(*folders: Path) -> Environment:
    """Templates of these folders, with everything that is printed escaped."""
    return Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def csp_hash(script: str) -> str:
    """Names our script in the content security policy, so that no other one can run."""
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return "sha256-" + base64.b64encode(digest).decode("ascii")


def _section(
    section: Section, anchor: str, styles: Styles, axes: Mapping[str, charts.Axis]
) -> dict[str, Any]:
    curves = enumerate(section.curves, start=1)
    parts = {
        "text": section.text,
        "tables": [_table(table) for table in section.tables],
        "curves": [_curve(curve, f"{anchor}c{i}", styles, axes) for i, curve in curves],
        "gallery": _gallery(section.examples),
    }
    return {"anchor": anchor, "title": section.title, "empty": not any(parts.values()), **parts}


# Tables


def _table(table: Table) -> dict[str, Any]:
    columns = [_cells(column, table.rows) for column in table.columns]
    lines = [[cells[i] for cells in columns] for i in range(len(table.rows))]
    cells = [cell for line in lines for cell in line]
    return {
        "title": table.title,
        "caption": table.caption,
        "columns": [(column, *BETTER[column.better]) for column in table.columns],
        "rows": list(zip(table.rows, lines, strict=True)),
        "help": [(column.label, column.help) for column in table.columns if column.help],
        "marks": {cell.verdict for cell in cells if cell.verdict},
        "errors": any(cell.stderr for cell in cells),
        "bars": any(cell.bar for cell in cells),
        "dense": len(table.columns) > DENSE,
        "spectators": any(row.role in judge.SPECTATORS for row in table.rows),
        "sizes": _sizes(table),
        "key": table.key,
    }


def _cells(column: Column, rows: list[Row]) -> list[Cell]:
    """The cells of one column, from the first row to the last."""
    figures = [row.values.get(column.key, Figure(None)) for row in rows]
    marks = judge.verdicts(column, rows)
    competing = [row.role not in judge.SPECTATORS for row in rows]
    bars = _bars(figures, competing) if column.better else [None] * len(figures)
    triples = zip(figures, marks, bars, strict=True)
    return [_cell(figure, column, verdict, bar) for figure, verdict, bar in triples]


def _cell(figure: Figure, column: Column, verdict: judge.Verdict, bar: Bar | None) -> Cell:
    if not judge.is_finite(figure.value):
        what = "not measured" if figure.value is None else "not finite"
        return Cell(MISSING, title=figure.note or what)
    value, stderr, note, interval = number(figure.value, column.format), "", "", ""
    if judge.is_finite(figure.low) and judge.is_finite(figure.high):
        interval = " to ".join(number(end, column.format) for end in (figure.low, figure.high))
        note = "95 % interval"
    elif judge.has_error(figure):
        stderr = number(figure.stderr or 0.0, column.format.lstrip("+"))
        note = f"± {stderr} (standard error)"
    elif column.better:
        note = "standard error unknown"
    count = f"n = {figure.n}" if figure.n is not None else ""
    return Cell(value, stderr, interval, ", ".join(filter(None, (note, count, figure.note))),
                verdict, figure.mark, bar, figure.value)


def number(value: float, spec: str) -> str:
    """``value`` in a format spec (specs for integers round first), with a true minus sign."""
    text = format(round(value) if spec.endswith("d") else value, spec)
    if text.startswith("-") and not any(digit in text for digit in "123456789"):
        text = text[1:]  # rounded to nothing
    return text.replace("-", "\u2212", 1) if text.startswith("-") else text


def _bars(figures: list[Figure], competing: list[bool]) -> list[Bar | None]:
    """Each figure with two standard errors (or its interval) to both sides, on one scale for the
    column: that of the models that compete, so that a distant teacher does not blur them all.

    What lies outside of it has no bar.
    """
    spans = [_span(figure) for figure in figures]
    own = [span for span, competes in zip(spans, competing, strict=True) if span and competes]
    edges = [edge for span in (own if len(own) > 1 else spans) if span for edge in span]
    differences = any(figure.mark for figure in figures)
    low, high = (min(edges), max(edges)) if edges else (0.0, 0.0)
    low, high = (min(low, 0.0), max(high, 0.0)) if differences else (low, high)
    width = high - low
    if not 0 < width < math.inf:
        return [None] * len(figures)

    def scaled(value: float) -> float:
        return round(100 * (value - low) / width, 2)

    zero = scaled(0.0) if differences else None
    return [Bar(scaled(s[1]), scaled(s[0]), scaled(s[2]), zero)
            if s and low <= s[0] and s[2] <= high else None for s in spans]


def _span(figure: Figure) -> tuple[float, float, float] | None:
    """Lower end, value and upper end."""
    if not judge.is_finite(figure.value):
        return None
    if judge.is_finite(figure.low) and judge.is_finite(figure.high):
        return figure.low, figure.value, figure.high
    reach = 2 * (figure.stderr or 0.0) if judge.has_error(figure) else 0.0
    return figure.value - reach, figure.value, figure.value + reach


def _sizes(table: Table) -> str:
    """The numbers of examples behind a table: "n = 500" or "n = 200 to 500"."""
    keys = {column.key for column in table.columns}
    figures = (f for row in table.rows for key, f in row.values.items() if key in keys)
    sizes = sorted({f.n for f in figures if f.n is not None and judge.is_finite(f.value)})
    if not sizes:
        return ""
    return f"n = {sizes[0]}" if len(sizes) == 1 else f"n = {sizes[0]} to {sizes[-1]}"


# Curves


def _curve(
    curve: Curve, prefix: str, styles: Styles, axes: Mapping[str, charts.Axis]
) -> dict[str, Any]:
    return {
        "title": curve.title,
        "x_label": curve.x_label,
        "caption": curve.caption,
        "names": list(curve.series),
        "svg": charts.draw(curve, styles, prefix, axes),
        "left_out": charts.left_out(curve),
        "log_y": curve.log_y,
    }


# Gallery


def _gallery(examples: list[Example]) -> dict[str, Any] | None:
    """Cards that show a student learn come first, then those where the models disagree, free-form
    ones last."""
    if not examples:
        return None
    ordered = sorted(examples, key=lambda e: (
        not e.progress, -judge.disagreement(e), _is_unmarked(e)))
    return {
        "cards": [_card(example) for example in ordered],
        "categories": list(Counter(example.category for example in examples).items()),
        "disagreements": sum(judge.disagreement(example) > 0 for example in examples),
        "images": any(example.image for example in examples),
        "unmarked": any(map(_is_unmarked, examples)),
        "progress": max(len(_stretches(example.progress)) for example in examples),
        "most": MOST_STEPS,
        "by_rule": any(example.scores for example in examples),
        "by_match": any(not example.scores for example in examples),
    }


def _is_unmarked(example: Example) -> bool:
    return judge.is_free_form(example) and not example.scores


def _card(example: Example) -> dict[str, Any]:
    answers = [(name, True, clip(answer, ANSWER_LIMIT), judge.mark(example, name))
               for name, answer in example.answers.items()]
    steps = [(label, False, clip(answer, ANSWER_LIMIT), judge.match(example, answer))
             for label, answer in _thinned(_stretches(example.progress))]
    return {
        "image": data_uri(example.image) if example.image else "",
        "tiny": _is_tiny(example.image or b""),
        "category": example.category,
        "prompt": clip(example.prompt, PROMPT_LIMIT),
        "reference": clip(example.reference, ANSWER_LIMIT),
        "disagree": judge.disagreement(example) > 0,
        "answers": [*answers[:-1], *steps, *answers[-1:]],
    }


def _stretches(progress: Mapping[int, str]) -> list[tuple[str, str]]:
    """Where the answer stayed the same, one label for all of these steps."""
    runs = [(answer, [step for step, _ in steps])
            for answer, steps in groupby(sorted(progress.items()), key=lambda item: item[1])]
    return [(f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}", answer)
            for answer, steps in runs]


def _thinned(stretches: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """At most ``MOST_STEPS``, evenly spaced."""
    shown = min(len(stretches), MOST_STEPS)
    return [stretches[index * len(stretches) // shown] for index in range(shown)]


def clip(text: str, limit: int) -> Clipped:
    """At most ``limit`` characters, with the whole text alongside when some are left out."""
    text = text.strip()
    if len(text) <= limit:
        return Clipped(text)
    return Clipped(text[: limit - 1].rstrip() + "…", text)


def data_uri(image: bytes) -> str:
    """A PNG or JPEG as the address of an image in the page itself."""
    kind = "jpeg" if image.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"


def _is_tiny(image: bytes) -> bool:
    """True for a PNG narrower than ``TINY_IMAGE``; its width is in bytes 16 to 20."""
    is_png = image.startswith(b"\x89PNG\r\n\x1a\n") and len(image) >= 24
    return is_png and int.from_bytes(image[16:20], "big") < TINY_IMAGE
