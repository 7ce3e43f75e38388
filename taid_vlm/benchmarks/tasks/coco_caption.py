"""COCO captions: one sentence for a photograph, against the five of people."""

from __future__ import annotations

from taid_vlm.benchmarks.metrics.captions import CIDER
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row

PROMPT = "Provide a one-sentence caption for the provided image."


def read(row: Row) -> list[Question]:
    """One image with its references."""
    return [Question(id=row.id("question_id", "id", "index"), prompt=(None, PROMPT),
                     images=(row.image(),), answers=row.golds("answer"))]


BENCHMARK = Benchmark("coco_caption", "COCO caption", read, (CIDER,),
                      hub=("lmms-lab/COCO-Caption", None, "val"), max_new_tokens=64)
