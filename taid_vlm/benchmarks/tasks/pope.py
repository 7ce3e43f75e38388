"""POPE: is an object in the picture, where half of the objects asked for are not."""

from __future__ import annotations

from functools import partial

from taid_vlm.benchmarks.metrics import yes_no
from taid_vlm.benchmarks.prompts import SHORT_LINE, about_image
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row
from taid_vlm.records.images import SHORTEST_BASE64


def read(row: Row) -> list[Question]:
    """One question for each category it is in ("adversarial,popular" in VLMEvalKit's table).

    The authors' own files call the columns `text` and `label`, and hold one category each.
    """
    text = row.text(row.first("question", "text"))
    answer = yes_no.right_answer(row.text(row.first("answer", "label")), row.where)
    number = row.id("question_id", "index")
    picture = row.get("image_source", row.get("image"))
    named = isinstance(picture, str) and len(picture) < SHORTEST_BASE64
    categories = [name.strip() for name in row.text("category", "").split(",")]
    return [question for category in categories for question in about_image(
        row, f"{category}/{number}" if category else number, f"{text}\n{SHORT_LINE}", answer,
        tags={"category": category} if category else {}, group=str(picture) if named else "")]


BENCHMARK = Benchmark("pope", "POPE", read, (
    yes_no.rule("official", yes_no.first_sentence, "AoiDragon/POPE, evaluate.py"),
    yes_no.rule("lmms", yes_no.exactly, "EvolvingLMMs-Lab/lmms-eval, tasks/pope/utils.py",
                partial(yes_no.detection, unread_is_missed=False)),
    yes_no.rule("word", yes_no.as_word, yes_no.VLMEVALKIT),
), hub=("lmms-lab/POPE", None, "test"))
