"""Rows as a table for the terminal, as CSV, and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taid_vlm.io.files import write_text
from taid_vlm.report.palette import SLOTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
COLOURS = {name: SLOTS[slot][0] for name, slot in {
    "ours": "taid", "ours_float32": "taid", "naive": "start", "trl": "kl", "gkd": "sky",
    "liger": "rkl", "liger_triton": "amber"}.items()}
INK, GRID = SLOTS["teacher"][0], "#d9dce0"
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "taid-vlm-bench", "font.family": "DejaVu Sans",
            "font.size": 9.5, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK,
            "ytick.color": INK}
REASON_LENGTH = 30  # letters of an error that have room in the picture
COLUMNS = ("implementation", "ratio to floor", "(lowest-highest)", "seconds", "extra memory",
           "of it gradients", "gradient error")


def case_name(row: Row) -> str:
    """What was computed, for example "jsd, 256 tokens"."""
    answers = row["answers"]
    tail = "" if answers == row["tokens"] else f", {answers:,} answers"
    return f"{row['objective']}, {row['tokens']:,} tokens{tail}"


def conditions_line(row: Row) -> str:
    """Type, sizes, machine and versions on one line."""
    about = row["conditions"]
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items()
                         if name in ("torch", "trl", "liger-kernel"))
    head = " · head frozen" if row["frozen_head"] else ""
    return (f"{row['dtype']} · V {row['vocab']:,} · hidden {row['student_hidden']:,} and "
            f"{row['teacher_hidden']:,}{head} · {about['processor']}, {about['threads']} threads "
            f"· {versions}")


def table(rows: Sequence[Row]) -> str:
    """One case's rows; a row that failed says why."""
    lines = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines if len(line) > 2) for i in range(len(COLUMNS))]
    first, floor = rows[0], rows[0]["floor_seconds"]
    speed = "" if not floor else (f" · floor {floor:.3g} s, "
                                  f"{first['floor_flops'] / floor / 1e9:,.0f} GFLOP/s")
    body = [("  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
                       for i, (cell, w) in enumerate(zip(line, widths, strict=False))) if
             len(line) > 2 else f"{line[0]:<{widths[0]}}  {line[1]}").rstrip() for line in lines]
    return "\n".join([f"{case_name(first)}{speed}", *body])


def _cells(row: Row) -> tuple[str, ...]:
    if "error" in row:
        return row["implementation"], row["error"]
    low, high = row["ratio_spread"]
    return (row["implementation"], f"{row['ratio_to_floor']:.3f}", f"({low:.2f}-{high:.2f})",
            f"{row['seconds']:.3g}", megabytes(row["peak_extra_bytes"]),
            megabytes(row["gradient_bytes"]), f"{row['gradient_error']:.1e}")


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def write_csv(rows: Sequence[Row], path: Path) -> Path:
    """One line per row, conditions in columns of their own."""
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return write_text(text.getvalue(), path)


def _flat(values: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value)
        elif isinstance(value, (list, tuple)):
            flat |= {f"{name}_low": value[0], f"{name}_high": value[1]}
        else:
            flat[name] = value
    return flat


# ----- the picture ----------------------------------------------------------------------------


def plot(rows: Sequence[Row], path: Path) -> Path:
    """Time as a ratio to the floor, and extra memory, side by side; the suffix says the format."""
    import matplotlib
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(case_name(row) for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    height = 1.4 + 0.27 * len(cases) * (len(names) + 0.8)
    with matplotlib.rc_context(SETTINGS):
        canvas = Figure(figsize=(10, height), layout="constrained", facecolor="white")
        left, right = canvas.subplots(1, 2, sharey=True)
        _bars(left, rows, cases, names, "ratio_to_floor", 1.0, "{:.2f}")
        _bars(right, rows, cases, names, "peak_extra_bytes", 1e9, "{:.3g}")
        left.axvline(1.0, color=INK, linewidth=1, dashes=(3, 2))
        left.set_title("time, in floors of four GEMMs (dashed)", loc="left", fontsize=10.5)
        right.set_title("peak extra memory, GB", loc="left", fontsize=10.5)
        left.set_yticks(range(len(cases)), [case.replace(", ", "\n") for case in cases])
        left.invert_yaxis()
        canvas.supxlabel(conditions_line(rows[0]), fontsize=7.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        return _save(canvas, path)


def _save(canvas: Any, path: Path) -> Path:
    partial = path.with_name(f".{path.name}{path.suffix}")
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    canvas.savefig(partial, dpi=160, metadata=metadata)
    return partial.replace(path)


def _bars(
    axes: Axes, rows: Sequence[Row], cases: Sequence[str], names: Sequence[str], key: str,
    unit: float, form: str,
) -> None:
    """One group of bars per case; an implementation that failed says so in its place."""
    found = {(case_name(row), row["implementation"]): row for row in rows}
    thick = 0.84 / max(1, len(names))
    for index, name in enumerate(names):
        for place, case in enumerate(cases):
            y = place + (index - (len(names) - 1) / 2) * thick
            row = found[case, name]
            length = (row[key] or 0.0) / unit
            axes.barh(y, length, thick * 0.86, color=COLOURS[name])
            said = row["error"][:REASON_LENGTH] if "error" in row else form.format(length)
            axes.annotate(f"{name}: {said}", (length, y), xytext=(4, 0), textcoords="offset points",
                          va="center", fontsize=8)
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
