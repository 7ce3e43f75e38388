"""ROUGE-L of free answers: the longest common subsequence of stemmed words."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

from taid_vlm.benchmarks.metrics.text import of_text
from taid_vlm.benchmarks.question import Judged, Question, Rule, accuracy
from taid_vlm.errors import TaidError
from taid_vlm.evaluation.statistics import Estimate

SHORTEST_STEMMED = 4  # letters
_WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """The words of a text as rouge-score has them: a-z and 0-9 only, by Porter's stemmer.

    Raises:
        TaidError: nltk, which has the stemmer, is not installed.
    """
    stem = _stemmer()
    return [stem(word) if len(word) >= SHORTEST_STEMMED else word
            for word in _WORD.findall(text.lower())]


@functools.cache
def _stemmer() -> Callable[[str], str]:
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError:
        raise TaidError("ROUGE-L stems words with nltk, which is not installed: pip install "
                        "'taid-vlm[eval]'.") from None
    return functools.lru_cache(maxsize=2**16)(PorterStemmer().stem)


def rouge_l(answer: Sequence[str], reference: Sequence[str]) -> float:
    """The harmonic mean of the common subsequence's shares of both; 0 where one is empty."""
    if not answer or not reference:
        return 0.0
    common = common_subsequence(answer, reference)
    return 2 * common / (len(answer) + len(reference))


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    Bit-parallel after Hyyrö (2004): a column of the usual table lies in one whole number, so the
    cost is the longer one's words.
    """
    short, long = sorted((a, b), key=len)
    places: dict[str, int] = {}
    for index, word in enumerate(short):
        places[word] = places.get(word, 0) | 1 << index
    full = (1 << len(short)) - 1
    column = full
    for word in long:
        matches = column & places.get(word, 0)
        column = (column + matches | column - matches) & full
    return len(short) - column.bit_count()


def best(answer: str, question: Question) -> float:
    """Of an answer's references the one that it comes nearest to."""
    said = words(answer)
    return max(rouge_l(said, words(gold)) for gold in question.answers)


def figures(judged: Sequence[Judged]) -> dict[str, Estimate]:
    """The mean over all questions."""
    return {"rouge_l": accuracy(judged)["accuracy"]}


ROUGE_L = Rule(
    "rouge-l", 1, of_text(best), figures,
    source="microsoft/LMOps, minillm/rouge_metric.py (rouge-score, stemmed, best reference)")
