"""AI2D: questions about diagrams of school books."""

from __future__ import annotations

from taid_vlm.benchmarks.choices import (
    choice_prompt,
    letter_of,
    letter_rule,
    lmms_rule,
    options_of,
    vlmevalkit_rule,
)
from taid_vlm.benchmarks.metrics.letters import lmms_full_stop_option
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row


def read(row: Row) -> list[Question]:
    """One question; `options` with the answer's place from 0, or A to D with its letter."""
    options = options_of(row, "options")
    return [Question(
        id=row.id("index"), prompt=(None, choice_prompt(row.text("question"), options)),
        images=(row.image(),), choices=options, answers=(letter_of(row, options),),
        tags={"category": row.text("category")} if "category" in row else {})]


BENCHMARK = Benchmark(
    "ai2d", "AI2D", read,
    (letter_rule(), lmms_rule(lmms_full_stop_option, "ai2d/utils.py"), vlmevalkit_rule()),
    hub=("lmms-lab/ai2d", None, "test"), likelihood=True)
