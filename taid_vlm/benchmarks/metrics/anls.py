"""ANLS: how near an answer comes to a gold in edits, for answers read off documents."""

from __future__ import annotations

from taid_vlm.benchmarks.metrics.text import of_text
from taid_vlm.benchmarks.question import Question, Rule

THRESHOLD = 0.5


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of characters that turn `a` into `b`.

    Bit-parallel after Myers (1999) and Hyyrö (2003): a column of the usual table, in steps of +1
    and -1, lies in two whole numbers as long as the shorter text. The cost is the longer one's
    characters.
    """
    short, long = sorted((a, b), key=len)
    if not short:
        return len(long)
    places: dict[str, int] = {}
    for index, letter in enumerate(short):
        places[letter] = places.get(letter, 0) | 1 << index
    full, last = (1 << len(short)) - 1, 1 << len(short) - 1
    up, down, distance = full, 0, len(short)
    for letter in long:
        equal = places.get(letter, 0)
        across = equal | down
        equal |= ((equal & up) + up) ^ up
        more, less = down | ~(equal | up) & full, up & equal
        distance += bool(more & last) - bool(less & last)
        more, less = more << 1 | 1, less << 1
        up, down = (less | ~(across | more)) & full, more & across & full
    return distance


def anls(answer: str, question: Question) -> float:
    """The official script: texts lower-cased with single spaces, their lengths taken before.

    So spaces within an answer make its edits weigh less; those around it are stripped here. A
    similarity of exactly the threshold counts.
    """
    return max(_similarity(answer.strip(), gold) for gold in question.answers)


def _similarity(answer: str, gold: str) -> float:
    length = max(len(gold.upper()), len(answer.upper()))
    likeness = 1 - _share(_plain(answer), _plain(gold), length)
    return likeness if likeness >= THRESHOLD else 0.0


def strict(answer: str, question: Question) -> float:
    """The paper's equation: lengths of what is compared, and the threshold itself is too little."""
    plain = _plain(answer)
    likeness = max(1 - _share(plain, gold, max(len(plain), len(gold)))
                   for gold in map(_plain, question.answers))
    return likeness if likeness > THRESHOLD else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _share(a: str, b: str, length: int) -> float:
    """Edits as a share of `length`; 1 at once where the lengths alone put it past the threshold."""
    if abs(len(a) - len(b)) > THRESHOLD * length:
        return 1.0
    return levenshtein(a, b) / length


ANLS = Rule(
    "official", 1, of_text(anls),
    source="DocVQA's script as in lmms-eval, lmms_eval/api/metrics.py, and VLMEvalKit")
STRICT = Rule("strict", 1, of_text(strict), source="arXiv:1907.00490, equation 1")
