"""MME: two questions about every picture, one to be answered yes and one no; in points."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from taid_vlm.benchmarks.metrics.yes_no import (
    all_right,
    as_word,
    first_letters,
    first_letters_or_initial,
    judged_by,
    right_answer,
)
from taid_vlm.benchmarks.question import Benchmark, Judged, Question, Rule, groups, one_by_one
from taid_vlm.benchmarks.rows import Row
from taid_vlm.evaluation.statistics import Estimate, mean_of

COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation",
             "code_reasoning")


def read(row: Row) -> list[Question]:
    """One question; the picture is its group."""
    category, text = row.text("category"), row.text("question")
    picture = row.text("question_id" if "question_id" in row else "image_path")
    part = "cognition" if category in COGNITION else "perception"
    return [Question(
        id=f"{picture} {text}", prompt=(None, text), images=(row.image(),),
        answers=(right_answer(row.text("answer"), row.where),),
        tags={"category": category, "part": part}, group=f"{category}/{picture}")]


def figures(judged: Sequence[Judged]) -> dict[str, Estimate]:
    """Points: of every subtask acc + acc+ (0 to 200), summed; acc and acc+ over everything."""
    subtasks: dict[str, list[Judged]] = defaultdict(list)
    for j in judged:
        subtasks[j.question.tags["category"]].append(j)
    points = {category: _points(asked) for category, asked in subtasks.items()}
    parts = {"perception": [points[name] for name in points if name not in COGNITION],
             "cognition": [points[name] for name in points if name in COGNITION]}
    pictures = list(all_right(judged, lambda j: j.question.group).values())
    return {
        "score": _sum(list(points.values())),
        **{name: _sum(found) for name, found in parts.items() if found},
        "acc": _percent(mean_of([j.verdict.score for j in judged], groups(judged))),
        "acc+": _percent(mean_of(pictures)),
    }


def _points(asked: Sequence[Judged]) -> Estimate:
    """Of one subtask, the mean over pictures of the share right plus whether all are right."""
    scores: dict[str, list[float]] = defaultdict(list)
    for j in asked:
        scores[j.question.group].append(j.verdict.score)
    each = mean_of([sum(found) / len(found) + min(found) for found in scores.values()])
    return Estimate(100 * each.value, 100 * each.stderr, len(asked))


def _sum(found: Sequence[Estimate]) -> Estimate:
    if not found:
        return Estimate(math.nan, math.nan, 0)
    return Estimate(math.fsum(x.value for x in found), math.hypot(*(x.stderr for x in found)),
                    sum(x.n for x in found))


def _percent(share: Estimate) -> Estimate:
    return Estimate(100 * share.value, 100 * share.stderr, share.n)


BENCHMARK = Benchmark("mme", "MME", read, (
    Rule("official", 1, one_by_one(judged_by(first_letters)), figures,
         "BradyFU/Awesome-Multimodal-Large-Language-Models, calculation.py"),
    Rule("lmms", 1, one_by_one(judged_by(first_letters_or_initial)), figures,
         "EvolvingLMMs-Lab/lmms-eval, tasks/mme/utils.py"),
    Rule("word", 1, one_by_one(judged_by(as_word)), figures,
         "open-compass/VLMEvalKit, vlmeval/dataset/utils/yorn.py"),
), hub=("lmms-lab/MME", None, "test"), decimals=None)
