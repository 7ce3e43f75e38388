"""MMMU's parsers of answers, without the official guess at random.

Source: MMMU-Benchmark/MMMU, eval/eval_utils.py. lmms-eval (tasks/mmmu/utils.py) reads two
letters more, see `read_choice`; its reading of open answers is the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from taid_vlm.benchmarks.metrics.text import as_number
from taid_vlm.benchmarks.question import Question, Rule, Verdict, one_by_one
from taid_vlm.benchmarks.rows import LETTERS

_STRIPPED = ",.!?;:'"
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
# Possessive, and never begun within a number: else long rows of digits take quadratic time.
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?(?<!\d)\d++(?:\.\d++)?[eE][+-]?\d++"),
    re.compile(r"-?(?:(?<!\d)\d++\.\d++|\.\d++|(?<!\d)\d++\b)(?![eE][+-]?\d)(?![,\d])"),
)

Reading = str | float


def read_choice(answer: str, choices: Sequence[str], lmms: bool = False) -> str | None:
    """The letter of the option an answer takes; None where the official parser would guess.

    The last "(B)" counts, else the last " B ", else, in answers of more than five words, the last
    option whose text occurs.

    Args:
        lmms: also read "B " within a word's end ("is:B now") and "B.", as lmms-eval does.
    """
    for mark in _STRIPPED:
        answer = answer.strip(mark)
    answer = f" {answer} "
    letters = LETTERS[:len(choices)]
    for form in ("({})", "{} ", "{}.") if lmms else ("({})", " {} "):
        named = [letter for letter in letters if form.format(letter) in answer]
        if named:
            # lmms-eval orders its own forms by the place of " B ", the first where there is none
            place = form if form == "({})" else " {} "
            return max(named, key=lambda letter: answer.rfind(place.format(letter)))
    if len(answer.split()) <= 5:
        return None
    lowered = answer.lower()
    places = {letter: lowered.rfind(choice.lower())
              for letter, choice in zip(letters, choices, strict=True) if choice.strip()}
    found = max(places, key=places.__getitem__, default=None)
    return None if found is None or places[found] < 0 else found


def read_pro_choice(answer: str, choices: Sequence[str]) -> str | None:
    """MMMU-Pro's official reading: the only option's letter that occurs behind the last "Answer:",
    else as lmms-eval reads MMMU. A capital of any word there is a letter, too."""
    _, said, tail = answer.rpartition("Answer:")
    named = [letter for letter in LETTERS[:len(choices)] if letter in tail] if said else []
    return named[0] if len(named) == 1 else read_choice(answer, choices, lmms=True)


def read_open(answer: str) -> set[Reading]:
    """Everything an open answer may be taken to say: its key phrases, and numbers in them."""
    phrases = _key_phrases(answer.strip().strip(".").lower())
    numbers = [found for phrase in phrases for pattern in _NUMBERS
               for found in pattern.findall(phrase)]
    return {reading for text in (*phrases, *numbers) for reading in normalised(text)}


def is_open_right(readings: set[Reading], golds: Sequence[str]) -> bool:
    """Whether a text read holds a right text, or a number read is a right number."""
    wanted = [norm for gold in golds for norm in normalised(gold)]
    texts = [norm for norm in wanted if isinstance(norm, str)]
    return any(any(text in reading for text in texts) if isinstance(reading, str)
               else reading in wanted for reading in readings)


def normalised(text: str) -> list[Reading]:
    """A number to two decimals; else lower case, where a single letter must stand at a space."""
    number, text = as_number(text.replace(",", "")), text.strip().lower()
    if number is not None:
        return [round(number, 2)]
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _key_phrases(answer: str) -> list[str]:
    """Of every line the shortest tail after "is", "so", "answer" ...; "=" counts in the last."""
    lines = answer.split("\n")
    phrases: list[str] = []
    for number, line in enumerate(lines):
        keys = (*_KEYS, "=") if number == len(lines) - 1 else _KEYS
        tails = [line.rsplit(key, 1)[1].strip() for key in keys if key in line]
        shortest = _shortest(tails)
        if shortest and shortest not in _TRIVIAL:
            phrases.append(shortest)
    return phrases or [answer]


def _shortest(tails: list[str]) -> str:
    """The first of the shortest; an empty one gives way to whatever comes after it."""
    kept = ""
    for tail in tails:
        kept = tail if not kept or len(tail) < len(kept) else kept
    return kept


def _judge(question: Question, answer: str, lmms: bool = False) -> Verdict:
    if question.choices:
        read = read_choice(answer, question.choices, lmms)
        return Verdict(float(read in question.answers), read)
    if not answer.strip():
        return Verdict(0.0, None)
    return Verdict(float(is_open_right(read_open(answer), question.answers)), answer.strip())


OFFICIAL = Rule("official", 1, one_by_one(_judge), source="MMMU-Benchmark/MMMU, eval/eval_utils.py")
LMMS = Rule("lmms", 1, one_by_one(partial(_judge, lmms=True)),
            source="EvolvingLMMs-Lab/lmms-eval, tasks/mmmu/utils.py")
