"""How rows become questions: about one image, to be answered in a word or phrase or by a letter."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from taid_vlm.benchmarks.question import Question
from taid_vlm.benchmarks.rows import Row

SHORT_LINE = "Answer the question using a single word or phrase."
LETTER_LINE = "Answer with the option's letter from the given choices directly."
PLACES = ("{question}", "{answer}", "{prediction}")  # of what a judge is asked
_PLACE = re.compile("|".join(map(re.escape, PLACES)))


def filled(template: str, question: str, answer: str, prediction: str) -> str:
    """What a judge is asked; braces in the texts themselves stay as they are."""
    texts = dict(zip(PLACES, (question, answer, prediction), strict=True))
    return _PLACE.sub(lambda place: texts[place[0]], template)


def about_image(
    row: Row, name: str, text: str, *answers: str, image: str = "image", **more: Any
) -> list[Question]:
    """The question of a row whose image stands before the text; `more` are Question's fields."""
    return [Question(name, (None, text), (row.image(image),), answers, **more)]


def short_answers(
    *ids: str, answers: tuple[str, ...] = ("answers", "answer"), group: str, kinds: str = "",
    tags: tuple[str, ...] = (), people: int = 0, ask: Callable[[str], str] = str,
) -> Callable[[Row], list[Question]]:
    """A benchmark's `read`: one question a row, to be answered in a word or phrase.

    Args:
        ids, answers: columns, of which the first that is there counts.
        group: the column of what questions share: a page, an image.
        kinds: a column with a list, every item of which is a tag of its own ("type: form").
        tags: columns that are tags where they are there.
        people: more than so many must have answered.
        ask: what is done to the question's text.
    """
    def read(row: Row) -> list[Question]:
        listed = {f"type: {kind}": "yes" for kind in row.texts(kinds)}
        return about_image(
            row, row.id(*ids), f"{ask(row.text('question'))}\n{SHORT_LINE}",
            *row.golds(*answers, more_than=people), tags=listed | row.tags(*tags),
            group=row.text(group, ""))

    return read
