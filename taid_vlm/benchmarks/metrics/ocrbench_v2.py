"""OCRBench v2's scores, one per kind of question.

Source: Yuliang-Liu/MultimodalOCR, OCRBench_v2/eval_scripts (eval.py, vqa_metric.py,
IoUscore_metric.py, spotting_metric.py, TEDS_metric.py). Tables, charts and documents (TEDS, on
lxml's trees), and long texts (BLEU and METEOR with WordNet and jieba) have no score here.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from taid_vlm.benchmarks.metrics.anls import THRESHOLD, levenshtein
from taid_vlm.benchmarks.question import Question

Box = Sequence[int]
Score = Callable[[str, Question], float]
FEW_WORDS, FEW_PARTS = 5, 4  # a gold of fewer is looked for, of more compared by edits
MATCH = 0.5  # intersection over union that makes two boxes the same
_FENCED = re.compile(r"```(?:python|json)?\n(.*?)\n```", re.DOTALL | re.IGNORECASE)
_KEY = re.compile(r"[\w\s]+")
_VALUE = re.compile(r"""["']?\s*[:=]\s*["']?([^\n,"'{}]+)["']?""")
_FOUR = re.compile(r"[(\[]\s*" + r"\s*,\s*".join([r"(\d{1,9})"] * 4) + r"\s*[)\]]")
_ITEM = re.compile(r"[\[(]([^\[\]()]*)[\])]")
_TEXT_TAG = re.compile(r"\\text\{([^{}]*)\}")
_QUOTED = re.compile(r'^\s*"(.*)"\s*$')
_DIGITS = 9  # a number of more is nobody's count
_SPECIAL = "!?.:,*\"()·[]/'"
_BETWEEN = ("", ".", ". ", ",", ", ", "、", ";", "; ", " ", "和")


# ----- short answers ------------------------------------------------------------------------


def _found(plain: Callable[[str], str], is_short: Callable[[str], bool]) -> Score:
    def score(answer: str, question: Question) -> float:
        said, best = plain(answer), 0.0
        for gold in map(plain, question.answers):
            if is_short(gold):
                best = 1.0 if gold in said else best
                continue
            likeness = 1 - levenshtein(said, gold) / max(len(said), len(gold), 1)
            best = max(best, likeness) if likeness >= THRESHOLD else best
        return best

    return score


def _one_line(text: str) -> str:
    return text.strip().replace("\n", " ")


def _few_words(gold: str) -> bool:
    return len(gold.split()) < FEW_WORDS


vqa = _found(lambda text: _one_line(text.lower()), _few_words)
with_case = _found(_one_line, _few_words)
vqa_cn = _found(lambda text: _one_line(text.lower()).replace(" ", ""),
                lambda gold: len(gold.split(",")) < FEW_PARTS)
formula = _found(lambda text: _one_line(text).replace(" ", ""), lambda gold: True)
formula_cn = _found(lambda text: _one_line(_TEXT_TAG.sub(r"\1", text)).replace(" ", ""),
                    lambda gold: True)


def letter(answer: str, question: Question) -> float:
    """Nothing but the option's letters is left of the answer's letters."""
    return float("".join(filter(str.isalpha, answer)) == question.answers[0])


def listed_cn(answer: str, question: Question) -> float:
    """The gold's characters, joined in one of ten ways."""
    return float(any(between.join(question.answers[0]) in answer for between in _BETWEEN))


def count_exact(answer: str, question: Question) -> float:
    """A gold occurs in the answer as it is."""
    return float(any(_one_line(gold.lower()) in answer for gold in question.answers))


def count_near(answer: str, question: Question) -> float:
    """The first number's nearness, above a half; 0 where it is 0 or twice the gold."""
    first = re.search(r"\d+", answer)
    number = int(first[0]) if first and len(first[0]) <= _DIGITS else 0
    scores = [1 - abs(number - int(gold)) / int(gold) for gold in question.answers
              if 0 < number < 2 * int(gold)]
    return max((score for score in scores if score > MATCH), default=0.0)


# ----- keys and values ----------------------------------------------------------------------


def as_pairs(answer: str) -> dict[str, str]:
    """Keys and values of an answer: JSON, a Python dict, or whatever looks like "key: value"."""
    fenced = _FENCED.search(answer)
    content = fenced[1] if fenced else answer.strip()
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        tree = literal(content)
        if tree is None:
            tree = dict(_loose_pairs(content))
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        return {}
    return {key.strip(): str(value).strip() for key, value in tree.items()}


def _loose_pairs(text: str) -> Iterator[tuple[str, str]]:
    """What looks like "key: value"; a run of words is looked at once, not from each letter on."""
    start = 0
    while key := _KEY.search(text, start):
        value = _VALUE.match(text, key.end())
        start = value.end() if value else key.end()
        if value:
            yield key[0], value[1]


def literal(text: str) -> Any:
    """What Python reads as a value that is written out; None where there is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def keys_and_values(answer: str, question: Question) -> float:
    """The share of keys, said or wanted, whose value is a right one.

    Every key's value may be chosen by itself, so that the best combination has the best of each.
    """
    said, wanted = as_pairs(answer), question.extra["pairs"]
    keys = {key for key in {*said, *wanted} if key in said or None not in wanted[key]}
    right = sum(any(gold is not None and _folded(said[key]) == _folded(gold)
                    for gold in wanted.get(key, ())) for key in keys if key in said)
    return right / len(keys) if keys and wanted else 0.0


def pairs_of(text: str) -> dict[str, list[str | None]]:
    """A gold's keys, each with the values that are right; {} where it cannot be read."""
    tree: Any = text.strip('"')
    for _ in range(2):
        if isinstance(tree, str):
            try:
                tree = json.loads(tree)
            except (ValueError, RecursionError):
                tree = literal(tree)
    if not isinstance(tree, dict):
        return {}
    return {str(key): [None if x is None else str(x)
                       for x in (value if isinstance(value, list) else [value])]
            for key, value in tree.items()}


def _folded(text: str) -> str:
    return text.lower().strip().replace("\n", " ").replace(" ", "")


# ----- boxes --------------------------------------------------------------------------------


def overlap(one: Iterable[Any], other: Iterable[Any]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom); 0 where one is none."""
    try:
        a, b = [int(x) for x in one], [int(x) for x in other]
        width = min(a[2], b[2]) - max(a[0], b[0])
        height = min(a[3], b[3]) - max(a[1], b[1])
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    except (TypeError, ValueError, IndexError):
        return 0.0
    inside = max(0, width) * max(0, height)
    union = sum(areas) - inside
    return inside / union if union else 0.0


def grounding(answer: str, question: Question) -> float:
    """The overlap of the last box that is named, in thousandths of the image."""
    boxes = [tuple(map(int, match.groups())) for match in _FOUR.finditer(answer)]
    boxes = [box for box in boxes if max(box) <= 1000]
    return overlap(boxes[-1], question.answers) if boxes else 0.0


def with_position(answer: str, question: Question) -> float:
    """Half for the answer, half for where it stands."""
    said = as_pairs(answer)
    box = literal(said["bbox"]) if "bbox" in said else None
    text = vqa(said["answer"], question) if "answer" in said else 0.0
    where = overlap(box, question.extra["bbox"]) if isinstance(box, Iterable) else 0.0
    return 0.5 * text + 0.5 * where


def spotting(answer: str, question: Question) -> float:
    """F1 of words at their places: boxes that overlap by more than a half, and the same word."""
    said = [(box, _unquoted(text)) for *box, text in spotted(answer)
            if box[0] < box[2] and box[1] < box[3]]
    wanted = [((min(box[0::2]), min(box[1::2]), max(box[0::2]), max(box[1::2])), _unquoted(text))
              for box, text in question.extra["words"]]
    asked = [(box, text) for box, text in wanted if text != "###"]  # illegible: no one is asked
    blank = [box for box, text in wanted if text == "###"]
    said = [(box, text) for box, text in said if not any(_within(box, x) > MATCH for x in blank)]
    free, hits = set(range(len(said))), 0
    for box, text in asked:
        match = next((n for n in sorted(free) if overlap(said[n][0], box) > MATCH), None)
        if match is not None:
            free.remove(match)
            if not text and said[match][1]:
                return 0.0  # where the authors' script ends in an error
            hits += _same_word(text.upper(), said[match][1].upper())
    return 2 * hits / (len(asked) + len(said)) if hits else 0.0


def spotted(answer: str) -> list[tuple[Any, ...]]:
    """Boxes with their words, each once: (left, top, right, bottom, word)."""
    tree, items = literal(answer), list[Sequence[Any]]()
    if tree is None:
        items = [item.strip().split(",", 4) for item in _ITEM.findall(answer)]
    elif isinstance(tree, (list, tuple)):
        items = [item for item in tree if isinstance(item, (list, tuple))]
    found: dict[tuple[Any, ...], None] = {}
    for item in (item for item in items if len(item) >= 5):
        try:
            box = [int(str(x).strip()) for x in item[:4]]
        except ValueError:
            continue
        if min(box) >= 0 and max(box) <= 1000:
            text = str(item[4]).replace("\n", "").strip().strip('"').strip("'")
            found[(*box, text)] = None
    return list(found)


def _within(box: Box, other: Box) -> float:
    """The share of a box that lies in another."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    return max(0, width) * max(0, height) / ((box[2] - box[0]) * (box[3] - box[1]))


def _unquoted(text: str) -> str:
    quoted = _QUOTED.match(text)
    return quoted[1].replace("\\\\", "\\").replace('\\"', '"') if quoted else text


def _same_word(gold: str, said: str) -> bool:
    """But for one special character of the gold at either end."""
    starts = [gold, gold[1:]] if gold[:1] in _SPECIAL else [gold]
    ends = [*starts, *(text[:-1] for text in starts)] if gold[-1:] in _SPECIAL else starts
    return said in ends
