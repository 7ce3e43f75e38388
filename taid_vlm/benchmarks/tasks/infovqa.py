"""InfographicVQA: questions about infographics; answers are read off them, or counted."""

from __future__ import annotations

from taid_vlm.benchmarks.metrics.anls import ANLS, STRICT
from taid_vlm.benchmarks.prompts import SHORT_LINE
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row


def read(row: Row) -> list[Question]:
    """One question; those about one image are a group."""
    tags = {f"type: {kind}": "yes" for kind in row.texts("answer_type")}
    return [Question(
        id=row.id("questionId", "question_id", "index"),
        prompt=(None, f"{row.text('question')}\n{SHORT_LINE}"), images=(row.image(),),
        answers=row.golds("answers", "answer"), tags=tags, group=row.text("image_url", ""))]


BENCHMARK = Benchmark("infovqa", "InfoVQA", read, (ANLS, STRICT),
                      hub=("lmms-lab/DocVQA", "InfographicVQA", "validation"))
