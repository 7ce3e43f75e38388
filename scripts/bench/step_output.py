"""Rows of `bench_step.py` as a table for the terminal and as a Markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.output import megabytes
from bench.step_worker import PARTS

Row = Mapping[str, Any]
COLUMNS = ("implementation", "s / step", "(lowest-highest)", "x ours", "CPU s / step",
           "answer tokens/s", "tokens/s", "peak memory", "loss error", "gradient error")
PART_COLUMNS = ("implementation", *PARTS, "rest")


def title(row: Row) -> str:
    """What was trained, for example "forward_kl, text, small, float32"."""
    pair = row["scale"] if row["student"] is None else f"{row['teacher']} to {row['student']}"
    cut = "" if row["layers"] is None else f" cut to {row['layers']} layers"
    trained = "" if row["lora"] is None else f", LoRA of rank {row['lora']}"
    return f"{row['objective']}, {row['kind']}, {pair}{cut}, {row['dtype']}{trained}"


def batch_line(row: Row) -> str:
    return (f"{row['batch_size']} rows x {row['accumulation']} micro-batches, longest row "
            f"{row['sequence_length']} tokens; {row['answer_tokens']} answer tokens of "
            f"{row['tokens']} in an optimizer step")


def conditions_line(row: Row) -> str:
    """Machine and versions on one line."""
    about = row["conditions"]
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items()
                         if name in ("torch", "transformers", "trl"))
    device = about["device"] if row["device"] == "cuda" else about["processor"]
    return f"{device}, {about['threads']} threads, load {about['load']:.1f} · {versions}"


def table(rows: Sequence[Row]) -> str:
    """One case for the terminal; a row that failed says why."""
    lines = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines if len(line) > 2) for i in range(len(COLUMNS))]
    widths[0] = max(len(line[0]) for line in lines)
    body = ["  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
                      for i, (cell, w) in enumerate(zip(line, widths, strict=False)))
            if len(line) > 2 else f"{line[0]:<{widths[0]}}  {line[1]}" for line in lines]
    return "\n".join([title(rows[0]), batch_line(rows[0]), *body, *_remarks(rows, "")])


def markdown(rows: Sequence[Row]) -> str:
    """One section per case: the table, where the time goes, and remarks."""
    cases = list(dict.fromkeys(title(row) for row in rows))
    return "\n".join([conditions_line(rows[0]), ""] + [
        _section([row for row in rows if title(row) == case]) for case in cases])


def _section(rows: Sequence[Row]) -> str:
    timed = [row for row in rows if row.get("parts")]
    parts = [_line(PART_COLUMNS), _line(["---"] * len(PART_COLUMNS)), *(
        _line([row["implementation"], *(f"{row['parts'][part]:.3f}" for part in
                                        PART_COLUMNS[1:])]) for row in timed)]
    return "\n".join([
        f"## {title(rows[0])}", "", f"{batch_line(rows[0])}.", "",
        _line(COLUMNS), _line(["---"] * len(COLUMNS)),
        *(_line(_padded(_cells(row))) for row in rows), "",
        *_remarks(rows, "- "), "", "Seconds of a step in its parts, from a round of their own:",
        "", *parts, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _padded(cells: Sequence[str]) -> list[str]:
    return [*cells, *[""] * (len(COLUMNS) - len(cells))]


def _cells(row: Row) -> tuple[str, ...]:
    if "error" in row:
        return row["implementation"], row["error"]
    low, high = row["seconds_spread"]
    ratio, peak = row["ratio_to_ours"], row["peak_memory_bytes"]
    return (row["implementation"], f"{row['seconds']:.3g}", f"({low:.3g}-{high:.3g})",
            "" if ratio is None else f"{ratio:.2f}", f"{row['cpu_seconds']:.3g}",
            f"{row['answer_tokens_per_second']:,.0f}", f"{row['tokens_per_second']:,.0f}",
            "" if peak is None else megabytes(peak), _error(row["loss_error"]),
            _error(row["grad_norm_error"]))


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _remarks(rows: Sequence[Row], bullet: str) -> list[str]:
    """What a row's figures do not say."""
    return [f"{bullet}{row['implementation']}: {row[key]}" for key in ("note", "differs")
            for row in rows if row.get(key) and "error" not in row]
