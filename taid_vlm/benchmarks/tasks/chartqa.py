"""ChartQA: questions about charts, written by people (human) or by a model (augmented)."""

from __future__ import annotations

from taid_vlm.benchmarks.metrics.relaxed import OFFICIAL, ORIGINS, SEPARATORS
from taid_vlm.benchmarks.prompts import about_image
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row
from taid_vlm.errors import RecordError, nearest


def read(row: Row) -> list[Question]:
    """One question; an answer written as a list, "[2, 5]", is one text, not two answers."""
    answers = row.golds("answer")
    answer = answers[0] if len(answers) == 1 else row.text("answer")
    text = f"{row.text('question')}\nAnswer the question with a single word."
    return about_image(row, row.id("id", "index"), text, answer, tags=_origin(row))


def _origin(row: Row) -> dict[str, str]:
    """From "human_test" and, in VLMEvalKit's table, "test_human"."""
    column = row.first("type", "split")
    if column not in row:
        return {}
    text = row.text(column)
    for origin in ORIGINS:
        if origin in text:
            return {"type": origin}
    raise RecordError(f"{row.where}: {column} = '{text}'.{nearest(text, ORIGINS)}")


BENCHMARK = Benchmark("chartqa", "ChartQA", read, (OFFICIAL, SEPARATORS),
                      hub=("lmms-lab/ChartQA", None, "test"), max_new_tokens=16)
