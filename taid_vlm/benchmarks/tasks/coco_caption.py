"""COCO captions: one sentence for a photograph, against the five of people."""

from __future__ import annotations

from taid_vlm.benchmarks.metrics.captions import CIDER, PROMPT
from taid_vlm.benchmarks.prompts import about_image
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row


def read(row: Row) -> list[Question]:
    """One image with its references."""
    return about_image(row, row.id("question_id", "id", "index"), PROMPT, *row.golds("answer"))


BENCHMARK = Benchmark("coco_caption", "COCO caption", read, (CIDER,),
                      hub=("lmms-lab/COCO-Caption", None, "val"), max_new_tokens=64)
