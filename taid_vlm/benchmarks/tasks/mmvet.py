"""MM-Vet: open questions that take several abilities at once; a language model judges the answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from taid_vlm.benchmarks.prompts import about_image, filled
from taid_vlm.benchmarks.question import (
    Benchmark,
    Judged,
    JudgePrompt,
    Question,
    Rule,
    Verdict,
    groups,
    left_to_judge,
)
from taid_vlm.benchmarks.rows import Row
from taid_vlm.evaluation.statistics import Estimate, mean_of

ABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
TEMPLATE = """Rate how correct an answer is, given the reference answer to the question.

The score is one of 0.0, 0.1, 0.2 ... 1.0: 0.0 where nothing of the reference is said, 1.0 where \
all of it is, and between them the share of it that the answer gets right. In the reference, <AND> \
stands between parts that are all needed for 1.0, and <OR> between references of which one is \
enough. Wording and length do not matter, and what the reference does not ask for is neither \
rewarded nor punished unless it contradicts the reference.

For the reference "3 <AND> 7", the answer "It is 3." has the score 0.5, "x = 7 or x = 3" has 1.0 \
and "x = 4" has 0.0.

Question: {question}
Reference: {answer}
Answer: {prediction}

Write the score alone, as a number."""
_SCORE = re.compile(r"\W*(?:score\W+)?([01](?:\.\d+)?)(?![\d.]*\d)", re.IGNORECASE)


def read(row: Row) -> list[Question]:
    """One question, bare; what it takes ("ocr,math") is a tag as a whole and one by one."""
    text = row.text(row.first("capability", "category"))
    abilities = [name.strip() for name in text.split(",")]
    tags = {"abilities": " ".join(sorted(abilities))} | {f"ability: {x}": "yes" for x in abilities}
    return about_image(row, row.id("question_id", "index"), row.text("question"),
                       row.text("answer"), tags=tags,
                       extra={"question": row.text("question"), "abilities": tuple(abilities)})


def ask(template: str, question: Question, answer: str) -> str:
    """What the judge is asked about an answer."""
    gold = question.answers[0].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return filled(template, question.extra["question"], gold, answer)


def read_score(question: Question, reply: str) -> Verdict | None:
    """The number that a reply begins with, of 0 to 1."""
    found = _SCORE.match(reply.strip())
    if found is None or not 0 <= float(found[1]) <= 1:
        return None
    return Verdict(float(found[1]), found[1])


def figures(judged: Sequence[Judged]) -> dict[str, Estimate]:
    """The mean score of all questions, and of those that take an ability."""
    parts = {name: [j for j in judged if name in j.question.extra["abilities"]]
             for name in ABILITIES}
    return {"score": _mean(judged), **{name: _mean(part) for name, part in parts.items() if part}}


def _mean(judged: Sequence[Judged]) -> Estimate:
    return mean_of([j.verdict.score for j in judged], groups(judged))


BENCHMARK = Benchmark("mmvet", "MM-Vet", read, (
    Rule("judge", 1, left_to_judge, figures, "own prompt for the scores of yuweihao/MM-Vet, "
         "mm-vet_evaluator.py", JudgePrompt("mmvet", 1, ask, read_score, 16, TEMPLATE)),
), hub=("lmms-lab/MMVet", None, "test"), max_new_tokens=1024)
