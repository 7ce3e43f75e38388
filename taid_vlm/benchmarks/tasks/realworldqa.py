"""RealWorldQA: questions about photographs, most of them out of cars; a letter, a word or a number.
"""

from __future__ import annotations

import re
from functools import partial

from taid_vlm.benchmarks.choices import LMMS, Reader, choice_prompt, letter_of
from taid_vlm.benchmarks.metrics.letters import lmms_option, read_option, vlmevalkit_option
from taid_vlm.benchmarks.metrics.text import normalised
from taid_vlm.benchmarks.prompts import about_image
from taid_vlm.benchmarks.question import Benchmark, Question, Rule, Verdict, one_by_one
from taid_vlm.benchmarks.rows import Row

_OPTION = re.compile(r"^([A-Z])\.\s+(.*)$", re.MULTILINE)
_FOUR = ("",) * 4  # lmms-eval looks for A to D, however many options there are
NO_OPTIONS = "VLMEvalKit's rule is for its own table, which has options for every question"


def read(row: Row) -> list[Question]:
    """One question; its options stand in its text, in VLMEvalKit's table in the columns A to D."""
    question, columns = row.text("question"), row.options()
    options = columns or tuple(text.strip() for _, text in _OPTION.findall(question))
    options = options if len(options) > 1 else ()
    return about_image(
        row, row.id("id", "index"), choice_prompt(question, columns) if columns else question,
        letter_of(row, options) if options else row.text("answer"), choices=options,
        tags={"answer_type": "option" if options else "open"} | row.tags("category"))


def same_words(answer: str, gold: str) -> bool:
    """lmms-eval's comparison of open answers: lower-cased, without full stops at the end."""
    return answer.lower().strip().rstrip(".") == gold.lower()


def _judge(reader: Reader, options: tuple[str, ...], same: object, question: Question,
           answer: str) -> Verdict:
    if question.choices:
        read = reader(answer, options or question.choices)
        return Verdict(float(read in question.answers), read)
    if not callable(same):
        return Verdict(0.0, None, NO_OPTIONS)
    return Verdict(float(same(answer, question.answers[0])), answer.strip() or None)


def _rule(name: str, reader: Reader, source: str, same: object = None,
          options: tuple[str, ...] = ()) -> Rule:
    return Rule(name, 1, one_by_one(partial(_judge, reader, options, same)), source=source)


BENCHMARK = Benchmark("realworldqa", "RealWorldQA", read, (
    _rule("letter", read_option, "own: the option however it is put; open answers normalised",
          lambda answer, gold: normalised(answer) == normalised(gold)),
    _rule("lmms", lmms_option, LMMS + "realworldqa/utils.py", same_words, _FOUR),
    _rule("vlmevalkit", vlmevalkit_option, "open-compass/VLMEvalKit 0.0.20, "
          "vlmeval/utils/matching_util.py: can_infer"),
), hub=("lmms-lab/RealWorldQA", None, "test"), likelihood=True)
