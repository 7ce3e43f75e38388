"""CIDEr-D of captions: n-grams shared with references, weighed by how rare they are.

The tokens are not those of pycocoevalcap, which runs Stanford's PTBTokenizer in Java, but of a
regular expression after it; its name stands in the rule. Of the 40,460 captions of Flickr8k
eight come out differently; CIDEr of every first caption against the other four is 0.76986 with
both.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from taid_vlm.benchmarks.question import Judged, Question, Rule, Verdict, groups
from taid_vlm.evaluation.statistics import Estimate, mean_of

PROMPT = "Provide a one-sentence caption for the provided image."
LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # of the penalty for another length, in words
SCALE = 10.0

Vectors = list[dict[tuple[str, ...], float]]  # by length of the n-grams: n-gram -> weight

_STRAIGHT = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"'})
_APART = re.compile(r"(?<=\w)(n't|'(?:s|m|d|ll|re|ve))(?![\w'])|\b(?:(can)(not)|(gon|wan)(na)"
                    r"|(got)(ta))\b")
_TOKEN = re.compile(r"""
      (?:[a-z]\.){2,} | \b(?:mr|mrs|ms|dr|st|jr|vs)\.   # u.s., st.
    | n't\b | '(?:s|m|d|ll|re|ve)\b
    | \d*(?:[.,:]\d+)+                                  # 1,000 and 7:30
    | (?:[#@](?=[a-z]))?\w+(?:[-/']\w+)*                # t-shirt, o'clock
    | [$%&*+=@#<>/^|°€£¥()\[\]{}]                       # other marks are dropped
""", re.VERBOSE)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def tokens(caption: str) -> list[str]:
    """A caption's tokens: lower-cased, clitics apart, punctuation dropped."""
    caption = caption.lower().translate(_STRAIGHT)
    apart = _APART.sub(lambda found: " " + " ".join(filter(None, found.groups())), caption)
    return [_BRACKETS.get(token, token) for token in _TOKEN.findall(apart)]


def cider(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
          ) -> list[float]:
    """CIDEr-D of every image's caption.

    Args:
        candidates: one caption per image, in tokens.
        references: every image's captions by people, in tokens; how many images have an n-gram
            decides what it weighs, so a score depends on which images there are.

    Returns:
        0 to 10, and about 1 where a caption is as near to the references as they to each other.
        All 0 for a single image, whose n-grams weigh nothing.
    """
    images = Counter(gram for captions in references
                     for gram in set().union(*map(_ngrams, captions)))
    everywhere = math.log(max(1, len(references)))

    def weigh(words: Sequence[str]) -> Vectors:
        vectors: Vectors = [{} for _ in range(LONGEST)]
        for gram, count in _ngrams(words).items():
            rarity = everywhere - math.log(max(1, images[gram]))
            vectors[len(gram) - 1][gram] = count * rarity
        return vectors

    def score(words: Sequence[str], captions: Sequence[Sequence[str]]) -> float:
        penalties = [_length_penalty(words, caption) for caption in captions]
        if not any(penalties):  # of an endless answer, whose n-grams would take long
            return 0.0
        ours = weigh(words)
        alike = [penalty * _similarity(ours, weigh(caption))
                 for penalty, caption in zip(penalties, captions, strict=True)]
        return SCALE * math.fsum(alike) / len(alike)

    return [score(*image) for image in zip(candidates, references, strict=True)]


def _ngrams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start: start + n]) for n in range(1, LONGEST + 1)
                   for start in range(len(words) - n + 1))


def _similarity(candidate: Vectors, reference: Vectors) -> float:
    """Mean over n of cosines in which no weight of the candidate counts past the reference's."""
    total = 0.0
    for ours, theirs in zip(candidate, reference, strict=True):
        norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        shared = math.fsum(min(weight, theirs[gram]) * theirs[gram]
                           for gram, weight in ours.items() if gram in theirs)
        total += shared / norms if norms else 0.0
    return total / LONGEST


def _length_penalty(a: Sequence[str], b: Sequence[str]) -> float:
    """Lengths are counted in pairs of words, as in pycocoevalcap: 0 and 1 words are the same."""
    gap = max(len(a) - 1, 0) - max(len(b) - 1, 0)
    return math.exp(-gap * gap / (2 * SIGMA * SIGMA))


def judge(questions: Sequence[Question], answers: Sequence[str]) -> list[Verdict]:
    """All captions at once: rare n-grams are those of few of these questions' images."""
    said = [tokens(answer) for answer in answers]
    scores = cider(said, [[tokens(gold) for gold in question.answers] for question in questions])
    return [Verdict(score, " ".join(words) or None)
            for score, words in zip(scores, said, strict=True)]


def figures(judged: Sequence[Judged]) -> dict[str, Estimate]:
    """CIDEr, in NaN for a single question; the error takes the weights of n-grams as given."""
    if len(judged) == 1:
        return {"cider": Estimate(math.nan, math.nan, 1)}
    return {"cider": mean_of([j.verdict.score for j in judged], groups(judged), shares=False)}


CIDER = Rule(
    "cider-d-ptb-like", 1, judge, figures,
    source="salaniz/pycocoevalcap, cider/cider_scorer.py; tokens by an own expression after "
           "Stanford's PTBTokenizer")
