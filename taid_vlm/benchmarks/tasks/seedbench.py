"""SEED-Bench, its questions about single images: nine kinds of understanding, four options each."""

from __future__ import annotations

from taid_vlm.benchmarks.choices import choice_question, choice_rules
from taid_vlm.benchmarks.metrics.letters import lmms_first_character
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row
from taid_vlm.errors import SampleDropped

OPTIONS = ("choice_a", "choice_b", "choice_c", "choice_d")


def read(row: Row) -> list[Question]:
    """One question; those about videos, which the whole of SEED-Bench has, are no part."""
    if row.text("data_type", "image") != "image":
        raise SampleDropped(f"data_type {row.text('data_type')}", row.where)
    options = row.options() or tuple(map(row.text, OPTIONS))
    return choice_question(
        row, row.id("question_id", "index"), options, image=row.first("image", "data_id"),
        tags=row.tags("category", "question_type_id"), group=row.text("data_id", ""))


BENCHMARK = Benchmark(
    "seedbench", "SEED-Bench (image)", read,
    choice_rules(lmms=(lmms_first_character, "seedbench/utils.py")),
    hub=("lmms-lab/SEED-Bench", None, "test"), likelihood=True)
