"""A small benchmark of the tests' own: questions of mixed lengths, with none, one or two images."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from zoo.images import images

from taid_vlm.benchmarks.question import Benchmark, Question, Rule, Verdict, one_by_one
from taid_vlm.benchmarks.rows import LETTERS, Row
from taid_vlm.records import ImageRef

WORDS = ("what", "is", "the", "colour", "of", "this", "square", "left", "naïve", "12.5", "über")
COLOURS = ("red", "a dark green", "blue", "light yellow and white")


def questions(number: int, seen: bool = True, seed: int = 0) -> list[Question]:
    """Questions with choices; `seen`: with up to two images each."""
    rng = random.Random(seed)
    found = []
    for index in range(number):
        count = (index + 1) % 3 if seen else 0
        shown = tuple(ImageRef(image, f"image {index}") for image in images(count, seed=7 * index))
        text = " ".join(rng.choice(WORDS) for _ in range(rng.choice((2, 5, 23))))
        choices = tuple(rng.sample(COLOURS, rng.choice((2, 3, 4))))
        found.append(Question(
            f"q{index:02d}", (*[None] * count, text), shown, (rng.choice("AB"),), choices,
            tags={"kind": ("even", "odd")[index % 2]}, group=f"g{index // 2}"))
    return found


def read(row: Row) -> list[Question]:
    """Rows {"index", "question", "A".., "answer", "image"} as questions."""
    shown = row.images() if "image" in row else ()
    prompt = (*[None] * len(shown), row.text("question"))
    return [Question(row.text("index"), prompt, shown, (row.text("answer"),), row.options(),
                     tags={"kind": row.text("kind", "none")})]


def first_letter(question: Question, answer: str) -> Verdict:
    """The first letter that names a choice, whatever stands before it."""
    letters = LETTERS[: len(question.choices)]
    found = next((letter for letter in answer.upper() if letter in letters), None)
    return Verdict(float(found in question.answers), found)


def half_marks(question: Question, answer: str) -> Verdict:
    """A second opinion: every answer with a letter is worth a half."""
    return Verdict(first_letter(question, answer).read is not None and 0.5, "half")


QUIZ = Benchmark(
    "quiz", "A quiz", read, (Rule("letter", 3, one_by_one(first_letter), source="the tests"),
                             Rule("half", 1, one_by_one(half_marks))),
    max_new_tokens=6, likelihood=True)


def shuffled(given: Sequence[Question], seed: int) -> list[Question]:
    order = list(given)
    random.Random(seed).shuffle(order)
    return order


def timeless(tree: Any) -> Any:
    """Without what depends on when and where: times, memory and machine."""
    if isinstance(tree, dict):
        return {key: timeless(value) for key, value in tree.items()
                if key not in ("seconds", "memory", "machine", "versions")}
    return tree
