"""TextVQA: questions about text in photographs, each answered by ten people."""

from __future__ import annotations

from taid_vlm.benchmarks.metrics.vqa import ENOUGH, TEXTVQA_OFFICIAL, TEXTVQA_VLMEVALKIT
from taid_vlm.benchmarks.prompts import SHORT_LINE
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row


def read(row: Row) -> list[Question]:
    """One question, in the capitals that lmms-eval gives it: "what is the PIN" as "What is the
    pin"; no words read off the image by another model stand beside it."""
    return [Question(
        id=row.id("question_id", "index"),
        prompt=(None, f"{row.text('question').capitalize()}\n{SHORT_LINE}"), images=(row.image(),),
        answers=row.golds("answers", "answer", more_than=ENOUGH), group=row.text("image_id", ""))]


BENCHMARK = Benchmark("textvqa", "TextVQA", read, (TEXTVQA_OFFICIAL, TEXTVQA_VLMEVALKIT),
                      hub=("lmms-lab/textvqa", None, "validation"))
