"""ChartQA: questions about charts, written by people (human) or by a model (augmented)."""

from __future__ import annotations

from taid_vlm.benchmarks.metrics.relaxed import OFFICIAL, ORIGINS, SEPARATORS
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row
from taid_vlm.errors import RecordError, nearest


def read(row: Row) -> list[Question]:
    """One question; an answer written as a list, "[2, 5]", is one text, not two answers."""
    listed = row.golds("answer")
    return [Question(
        id=row.id("id", "index"),
        prompt=(None, f"{row.text('question')}\nAnswer the question with a single word."),
        images=(row.image(),), answers=listed if len(listed) == 1 else (row.text("answer"),),
        tags=_origin(row))]


def _origin(row: Row) -> dict[str, str]:
    """From "human_test" and, in VLMEvalKit's table, "test_human"."""
    column = "type" if "type" in row else "split"
    if column not in row:
        return {}
    found = [origin for origin in ORIGINS if origin in row.text(column)]
    if not found:
        raise RecordError(f"{row.where}: {column} = '{row.text(column)}'."
                          f"{nearest(row.text(column), ORIGINS)}")
    return {"type": found[0]}


BENCHMARK = Benchmark("chartqa", "ChartQA", read, (OFFICIAL, SEPARATORS),
                      hub=("lmms-lab/ChartQA", None, "test"), max_new_tokens=16)
