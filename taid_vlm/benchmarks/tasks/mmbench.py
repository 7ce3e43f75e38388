"""MMBench: every question once per option, the options rotated; right only if right every time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from taid_vlm.benchmarks.choices import choice_prompt, choice_question, choice_rules, options_of
from taid_vlm.benchmarks.metrics.letters import lmms_mmbench_option
from taid_vlm.benchmarks.prompts import LETTER_LINE
from taid_vlm.benchmarks.question import Benchmark, Judged, Question, all_right
from taid_vlm.benchmarks.rows import LETTERS, Row
from taid_vlm.evaluation.statistics import Estimate, mean_of

ROTATION = 1_000_000  # the k-th rotation of question i has the index i + k * ROTATION
LINE_CN = "请直接使用所提供的选项字母作为答案回答。"
_NOTHING = "nan"  # how the hub's copy writes an empty cell


def read(row: Row, line: str = LETTER_LINE) -> list[Question]:
    """One question per row; questions whose rotations the data lack get them in `with_rotations`.

    Args:
        line: asks for a letter.
    """
    row = row.without(_NOTHING)
    index, options = row.integer("index"), options_of(row)
    question, hint = row.text("question"), row.text("hint", "")
    tags = {tag.lower(): text for tag, text in
            row.tags("category", row.first("l2-category", "L2-category")).items()}
    return choice_question(
        row, str(index), options, text=choice_prompt(question, options, hint, line), tags=tags,
        extra={"question": question, "hint": hint, "line": line}, group=str(index % ROTATION))


def with_rotations(questions: list[Question]) -> list[Question]:
    """The questions with the rotations of those that the data hold only once."""
    held = Counter(question.group for question in questions)
    return [rotated for question in questions for rotated in
            (_rotations(question) if held[question.group] == 1 else [question])]


def _rotations(question: Question) -> list[Question]:
    """A question with its options in every rotation, as it is first."""
    number, right = len(question.choices), LETTERS.index(question.answers[0])
    found = []
    for k in range(number):
        options = question.choices[k:] + question.choices[:k]
        extra = question.extra
        text = choice_prompt(extra["question"], options, extra["hint"], extra["line"])
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
    choice_rules(figures, lmms=(lmms_mmbench_option, "mmbench/mmbench_evals.py: can_infer")),
    hub=("lmms-lab/MMBench", "en", "dev"), likelihood=True, complete=with_rotations)
