"""MMBench: every question once per option, the options rotated; right only if right every time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from taid_vlm.benchmarks.choices import (
    choice_prompt,
    letter_of,
    letter_rule,
    lmms_rule,
    options_of,
    vlmevalkit_rule,
)
from taid_vlm.benchmarks.metrics.letters import lmms_mmbench_option
from taid_vlm.benchmarks.metrics.yes_no import all_right
from taid_vlm.benchmarks.question import Benchmark, Judged, Question
from taid_vlm.benchmarks.rows import LETTERS, Row
from taid_vlm.evaluation.statistics import Estimate, mean_of

ROTATION = 1_000_000  # the k-th rotation of question i has the index i + k * ROTATION
_NOTHING = "nan"  # how the hub's copy writes an empty cell


def read(row: Row) -> list[Question]:
    """One question per row; questions whose rotations the data lack get them in `with_rotations`.
    """
    row = row.without(_NOTHING)
    index, options = row.integer("index"), options_of(row)
    question, hint = row.text("question"), row.text("hint", "")
    tags = {"category": row.text("category", ""),
            "l2-category": row.text("l2-category", row.get("L2-category", ""))}
    return [Question(
        id=str(index), prompt=(None, choice_prompt(question, options, hint)),
        images=(row.image(),), answers=(letter_of(row, options),), choices=options,
        tags={tag: value for tag, value in tags.items() if value},
        extra={"question": question, "hint": hint}, group=str(index % ROTATION))]


def with_rotations(questions: list[Question]) -> list[Question]:
    """The questions with the rotations of those that the data hold only once."""
    held = Counter(question.group for question in questions)
    asked: list[Question] = []
    for question in questions:
        alone = held[question.group] == 1
        asked.extend(_rotations(question) if alone else [question])
    return asked


def _rotations(question: Question) -> list[Question]:
    """A question with its options in every rotation, as it is first."""
    number, right = len(question.choices), LETTERS.index(question.answers[0])
    found = []
    for k in range(number):
        options = question.choices[k:] + question.choices[:k]
        text = choice_prompt(question.extra["question"], options, question.extra["hint"])
        found.append(replace(
            question, id=str(int(question.id) + k * ROTATION), prompt=(None, text),
            choices=options, answers=(LETTERS[(right - k) % number],)))
    return found


def figures(judged: Sequence[Judged]) -> dict[str, Estimate]:
    """circular: questions that are right in all their rotations. vanilla: the questions as they
    are, unrotated. NaN where none is there."""
    hits = all_right(judged, lambda j: j.question.group)
    plain = [j.verdict.score for j in judged if j.question.id == j.question.group]
    return {"circular": mean_of(list(hits.values())), "vanilla": mean_of(plain)}


BENCHMARK = Benchmark(
    "mmbench", "MMBench", read,
    (letter_rule(figures), vlmevalkit_rule(figures),
     lmms_rule(lmms_mmbench_option, "mmbench/mmbench_evals.py: can_infer", figures)),
    hub=("lmms-lab/MMBench", "en", "dev"), likelihood=True, complete=with_rotations)
