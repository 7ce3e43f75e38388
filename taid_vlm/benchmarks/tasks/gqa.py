"""GQA: questions made from scene graphs; one right answer each, word for word."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from taid_vlm.benchmarks.metrics.text import equal_after, without_punctuation
from taid_vlm.benchmarks.prompts import SHORT_LINE
from taid_vlm.benchmarks.question import Benchmark, Question, Rule
from taid_vlm.benchmarks.rows import Row
from taid_vlm.config.data import DataSource
from taid_vlm.records import ImageRef, open_rows

HUB = "lmms-lab/GQA"


def read(row: Row) -> list[Question]:
    """One question; those about one image are a group."""
    return [Question(row.id("id", "question_id", "index"),
                     (None, f"{row.text('question')}\n{SHORT_LINE}"), (_image(row),),
                     (row.text("answer"),), group=row.text("imageId", ""))]


def _image(row: Row) -> ImageRef:
    """On the hub the images are a configuration of their own, on GQA's site a folder of JPEGs."""
    if "image" in row or "imageId" not in row:
        return row.image()
    name = row.text("imageId")
    image = _hub_images().get(name) if row.root is None else row.root / f"{name}.jpg"
    return Row({"image": image}, row.where).image()


@functools.cache
def _hub_images() -> Mapping[str, Any]:
    rows = open_rows(DataSource(path=HUB, name="testdev_balanced_images", split="testdev"))
    return {str(one["id"]): one["image"] for one in map(rows.columns_of, range(len(rows)))}


BENCHMARK = Benchmark("gqa", "GQA", read, (
    Rule("lmms", 1, equal_after(without_punctuation),
         source="EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/gqa/gqa.yaml (exact_match)"),
    Rule("vlmevalkit", 1, equal_after(lambda text: text.strip().lower()),
         source="open-compass/VLMEvalKit, vlmeval/dataset/utils/vqa_eval.py (accuracy)"),
), hub=(HUB, "testdev_balanced_instructions", "testdev"), max_new_tokens=16)
