"""Which answers become records: named rules with versions; what they leave out is counted.

A rule sees the answers to one prompt that those before it have kept.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from taid_vlm.adapters.continued import repeating
from taid_vlm.benchmarks.metrics.final import final_texts
from taid_vlm.benchmarks.metrics.numbers import LAST_NUMBER, TEXT_PLACES, final_quantity
from taid_vlm.benchmarks.metrics.text import normalised
from taid_vlm.errors import TaidError, nearest

NONE = "none"
USUAL = ("cut", "repeats")
JUDGE = "judge"
SHARE = 0.9  # of an answer's letters that must be of the script
SHORT_ANSWER = 100  # characters of one line, which is all answer
SCRIPTS = (
    "latin", "cyrillic", "greek", "arabic", "hebrew", "devanagari", "bengali", "gujarati",
    "gurmukhi", "tamil", "telugu", "kannada", "malayalam", "sinhala", "thai", "lao", "khmer",
    "myanmar", "tibetan", "georgian", "armenian", "ethiopic", "hangul", "hiragana", "katakana",
    "cjk")
QUESTION = "question"
_WORDS = re.compile(r"[^\W_]{1,4}|\S")


@dataclass(frozen=True)
class Said:
    """One answer as rules see it.

    prompt: what equal prompts share. of: how many answers its prompt was to have.
    text: without thoughts. tokens: of the text, or its pieces where nobody knows the tokens.
    question: the user's last words.
    """

    prompt: str
    of: int
    text: str
    cut: bool
    tokens: Sequence[Hashable] = ()
    question: str = ""


Keeps = Callable[[Sequence[Said], Any, set[Any]], list[bool]]


@dataclass(frozen=True)
class Rule:
    """What is kept of a prompt's answers; `version` is counted up whenever that changes.

    read: a value's text -> the value; raises ValueError with what it must be. default: without one.
    """

    version: int
    keeps: Keeps
    read: Callable[[str], Any] | None = None
    default: Any = None


@dataclass(frozen=True)
class Filter:
    """A rule with its value."""

    name: str
    value: Any
    rule: Rule

    def keeps(self, said: Sequence[Said], seen: set[Any]) -> list[bool]:
        """Which of the answers to a prompt; `seen`: what the rule remembers of earlier ones."""
        return self.rule.keeps(said, self.value, seen)

    def describe(self) -> dict[str, Any]:
        """For the results."""
        value = {} if self.value is None else {"value": self.value}
        return {"rule": self.name, "version": self.rule.version, **value}


def parse_filters(texts: Sequence[str]) -> list[Filter]:
    """RULE or RULE=VALUE each, in the order in which they apply; raises TaidError."""
    filters: dict[str, Filter] = {}
    for text in texts if list(texts) != [NONE] else ():
        name, equals, value = text.partition("=")
        if name not in RULES:
            raise TaidError(f"--filters {text}: there is no such rule."
                            f"{nearest(name, (*RULES, NONE))}")
        if name in filters:
            raise TaidError(f"--filters: '{name}' stands twice.")
        filters[name] = Filter(name, _value(text, RULES[name], value if equals else None),
                               RULES[name])
    return sorted(filters.values(), key=lambda each: list(RULES).index(each.name))


def _value(text: str, rule: Rule, value: str | None) -> Any:
    if rule.read is None and value is not None:
        raise TaidError(f"--filters {text}: this rule has no value.")
    if rule.read is None or (value is None and rule.default is not None):
        return rule.default
    try:
        return rule.read(value or "")
    except ValueError as error:
        raise TaidError(f"--filters {text}: {error}") from None


# ----- one answer ---------------------------------------------------------------------------


def _each(keep: Callable[[Said, Any], bool]) -> Keeps:
    return lambda said, value, _: [keep(each, value) for each in said]


def pieces(text: str) -> list[str]:
    """Stand for tokens where a server does not say them: signs, and up to four letters of a word.
    """
    return _WORDS.findall(text)


@lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str:
    return re.split("[ -]", unicodedata.name(letter, ""))[0].lower()


def scripts(text: str) -> Counter[str]:
    """How many letters a text has of every script, as Unicode's names of letters begin."""
    return Counter(map(_script, filter(str.isalpha, unicodedata.normalize("NFKC", text))))


def _in_script(said: Said, value: str) -> bool:
    letters = scripts(said.text)
    wanted = scripts(said.question).keys() if value == QUESTION else value.split("+")
    return not wanted or sum(letters[name] for name in wanted) >= SHARE * letters.total()


# ----- several ------------------------------------------------------------------------------


def reading(text: str) -> Hashable:
    """An answer's final answer, for comparison: a number, or text. Of one without a place that
    names it, a short line is all of it, and of a longer one its last number counts."""
    short = text.strip() if len(text) <= SHORT_ANSWER and "\n" not in text.strip() else ""
    named = next(final_texts(text, TEXT_PLACES), "") or short
    found = final_quantity(named, ("whole",)) if named else final_quantity(text, (LAST_NUMBER,))
    return float(f"{found[1].value:.9g}") if found else normalised(named or text)


def _agree(said: Sequence[Said], share: float, _: set[Any]) -> list[bool]:
    """Those whose final answer at least that share of all answers to the prompt give; more than
    half of them in any case, so that there is one such answer at most."""
    readings = [reading(each.text) for each in said]
    counts = Counter(readings)
    return [2 * counts[read] > each.of and counts[read] >= share * each.of
            for read, each in zip(readings, said, strict=True)]


def _first(said: Sequence[Said], _: Any, seen: set[Any]) -> list[bool]:
    """Not the same text to the same prompt again, from the same record or another."""
    kept = []
    for each in said:
        key = each.prompt, " ".join(each.text.split())
        kept.append(key not in seen)
        seen.add(key)
    return kept


# ----- values -------------------------------------------------------------------------------


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("it must be a whole number of tokens, as in min_length=8.")
    return int(text)


def _share(low: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not low <= value <= 1:
            raise ValueError(f"it must be a number from {low:g} to 1.")
        return value

    return read


def _scripts(text: str) -> str:
    for name in text.split("+"):
        if name not in SCRIPTS and text != QUESTION:
            raise ValueError(f"'{name}' is no script; several are joined by '+'."
                             f"{nearest(name, (*SCRIPTS, QUESTION))}")
    return text


RULES: Mapping[str, Rule] = {
    "cut": Rule(1, _each(lambda said, _: not said.cut)),
    "min_length": Rule(1, _each(lambda said, value: len(said.tokens) >= value), _number),
    "max_length": Rule(1, _each(lambda said, value: len(said.tokens) <= value), _number),
    "repeats": Rule(1, _each(lambda said, _: not repeating(said.tokens))),
    "script": Rule(1, _each(_in_script), _scripts, QUESTION),
    "agree": Rule(1, _agree, _share(0.5), 0.5),
    "duplicates": Rule(1, _first),
    JUDGE: Rule(1, lambda said, value, seen: [True] * len(said), _share(0.0), 0.5),
}
