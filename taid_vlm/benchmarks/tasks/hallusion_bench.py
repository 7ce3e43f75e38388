"""HallusionBench: the same questions about a figure and about figures edited to mislead."""

from __future__ import annotations

import math
from collections.abc import Sequence

from taid_vlm.benchmarks.metrics import yes_no
from taid_vlm.benchmarks.question import Benchmark, Judged, Question, all_right, groups
from taid_vlm.benchmarks.rows import Row
from taid_vlm.errors import SampleDropped
from taid_vlm.evaluation.statistics import Estimate, mean_of

YES_NO = "Please answer yes or no."


def read(row: Row) -> list[Question]:
    """One question; its set (a figure, its edits, the questions about them) is its group.

    VLMEvalKit's table has the three numbers at the end of its `index` ("..._VD_illusion_0_1_0"),
    the answer in `answer`, and is of questions with an image alone.
    """
    category = row.text("category")
    subcategory = row.text(row.first("subcategory", "l2-category"))
    set_id, figure, number = _numbers(row)
    if "visual_input" not in row and row.first("image", "image_path") not in row:
        raise SampleDropped("no image", row.where)
    images = () if row.text("visual_input", "1") == "0" else (row.image(),)
    group, text = f"{category}_{subcategory}_{set_id}", row.text("question")
    asked = text if text.endswith(YES_NO) else f"{text} {YES_NO}"
    return [Question(
        f"{group}_{figure}_{number}", (*[None] * len(images), asked), images,
        (yes_no.right_answer(row.text(row.first("gt_answer", "answer")), row.where),),
        tags={"category": category, "subcategory": subcategory},
        extra={"figure": figure, "question": number,
               "without_figure": category == "VS" and figure == "0"}, group=group)]


def _numbers(row: Row) -> list[str]:
    """Of set, figure and question."""
    parts = row.text("index", "").rsplit("_", 3)[1:]
    if "set_id" not in row and len(parts) == 3 and all(map(str.isdecimal, parts)):
        return parts
    return [str(row.integer(x)) for x in ("set_id", "figure_id", "question_id")]


def figures(judged: Sequence[Judged]) -> dict[str, Estimate]:
    """The mean of three accuracies, and each: of answers, of figures (all their questions right),
    of questions (right for all their figures). What is asked without a figure is no figure."""
    shown = [j for j in judged if not j.question.extra["without_figure"]]
    units = {"aAcc": ([j.verdict.score for j in judged], groups(judged)),
             "fAcc": _all_right(shown, "figure"), "qAcc": _all_right(judged, "question")}
    means = {name: mean_of(scores, sets) for name, (scores, sets) in units.items()}
    return {"average": _average(units, means), **means}


def _all_right(judged: Sequence[Judged], key: str) -> tuple[list[float], list[str]]:
    """The hits of what shares a figure or a question, and the set of each."""
    hits = all_right(judged, lambda j: (j.question.group, j.question.extra[key]))
    return list(hits.values()), [group for group, _ in hits]


def _average(units: dict[str, tuple[list[float], list[str]]], means: dict[str, Estimate]
             ) -> Estimate:
    """Mean of the means; a set moves all three of them together, which the error counts."""
    total = sum(mean.n for mean in means.values())
    moved = [(score - means[name].value) * total / (len(means) * means[name].n)
             for name, (scores, _) in units.items() for score in scores]
    sets = [one for _, names in units.values() for one in names]
    value = math.fsum(mean.value for mean in means.values()) / len(means)
    return Estimate(value, mean_of(moved, sets).stderr, means["aAcc"].n)


BENCHMARK = Benchmark("hallusion_bench", "HallusionBench", read, (
    yes_no.rule("word", yes_no.as_word, yes_no.VLMEVALKIT, figures),
    yes_no.rule("lmms", yes_no.yes_anywhere, "EvolvingLMMs-Lab/lmms-eval, "
                "tasks/hallusion_bench/evaluate_hb.py, *_intern", figures),
), hub=("lmms-lab/HallusionBench", None, "image"))
