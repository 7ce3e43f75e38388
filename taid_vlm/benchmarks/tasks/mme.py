"""MME: two questions about every picture, one to be answered yes and one no; in points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from taid_vlm.benchmarks.metrics import yes_no
from taid_vlm.benchmarks.prompts import about_image
from taid_vlm.benchmarks.question import Benchmark, Judged, Question, all_right, groups, split_by
from taid_vlm.benchmarks.rows import Row
from taid_vlm.evaluation.statistics import Estimate, combined, mean_of

COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation",
             "code_reasoning")


def read(row: Row) -> list[Question]:
    """One question; the picture is its group."""
    category, text = row.text("category"), row.text("question")
    picture = row.text(row.first("question_id", "image_path"))
    part = "cognition" if category in COGNITION else "perception"
    return about_image(
        row, f"{picture} {text}", text, yes_no.right_answer(row.text("answer"), row.where),
        tags={"category": category, "part": part}, group=f"{category}/{picture}")


def figures(judged: Sequence[Judged]) -> dict[str, Estimate]:
    """Points: of every subtask acc + acc+ (0 to 200), summed; acc and acc+ over everything."""
    points = {category: _points(part) for category, part in
              split_by(judged, lambda j: j.question.tags["category"]).items()}
    parts = {"perception": [points[name] for name in points if name not in COGNITION],
             "cognition": [points[name] for name in points if name in COGNITION]}
    pictures = list(all_right(judged, lambda j: j.question.group).values())
    accuracy = mean_of([j.verdict.score for j in judged], groups(judged))
    return {
        "score": _sum(list(points.values())),
        **{name: _sum(part) for name, part in parts.items() if part},
        "acc": _percent(accuracy, accuracy.n), "acc+": _percent(mean_of(pictures), len(pictures)),
    }


def _points(judged: Sequence[Judged]) -> Estimate:
    """Of one subtask, the mean over pictures of the share right plus whether all are right."""
    pictures = [[j.verdict.score for j in part] for part in
                split_by(judged, lambda j: j.question.group).values()]
    each = mean_of([sum(scores) / len(scores) + min(scores) for scores in pictures])
    return _percent(each, len(judged))


def _sum(parts: Sequence[Estimate]) -> Estimate:
    if not parts:
        return Estimate(math.nan, math.nan, 0)
    return Estimate(math.fsum(x.value for x in parts), math.hypot(*(x.stderr for x in parts)),
                    sum(x.n for x in parts), *combined([(1.0, x) for x in parts]))


def _percent(share: Estimate, n: int) -> Estimate:
    return replace(share.scaled(100), n=n)


BENCHMARK = Benchmark("mme", "MME", read, (
    yes_no.rule("official", yes_no.first_letters,
                "BradyFU/Awesome-Multimodal-Large-Language-Models, calculation.py", figures),
    yes_no.rule("lmms", yes_no.first_letters_or_initial,
                "EvolvingLMMs-Lab/lmms-eval, tasks/mme/utils.py", figures),
    yes_no.rule("word", yes_no.as_word, yes_no.VLMEVALKIT, figures),
), hub=("lmms-lab/MME", None, "test"), decimals=None)
