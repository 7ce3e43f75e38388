"""CharXiv, reasoning: one question about every chart that takes more than reading it off."""

from __future__ import annotations

from taid_vlm.benchmarks.metrics import charxiv
from taid_vlm.benchmarks.prompts import about_image
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row


def read(row: Row) -> list[Question]:
    """One question; VLMEvalKit's table has it written out."""
    if "grading_query" in row:
        kind = row.integer("inst_category")
        name, text, gold = row.id("index"), row.text("question"), row.text("answer", "")
        grading = row["grading_query"]
    else:
        words, kind = charxiv.constants(row), row.integer("reasoning_q_source")
        name, asked = row.id("figure_path"), row.text("reasoning_q")
        gold = row.text("reasoning_a")
        text = charxiv.reasoning(words, kind, asked, gold, row.where).strip()
        grading = charxiv.grade_reasoning(words, kind, asked, gold, row.where)
    return about_image(row, name, text, gold, extra={"grading": grading},
                       tags={"kind": charxiv.REASONING_KINDS.get(kind, "")})


BENCHMARK = Benchmark(
    "charxiv_reasoning", "CharXiv (reasoning)", read, (charxiv.rule("src/reasoning_utils.py"),),
    hub=("princeton-nlp/CharXiv", None, "validation"), max_new_tokens=256)
