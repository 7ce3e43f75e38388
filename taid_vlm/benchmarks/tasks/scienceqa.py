"""ScienceQA-IMG: the questions of ScienceQA that come with a picture."""

from __future__ import annotations

from taid_vlm.benchmarks.choices import choice_question, choice_rules, options_of
from taid_vlm.benchmarks.metrics.letters import lmms_scienceqa_option
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row
from taid_vlm.errors import SampleDropped


def read(row: Row) -> list[Question]:
    """One question; rows without a picture, which the whole of ScienceQA has, are no part."""
    if "image" not in row:
        raise SampleDropped("no image", row.where)
    hint = row.text("hint", "")
    return choice_question(row, row.id("index", "id"), options_of(row, "choices"),
                           context=f"Context: {hint}" if hint else "",
                           tags=row.tags("subject", "grade", "topic"))


BENCHMARK = Benchmark(
    "scienceqa", "ScienceQA-IMG", read,
    choice_rules(lmms=(lmms_scienceqa_option, "scienceqa/utils.py")),
    hub=("lmms-lab/ScienceQA", "ScienceQA-IMG", "test"), likelihood=True)
