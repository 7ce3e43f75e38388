"""AI2D: questions about diagrams of school books."""

from __future__ import annotations

from taid_vlm.benchmarks.choices import choice_question, choice_rules, options_of
from taid_vlm.benchmarks.metrics.letters import lmms_full_stop_option
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row


def read(row: Row) -> list[Question]:
    """One question; `options` with the answer's place from 0, or A to D with its letter."""
    return choice_question(row, row.id("index"), options_of(row, "options"),
                           tags=row.tags("category"))


BENCHMARK = Benchmark(
    "ai2d", "AI2D", read, choice_rules(lmms=(lmms_full_stop_option, "ai2d/utils.py")),
    hub=("lmms-lab/ai2d", None, "test"), likelihood=True)
