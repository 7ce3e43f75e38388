"""VQAv2: questions about photographs, each answered by ten people."""

from __future__ import annotations

from taid_vlm.benchmarks.metrics.vqa import ENOUGH, VQA_LMMS, VQA_OFFICIAL
from taid_vlm.benchmarks.prompts import SHORT_LINE
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row


def read(row: Row) -> list[Question]:
    """One question; those about one image are a group."""
    kinds = (column for column in ("answer_type", "question_type") if column in row)
    return [Question(
        id=row.id("question_id", "index"), prompt=(None, f"{row.text('question')}\n{SHORT_LINE}"),
        images=(row.image(),), answers=row.golds("answers", "answer", more_than=ENOUGH),
        tags={column: row.text(column) for column in kinds}, group=row.text("image_id", ""))]


BENCHMARK = Benchmark("vqav2", "VQAv2", read, (VQA_OFFICIAL, VQA_LMMS),
                      hub=("lmms-lab/VQAv2", None, "validation"), max_new_tokens=16)
