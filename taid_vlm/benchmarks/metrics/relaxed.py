"""Relaxed accuracy of ChartQA: numbers within 5 %, other answers word for word."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial

from taid_vlm.benchmarks.metrics.text import as_number, of_text
from taid_vlm.benchmarks.question import Judged, Question, Rule, accuracy
from taid_vlm.evaluation.statistics import Estimate

TOLERANCE = 0.05
ORIGINS = ("human", "augmented")
_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def relaxed(answer: str, gold: str) -> bool:
    """Whether an answer is right; 12% is 0.12, and a gold of 0 must be met as it is written."""
    given, wanted = _number(answer), _number(gold)
    if given is None or not wanted:
        return answer.lower() == gold.lower()
    return abs(given - wanted) / abs(wanted) <= TOLERANCE


def _number(text: str) -> float | None:
    """A finite number, or None."""
    value = as_number(text.rstrip("%"))
    if value is None or not math.isfinite(value):
        return None
    return value / 100 if text.endswith("%") else value


def _any_gold(change: Callable[[str], str]) -> Callable[[str, Question], float]:
    def score(answer: str, question: Question) -> float:
        answer = change(answer.strip())
        return any(relaxed(answer, change(gold)) for gold in question.answers)

    return score


def by_origin(judged: Sequence[Judged]) -> dict[str, Estimate]:
    """Relaxed accuracy over all questions, and over those of people and of a model."""
    parts = {origin: [j for j in judged if j.question.tags.get("type") == origin]
             for origin in ORIGINS}
    return {"overall": accuracy(judged)["accuracy"],
            **{origin: accuracy(part)["accuracy"] for origin, part in parts.items() if part}}


OFFICIAL = Rule(
    "official", 1, of_text(_any_gold(str)), by_origin,
    source="google-research/pix2struct, pix2struct/metrics.py, as lmms-eval and VLMEvalKit have it")
SEPARATORS = Rule(
    "separators", 1, of_text(_any_gold(partial(_SEPARATOR.sub, ""))), by_origin,
    source="official, after the commas of thousands are taken out")
