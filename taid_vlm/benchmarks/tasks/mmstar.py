"""MMStar: questions that cannot be answered without the picture; the options are in their text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from taid_vlm.benchmarks.choices import LMMS, choice_question, choice_rule, choice_rules
from taid_vlm.benchmarks.metrics.letters import lmms_option, mmstar_option
from taid_vlm.benchmarks.prompts import LETTER_LINE
from taid_vlm.benchmarks.question import Benchmark, Judged, Question, accuracy
from taid_vlm.benchmarks.rows import LETTERS, Row
from taid_vlm.evaluation.statistics import Estimate, mean_of_means

UNKNOWN = ("",) * 4  # the texts of options that cannot be found in the question
_BEGIN = re.compile(r"\b(?:Options|Choices)\s*:", re.IGNORECASE)
_MARKS = (r"{}:(?=\s)", r"\({}\)", r"{}\.(?=\s)", r"{}\)(?=\s)")


def read(row: Row) -> list[Question]:
    """One question; VLMEvalKit's table has its options in the columns A to D instead."""
    question, options = row.text("question"), row.options()
    return choice_question(
        row, row.id("index"), options or inline_options(question) or UNKNOWN,
        text=None if options else f"{question}\n{LETTER_LINE}",
        tags=row.tags("category", "l2_category"))


def inline_options(question: str) -> tuple[str, ...]:
    """The options of "Options: A: cat, B: dog" and "Choices: (A) cat (B) dog"; () without any."""
    begin = [match.end() for match in _BEGIN.finditer(question)]
    text = question[begin[-1]:] if begin else question
    return max((_marked(text, mark) for mark in _MARKS), key=len)


def _marked(text: str, mark: str) -> tuple[str, ...]:
    """What stands after A, after B ... where each is marked in one way."""
    found: list[re.Match[str]] = []
    for letter in LETTERS:
        pattern = re.compile(r"(?<![^\s,;])" + mark.format(letter))
        match = pattern.search(text, found[-1].end() if found else 0)
        if match is None:
            break
        found.append(match)
    if len(found) < 2:
        return ()
    ends = [*(match.start() for match in found[1:]), len(text)]
    texts = tuple(text[match.end():end].strip(" \t\r\n,;")
                  for match, end in zip(found, ends, strict=True))
    return texts if all(texts) else ()


def figures(judged: Sequence[Judged], by_category: bool = False) -> dict[str, Estimate]:
    """accuracy: over questions. category_mean: over the eighteen finer categories, whatever their
    size."""
    parts = [j.question.tags.get("l2_category", "") for j in judged]
    mean = {"category_mean": mean_of_means([j.verdict.score for j in judged], parts)}
    return mean | accuracy(judged) if by_category else accuracy(judged) | mean


_BY_CATEGORY = partial(figures, by_category=True)
BENCHMARK = Benchmark(
    "mmstar", "MMStar", read,
    choice_rules(
        figures,
        choice_rule("official", mmstar_option, "MMStar-Benchmark/MMStar, eval: exact_match; "
                    "lmms-eval before its `extract_mcq_answer`", _BY_CATEGORY),
        choice_rule("lmms", lmms_option, LMMS + "_task_utils/mcq_extract.py", _BY_CATEGORY)),
    hub=("Lin-Chen/MMStar", None, "val"), likelihood=True)
