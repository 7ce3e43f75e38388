"""ScienceQA-IMG: the questions of ScienceQA that come with a picture."""

from __future__ import annotations

from taid_vlm.benchmarks.choices import (
    choice_prompt,
    letter_of,
    letter_rule,
    lmms_rule,
    options_of,
    vlmevalkit_rule,
)
from taid_vlm.benchmarks.metrics.letters import lmms_scienceqa_option
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row
from taid_vlm.errors import SampleDropped

_TAGS = ("subject", "grade", "topic")


def read(row: Row) -> list[Question]:
    """One question; rows without a picture, which the whole of ScienceQA has, are no part."""
    if "image" not in row:
        raise SampleDropped("no image", row.where)
    options, hint = options_of(row, "choices"), row.text("hint", "")
    text = choice_prompt(row.text("question"), options, f"Context: {hint}" if hint else "")
    return [Question(
        id=row.id("index", "id"), prompt=(None, text), images=(row.image(),), choices=options,
        answers=(letter_of(row, options),),
        tags={tag: row.text(tag) for tag in _TAGS if tag in row})]


BENCHMARK = Benchmark(
    "scienceqa", "ScienceQA-IMG", read,
    (letter_rule(), lmms_rule(lmms_scienceqa_option, "scienceqa/utils.py"), vlmevalkit_rule()),
    hub=("lmms-lab/ScienceQA", "ScienceQA-IMG", "test"), likelihood=True)
