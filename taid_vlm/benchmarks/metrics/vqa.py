"""VQA accuracy: how many of ten people gave the answer, after the normaliser of VQA."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from taid_vlm.benchmarks.metrics.text import ARTICLES, of_text
from taid_vlm.benchmarks.question import Question, Rule

ENOUGH = 3  # people who gave an answer make it right

_MARKS = ";/[]\"{}()=+\\_-><@`,?!"
_COMMA = re.compile(r"\d,\d")
_COMMAS = re.compile(r"\d,+\d")  # of the copies from mmf on
_PERIOD = re.compile(r"\.(?!\d)")
_PERIOD_ALONE = re.compile(r"(?<!\d)\.(?!\d)")
_PERIODS = 32  # re.UNICODE, which every copy hands to `sub` as the count
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4",
            "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""
# With one apostrophe forgotten; the last entry is the wrong way round in the official table too.
_CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in _CONTRACTED.split()
                 for i, letter in enumerate(word) if letter == "'"} | {"somebody'd": "somebodyd"}


def official(text: str) -> str:
    """The normaliser of VQA's evaluation: punctuation, then numbers, articles, contractions."""
    return _words(_punctuation(_one_line(text), _COMMA, _PERIOD))


def evalai(text: str) -> str:
    """As the servers of TextVQA have it: lower-cased, commas, question marks and 's go first."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return official(text)  # no comma is left for the copies' other pattern of commas


def lmms(text: str) -> str:
    """As lmms-eval's copy has it for VQAv2: several commas in a row stand in a number too."""
    return _words(_punctuation(_one_line(text), _COMMAS, _PERIOD))


def vlmevalkit(text: str) -> str:
    """As VLMEvalKit's copy has it: a period after a digit stays."""
    return _words(_punctuation(_one_line(text), _COMMA, _PERIOD_ALONE))


def agreement(answer: str, golds: Sequence[str]) -> float:
    """Mean over leaving one person out of min(1, others who gave the answer / 3)."""
    hits = golds.count(answer)
    with_one_less = hits * min(1.0, (hits - 1) / ENOUGH)
    return (with_one_less + (len(golds) - hits) * min(1.0, hits / ENOUGH)) / len(golds)


def always(normalise: Callable[[str], str]) -> Callable[[str, Question], float]:
    """The score of an answer, it and all golds normalised."""
    def score(answer: str, question: Question) -> float:
        return agreement(normalise(answer), [normalise(gold) for gold in question.answers])

    return score


def where_people_differ(answer: str, question: Question) -> float:
    """The official score: as they are, case included, where all people said the same."""
    golds = [_one_line(gold) for gold in question.answers]
    if len(set(golds)) == 1:
        return agreement(_one_line(answer), golds)
    return always(official)(answer, question)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(text: str, comma: re.Pattern[str], period: re.Pattern[str]) -> str:
    """Marks beside a space go, all of them in a text with 1,000; others become a space."""
    crowded, out = comma.search(text) is not None, text
    for mark in _MARKS:
        goes = crowded or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if goes else " ")
    return period.sub("", out, count=_PERIODS)


def _words(text: str) -> str:
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


VQA_OFFICIAL = Rule(
    "official", 1, of_text(where_people_differ, official),
    source="GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py")
VQA_LMMS = Rule(
    "lmms", 1, of_text(always(lmms), lmms),
    source="EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/vqav2/utils.py")
TEXTVQA_OFFICIAL = Rule(
    "official", 1, of_text(always(evalai), evalai),
    source="facebookresearch/mmf, mmf/utils/m4c_evaluators.py; lmms-eval's textvqa is the same")
TEXTVQA_VLMEVALKIT = Rule(
    "vlmevalkit", 1, of_text(always(vlmevalkit), vlmevalkit),
    source="open-compass/VLMEvalKit, vlmeval/dataset/utils/vqa_eval.py (vqa_score)")
