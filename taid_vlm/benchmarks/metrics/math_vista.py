"""MathVista's rule: an extracted answer against the right one, by type of answer.

Source: lupantech/MathVista, evaluation/extract_answer.py and evaluation/calculate_score.py. The
official pipeline has a language model extract what its few rules do not; `extracted_by_rule`
stands for a reading that needs no judge.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from taid_vlm.benchmarks.metrics.anls import levenshtein
from taid_vlm.benchmarks.metrics.letters import LETTERS, read_option
from taid_vlm.benchmarks.question import Question, Rule, Verdict, one_by_one

_LETTER = re.compile(r"\(([a-zA-Z])\)")
_QUOTED = re.compile(r'The answer is "([^\n]*)"\.')
_NUMBERS = re.compile(r"(?<![\w.])[-+−]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d++)(?:\.\d++)?|\.\d++)")
_SAYS = re.compile(r"\banswers?\s*(?:is|:|=|would be|should be)", re.IGNORECASE)
_BOXED = re.compile(r"boxed\{((?:[^{}\n]|\{[^{}\n]{0,80}\}){1,80})\}")
_BOLD = re.compile(r"\*\*([^*\n]{1,80})\*\*")
_LIST = re.compile(r"\[[^\[\]\n]{0,400}\]")


@dataclass(frozen=True)
class Wanted:
    """What a question asks for: its options, or a number's kind and decimals.

    kind: "text" (one of the options), "integer", "float" or "list".
    """

    kind: str
    choices: tuple[str, ...] = ()
    precision: int = 0


def extracted_as_official(answer: str, wanted: Wanted) -> str | None:
    """What the official rules extract without a language model; None where they ask one."""
    if answer in wanted.choices:
        return answer
    with contextlib.suppress(ValueError):
        if wanted.kind in ("integer", "float"):
            return str(int(answer) if wanted.kind == "integer" else float(answer))
    quoted = _QUOTED.search(answer)
    return quoted[1] if quoted else None


def extracted_by_rule(answer: str, wanted: Wanted) -> str | None:
    """An extraction without a judge: the option taken, or the number an answer ends on.

    An option: of what is boxed last, else of the whole answer, else of what is bold last. A
    number: the first after the last "answer is", else the first in what is boxed or else bold
    last, else the last one anywhere.
    """
    boxed, bold = _BOXED.findall(answer), _BOLD.findall(answer)
    if wanted.choices:
        read = (read_option(text, wanted.choices) for text in (*boxed[-1:], answer, *bold[-1:]))
        return next(filter(None, read), None)
    pattern = _LIST if wanted.kind == "list" else _NUMBERS
    said = [found.end() for found in _SAYS.finditer(answer)]
    tails = [answer[said[-1]:]] if said else []
    for text in (*tails, *reversed(boxed), *reversed(bold)):
        if number := pattern.search(text):
            return _plain(number[0])
    numbers = pattern.findall(answer)
    return _plain(numbers[-1]) if numbers else None


def normalised(extraction: str, wanted: Wanted) -> str | None:
    """The official normalisation of an extraction; None where it is of the wrong kind.

    Where there are options, what is no letter becomes the option with the smallest edit
    distance, whatever it is: a refusal turns into an option too.
    """
    if wanted.choices:
        return _option(extraction.strip(), wanted.choices)
    try:
        if wanted.kind == "integer":
            return str(int(float(extraction)))
        if wanted.kind == "float":
            return str(round(float(extraction), wanted.precision))
    except (ValueError, OverflowError):
        return None
    return extraction


def _option(extraction: str, choices: Sequence[str]) -> str:
    letter = _LETTER.search(extraction)
    extraction = letter[1].upper() if letter else extraction
    index = LETTERS.find(extraction) if len(extraction) == 1 else -1
    if 0 <= index < len(choices):
        return choices[index]
    return min(choices, key=lambda choice: levenshtein(extraction, choice))


def _plain(number: str) -> str:
    return number if number.startswith("[") else number.replace(",", "").replace("−", "-")


def _judge_free(question: Question, answer: str) -> Verdict:
    return _verdict(question, extracted_by_rule(answer, _wanted(question)))


def _official(question: Question, answer: str) -> Verdict:
    """By the extraction that a judge wrote beside the question, else by what rules extract."""
    given = question.extra.get("extraction")
    extraction = extracted_as_official(answer, _wanted(question)) if given is None else given
    return _verdict(question, extraction)


def _wanted(question: Question) -> Wanted:
    extra = question.extra
    return Wanted(extra["answer_type"], question.choices, extra["precision"])


def _verdict(question: Question, extraction: str | None) -> Verdict:
    gold = question.answers[0]
    gold = question.choices[LETTERS.index(gold)] if question.choices else gold
    read = None if extraction is None else normalised(extraction, _wanted(question))
    return Verdict(float(read == gold), read)


JUDGE_FREE = Rule("judge_free", 1, one_by_one(_judge_free),
                  source="own extraction; normalised as by lupantech/MathVista")
OFFICIAL = Rule("official", 1, one_by_one(_official),
                source="lupantech/MathVista, evaluation/calculate_score.py")
