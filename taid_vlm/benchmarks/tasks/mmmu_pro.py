"""MMMU-Pro with ten options: questions of MMMU that no one answers without the pictures."""

from __future__ import annotations

from functools import partial

from taid_vlm.benchmarks.choices import (
    LMMS,
    Reader,
    choice_rule,
    letter_of,
    listed,
    options_of,
)
from taid_vlm.benchmarks.metrics.letters import exact_letter, vlmevalkit_option
from taid_vlm.benchmarks.metrics.mmmu import read_choice, read_pro_choice
from taid_vlm.benchmarks.prompts import about_image
from taid_vlm.benchmarks.question import Benchmark, Question, Rule
from taid_vlm.benchmarks.rows import Row
from taid_vlm.benchmarks.tasks.mmmu import DISCIPLINE_OF, with_pictures

HUB, SPLIT = "MMMU/MMMU_Pro", "test"
DIRECT = "Answer with the option letter from the given choices directly."
IN_VIEW = (f"{DIRECT} The last line of your response should be of the following format: 'Answer: "
           "$LETTER' (without quotes) where LETTER is one of options.")
UNKNOWN = ("",) * 10  # the texts of options that are only in the picture


def read(row: Row) -> list[Question]:
    """One question; its pictures stand where their tags do."""
    options = options_of(row, "options")
    text = f"{row.text('question')}\n{listed(options)}\n{DIRECT}"
    prompt, images = with_pictures(text, row)
    return [Question(row.id("id", "index"), prompt, images, (letter_of(row, options),), options,
                     _tags(row))]


def read_in_view(row: Row) -> list[Question]:
    """One question that is a screenshot of itself, options and all."""
    held = row.texts("options") or row.options()
    options = options_of(row, "options") if held else UNKNOWN
    return about_image(row, row.id("id", "index"), IN_VIEW, letter_of(row, options),
                       choices=options, tags=_tags(row))


def _tags(row: Row) -> dict[str, str]:
    subject = row.text(row.first("subject", "category"), "")
    tags = {"discipline": DISCIPLINE_OF.get(subject, ""), "subject": subject}
    return {key: value for key, value in tags.items() if value} | row.tags("topic_difficulty")


def rules(lmms: Reader) -> tuple[Rule, ...]:
    """The official rule without its guess, lmms-eval's, and VLMEvalKit's without a judge."""
    return (choice_rule("official", read_pro_choice, "MMMU-Benchmark/MMMU, mmmu-pro/evaluate.py"),
            choice_rule("lmms", lmms, LMMS + "mmmu_pro/utils.py"),
            choice_rule("vlmevalkit", vlmevalkit_option, "open-compass/VLMEvalKit 0.0.20, "
                        "vlmeval/utils/matching_util.py: can_infer"))


STANDARD = rules(partial(read_choice, lmms=True))
IN_VIEW_RULES = rules(exact_letter)
BENCHMARK = Benchmark("mmmu_pro", "MMMU-Pro (10 options)", read, STANDARD,
                      hub=(HUB, "standard (10 options)", SPLIT), max_new_tokens=128,
                      likelihood=True)
