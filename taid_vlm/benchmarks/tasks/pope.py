"""POPE: is an object in the picture, where half of the objects asked for are not."""

from __future__ import annotations

from functools import partial

from taid_vlm.benchmarks.metrics.yes_no import (
    as_word,
    detection,
    exactly,
    first_sentence,
    judged_by,
    right_answer,
)
from taid_vlm.benchmarks.prompts import SHORT_LINE
from taid_vlm.benchmarks.question import Benchmark, Question, Rule, one_by_one
from taid_vlm.benchmarks.rows import SHORTEST_BASE64, Row


def read(row: Row) -> list[Question]:
    """One question for each category it is in ("adversarial,popular" in VLMEvalKit's table).

    The authors' own files call the columns `text` and `label`, and hold one category each.
    """
    text = row.text("text" if "text" in row else "question")
    answer = right_answer(row.text("label" if "label" in row else "answer"), row.where)
    number = row.id("question_id", "index")
    picture = row.get("image_source", row.get("image"))
    named = isinstance(picture, str) and len(picture) < SHORTEST_BASE64
    categories = [name.strip() for name in row.text("category", "").split(",")]
    return [Question(
        id=f"{category}/{number}" if category else number, prompt=(None, f"{text}\n{SHORT_LINE}"),
        images=(row.image(),), answers=(answer,), tags={"category": category} if category else {},
        group=str(picture) if named else "") for category in categories]


BENCHMARK = Benchmark("pope", "POPE", read, (
    Rule("official", 1, one_by_one(judged_by(first_sentence)), detection,
         "AoiDragon/POPE, evaluate.py"),
    Rule("lmms", 1, one_by_one(judged_by(exactly)), partial(detection, unread_is_missed=False),
         "EvolvingLMMs-Lab/lmms-eval, tasks/pope/utils.py"),
    Rule("word", 1, one_by_one(judged_by(as_word)), detection,
         "open-compass/VLMEvalKit, vlmeval/dataset/utils/yorn.py"),
), hub=("lmms-lab/POPE", None, "test"))
