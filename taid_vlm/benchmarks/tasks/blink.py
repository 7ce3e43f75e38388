"""BLINK: fourteen tasks of seeing, with one to four images and lettered options.

On the hub every task is a configuration of its own; a copy of it is read by a pattern,
blink='BLINK/*/val-*.parquet'.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from taid_vlm.benchmarks.choices import LMMS, choice_prompt, choice_rule, letter_of, options_of
from taid_vlm.benchmarks.metrics.letters import (
    lmms_blink_option,
    read_option,
    vlmevalkit_option,
)
from taid_vlm.benchmarks.question import Benchmark, Judged, Question, accuracy
from taid_vlm.benchmarks.rows import LETTERS, Row
from taid_vlm.errors import SampleDropped
from taid_vlm.evaluation.statistics import Estimate, mean_of_means

ONLY = "Note: You only need to respond with {} without providing any additional information.\n"
IMAGES = ("image_1", "image_2", "image_3", "image_4")


def read(row: Row) -> list[Question]:
    """One question, its images first; those of the test split have no answers and are no part."""
    answer = row.text("answer").strip("()")
    if answer == "hidden":
        raise SampleDropped("a hidden answer", row.where)
    columns = row.options()
    options = columns or options_of(row, "choices")
    if columns:
        text = choice_prompt(row.text("question"), options, row.text("hint", ""))
    else:
        text = ONLY.format(", ".join(LETTERS[:len(options)])) + row.text("prompt")
    images = row.images("image") if columns else row.images(*IMAGES)
    lettered = Row({"answer": answer}, row.where)
    return [Question(row.id("idx", "index"), (*[None] * len(images), text), images,
                     (letter_of(lettered, options),), options,
                     {"task": row.text(row.first("sub_task", "category"))})]


def figures(judged: Sequence[Judged], by_task: bool = False) -> dict[str, Estimate]:
    """accuracy: over questions. task_mean: over the tasks, however many questions each has."""
    tasks = [j.question.tags["task"] for j in judged]
    mean = {"task_mean": mean_of_means([j.verdict.score for j in judged], tasks)}
    return mean | accuracy(judged) if by_task else accuracy(judged) | mean


BENCHMARK = Benchmark("blink", "BLINK", read, (
    choice_rule("letter", read_option, "own reading in place of zeyofu/BLINK_Benchmark's language "
                "model; the mean over tasks as in its eval/evaluate.py",
                partial(figures, by_task=True)),
    choice_rule("lmms", lmms_blink_option, LMMS + "blink/utils.py", figures),
    choice_rule("vlmevalkit", vlmevalkit_option, "open-compass/VLMEvalKit 0.0.20, "
                "vlmeval/utils/matching_util.py: can_infer", figures)),
    hub=("BLINK-Benchmark/BLINK", None, "val"), max_new_tokens=128, likelihood=True)
