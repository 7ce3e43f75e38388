"""MMMU: college problems over thirty subjects, with pictures within question and options."""

from __future__ import annotations

import re

from taid_vlm.benchmarks.choices import letter_of, listed, options_of
from taid_vlm.benchmarks.metrics.mmmu import LMMS, OFFICIAL
from taid_vlm.benchmarks.prompts import LETTER_LINE, SHORT_LINE
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row
from taid_vlm.errors import RecordError, SampleDropped
from taid_vlm.records import ImageRef

DISCIPLINES = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine "
                           "Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics "
                            "Energy_and_Power Materials Mechanical_Engineering",
}
DISCIPLINE_OF = {subject: name for name, subjects in DISCIPLINES.items()
                 for subject in subjects.split()}
_TAG = re.compile(r"<image (\d)>")


def read(row: Row) -> list[Question]:
    """One question; "<image 2>" becomes the second picture wherever it stands.

    VLMEvalKit's table holds all pictures of a row in one list, its options in the columns A to I,
    and the few-shot examples of the split dev, too, which are no part.
    """
    if row.text("split", "") == "dev":
        raise SampleDropped("split dev", row.where)
    choices = () if _is_open(row) else options_of(row, "options")
    form = f"{listed(choices, '({}) {}')}\n\n{LETTER_LINE}" if choices else SHORT_LINE
    prompt, images = with_pictures(f"{row.text('question')}\n{form}", row)
    answers = (letter_of(row, choices),) if choices else _open_golds(row)
    return [Question(row.id("id", "index"), prompt, images, answers, choices, _tags(row))]


def _is_open(row: Row) -> bool:
    held = row.texts("options") or row.options()
    return row.text("question_type", "" if held else "open") == "open"


def _open_golds(row: Row) -> tuple[str, ...]:
    """One answer, or a list of them written as text; "(3, 4)" is one answer."""
    answer = row.text("answer")
    return tuple(row.texts("answer")) if answer.startswith("[") else (answer,)


def with_pictures(text: str, row: Row) -> tuple[tuple[str | None, ...], tuple[ImageRef, ...]]:
    """The text cut at its tags; pictures that no tag names come first.

    Raises:
        RecordError: a tag without a picture.
    """
    parts, pictures = _TAG.split(text), _pictures(row)
    named = parts[1::2]
    for number in named:
        if number not in pictures:
            raise RecordError(f"{row.where}: column 'image_{number}' is missing, which "
                              f"'<image {number}>' names (pictures found: {len(pictures)}).")
    unnamed = [number for number in pictures if number not in named]
    prompt = [None if index % 2 else part for index, part in enumerate(parts) if index % 2 or part]
    return (*[None] * len(unnamed), *prompt), tuple(
        pictures[number] for number in (*unnamed, *named))


def _pictures(row: Row) -> dict[str, ImageRef]:
    """By number: `image_1` to `image_7`, or a list in `image`."""
    if "image" in row:
        return {str(number): image for number, image in enumerate(row.images("image"), 1)}
    return {number: row.image(f"image_{number}") for number in "1234567"
            if f"image_{number}" in row}


def _tags(row: Row) -> dict[str, str]:
    """Subject and discipline out of the id ("validation_Art_Theory_12"), and what columns say."""
    subject = row.text("id", "").partition("_")[2].rpartition("_")[0] or row.text("category", "")
    tags = {"discipline": DISCIPLINE_OF.get(subject, ""), "subject": subject}
    return {key: value for key, value in tags.items() if value} | row.tags(
        "subfield", "topic_difficulty", "question_type")


BENCHMARK = Benchmark("mmmu", "MMMU", read, (OFFICIAL, LMMS),
                      hub=("lmms-lab/MMMU", None, "validation"))
