"""Short answers compared as text: what is left out of them before they must be equal."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Callable, Sequence

from taid_vlm.benchmarks.question import Question, Rule, Verdict, one_by_one

Judge = Callable[[Sequence[Question], Sequence[str]], list[Verdict]]

ARTICLES = ("a", "an", "the")
_OPENING = "\"'`([{<“‘«「『¿¡"  # no period and no sign: .5 and -5 are numbers
_CLOSING = ".,;:!?\"'`)]}>”’»」』。、"


def of_text(score: Callable[[str, Question], float], read: Callable[[str], str] = str.strip
            ) -> Judge:
    """A rule's `judge` from the score of one answer; a blank answer is unread and scores 0."""
    def judge(question: Question, answer: str) -> Verdict:
        if not answer.strip():
            return Verdict(0.0, None)
        return Verdict(float(score(answer, question)), read(answer))

    return one_by_one(judge)


def equal_after(change: Callable[[str], str]) -> Judge:
    """A rule's `judge`: 1 where the answer equals an accepted one, both changed first."""
    def score(answer: str, question: Question) -> float:
        return change(answer) in {change(gold) for gold in question.answers}

    return of_text(score, change)


def as_number(text: str) -> float | None:
    """What Python reads as a number, "nan" and "inf" too; None where there is none."""
    try:
        return float(text)
    except ValueError:
        return None


def normalised(text: str) -> str:
    """Casefolded in Unicode's compatible form, without punctuation around words and articles.

    Marks inside a word stay, so 3.5 is not 35; nor does anything vanish that is all there is.
    """
    words = unicodedata.normalize("NFKC", text).casefold().split()
    bare = [word.lstrip(_OPENING).rstrip(_CLOSING) for word in words]
    return " ".join([word for word in bare if word and word not in ARTICLES] or words)


def without_punctuation(text: str) -> str:
    """Lower-cased, without any of ASCII's punctuation, and stripped."""
    return text.lower().translate(_NO_PUNCTUATION).strip()


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

EXACT_MATCH = Rule(
    "normalised", 1, equal_after(normalised),
    source="own: NFKC, casefolded, without articles and punctuation around words")
