"""CharXiv, descriptive: four questions about what can be read off a chart of arXiv."""

from __future__ import annotations

from collections.abc import Mapping

from taid_vlm.benchmarks.metrics import charxiv
from taid_vlm.benchmarks.prompts import about_image
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row


def read(row: Row) -> list[Question]:
    """Four questions about a chart; one in VLMEvalKit's table, which has them written out."""
    if "grading_query" in row:
        tags = {"kind": charxiv.KIND_OF.get(row.integer("qid"), "")}
        return about_image(row, row.id("index"), row.text("question"), row.text("answer", ""),
                           extra={"grading": row["grading_query"]}, tags=tags,
                           group=row.text(row.first("figure_path", "figure_id"), ""))
    words, figure = charxiv.constants(row), row.text("figure_path", row.number)
    return [question for place in "1234" for question in _question(row, words, figure, place)]


def _question(row: Row, words: Mapping[str, object], figure: str, place: str
              ) -> list[Question]:
    number, gold = row.integer(f"descriptive_q{place}"), row.text(f"descriptive_a{place}")
    return about_image(
        row, f"{figure}_{place}", charxiv.describing(words, number, row).strip(), gold,
        extra={"grading": charxiv.grade_describing(words, number, gold, row.where)},
        tags={"kind": charxiv.KIND_OF.get(number, "")}, group=figure)


BENCHMARK = Benchmark(
    "charxiv_descriptive", "CharXiv (descriptive)", read,
    (charxiv.rule("src/descriptive_utils.py, one answer at a time"),),
    hub=("princeton-nlp/CharXiv", None, "validation"), max_new_tokens=256)
