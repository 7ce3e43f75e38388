"""A benchmark of a user's own, as its YAML file describes it."""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from taid_vlm.config.kinds import AsWritten, Name, NotNegative, Positive, wanted
from taid_vlm.config.section import Section

Place = Literal["boxed", "hashes", "answer_is", "bold", "last_line", "whole", "last_number"]
Column = Annotated[str, wanted("a column's name")]


class Columns(Section):
    """What the data call the columns, where it is something else.

    Args:
        question: The question.
        answer: An option's letter, place from 0 or text; yes or no; one accepted text or a list.
        options: A list of options; otherwise they are in the columns A, B, C, ...
        image: The image, or a list in `images`.
        video: A video in place of it.
        id: What results call a question.
        group: Questions about one item share it.
    """

    question: Column = "question"
    answer: Column = "answer"
    options: Column = "options"
    image: Column = "image"
    video: Column = "video"
    id: Column = "id"
    group: Column = "group"


def prompt_pieces(prompt: str) -> list[tuple[str, str | None]]:
    """A prompt as (text, column that follows or None); raises ValueError."""
    try:
        parsed = list(Formatter().parse(prompt))
    except ValueError as error:
        raise ValueError(f"{error}; write {{{{ and }}}} for braces.") from None
    for _, name, form, conversion in parsed:
        if name is not None and (form or conversion or not name.strip()):
            raise ValueError(f"{{{name}{':' if form else ''}{form}}} must be a column's name "
                             "alone; write {{ and }} for braces.")
    return [(text, name) for text, name, _, _ in parsed]


def _readable(prompt: str | None) -> str | None:
    if prompt is not None and not prompt.strip():
        raise ValueError(" is blank; leave it out for the usual one.")
    prompt_pieces(prompt or "")
    return prompt


class BenchmarkSpec(Section):
    """A benchmark in a YAML file.

    Args:
        type: What answers are, and how they are judged.
        data: A file or folder (from the working directory or, if nothing is there, from this file's
            folder), or a hub name.
        split: Split of a dataset.
        subset: Configuration of a dataset.
        name: What results call it; left out, the file's name.
        title: What pages call it; left out, its name.
        prompt: The question as models see it, with columns in braces: "{question}, {options}". An
            image is shown where <image> stands, otherwise first. Left out, the type's.
        columns: Our columns and what the data call them: {question: query}.
        tags: Columns that figures are split by.
        final: Where a long answer says its final answer, in this order: boxed (\\boxed{14}), hashes
            (#### 14), answer_is ("the answer is 14", "Answer: 14"), bold (**14**), last_line,
            whole, and for numbers last_number. Left out, the type's (short_answer: the whole).
        tolerance: For number and relaxed, as a share of the right value; left out, 0 and 0.05.
        images: false for questions of text alone. Otherwise rows without an image are asked
            without, but some row must have one.
        max_new_tokens (tokens): Longest answer; left out, the type's.
    """

    type: Literal["multiple_choice", "short_answer", "number", "relaxed", "anls", "yes_no",
                  "caption"]
    data: str
    split: str = "train"
    subset: str | None = None
    name: Name | None = None
    title: str | None = None
    prompt: Annotated[str | None, AfterValidator(_readable)] = None
    columns: Annotated[dict[str, str], AsWritten(lambda: Columns)] = {}
    tags: Annotated[list[str], wanted("a list of columns")] = []
    final: Annotated[list[Place], Field(min_length=1)] | None = None
    tolerance: NotNegative | None = None
    images: bool = True
    max_new_tokens: Positive | None = None

    def column(self, ours: str) -> str:
        """What the data call a column."""
        return self.columns.get(ours, ours)
