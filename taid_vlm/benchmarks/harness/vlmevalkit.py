"""Questions as a table for VLMEvalKit: put into $LMUData, its name is the dataset's there.

With options VLMEvalKit asks it as multiple choice in its own words, without as open questions in
ours. It skips nothing of such a table and downloads nothing.
"""

from __future__ import annotations

import csv
import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from taid_vlm.benchmarks.choices import listed
from taid_vlm.benchmarks.prompts import LETTER_LINE
from taid_vlm.benchmarks.question import Question
from taid_vlm.benchmarks.remote import in_base64
from taid_vlm.benchmarks.rows import LETTERS
from taid_vlm.errors import SampleDropped, TaidError
from taid_vlm.io.folders import refuse_file_in_the_way
from taid_vlm.io.hashing import sha256
from taid_vlm.records import ImageRef
from taid_vlm.records.images import SHORTEST_BASE64

logger = logging.getLogger(__name__)
_OWN = ("index", "id", "question", "hint", *LETTERS, "answer", "image")
# what pandas, and so VLMEvalKit, takes for an empty cell; a space behind it keeps it
_NOTHING = frozenset((
    "#N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null"))

Cells = dict[str, str]


def export_tsv(questions: Sequence[Question], path: str | Path) -> Path:
    """Write questions with columns index, question, options A, B ..., answer, tags, image.

    Images are base64; one that was written before is named by the index of its row. `index` is
    the question's id where all ids are numbers, otherwise its place, and the id has a column.

    Raises:
        TaidError: what VLMEvalKit cannot hold or would lose; an image that cannot be read. No
            file is left then.
    """
    path = Path(path).expanduser()
    if path.suffix != ".tsv":
        raise TaidError(f"'{path}': VLMEvalKit reads tables by the name NAME.tsv.")
    refuse_file_in_the_way(path.parent)
    _check(questions)
    rows = _cells(questions)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns += ["image"] if questions[0].images else []
    columns.sort(key=lambda c: _OWN.index(c) if c in _OWN else len(_OWN))
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(_with_images(rows, questions))
        _read_back(partial, rows, columns, path.name)
        os.replace(partial, path)
    except OSError as error:
        raise TaidError(f"'{path}' could not be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def bare_question(question: Question) -> tuple[str, str]:
    """Question and hint without the options and the line that asks for a letter."""
    if "question" in question.extra:
        return str(question.extra["question"]), str(question.extra.get("hint", ""))
    text = _with_places(question)
    if question.choices:
        text = text.removesuffix(LETTER_LINE).rstrip().removesuffix(listed(question.choices))
        text = _without_inline(text, question.choices)
    return text.strip(), ""


def _without_inline(text: str, choices: Sequence[str]) -> str:
    """The text without "Options: A: cat, B: dog", which the table's columns say again."""
    if not all(choices):
        raise TaidError(f"the options in '{text:.60}' cannot be told apart; VLMEvalKit needs them.")
    marked = r"\s*(?:(?:Options|Choices)\s*:)?\s*\(?A[:.)]\s*" + r".{0,9}".join(
        re.escape(choice) for choice in choices) + r"[\s.;,]*$"
    return re.sub(marked, "", text, flags=re.DOTALL | re.IGNORECASE)


def _with_places(question: Question) -> str:
    """The prompt as text; VLMEvalKit shows images first, so that others are told by number."""
    numbers = itertools.count(1)
    texts = [f"<image {next(numbers)}>" if part is None else part for part in question.prompt]
    first = next((i for i, part in enumerate(question.prompt) if part is not None), len(texts))
    return "".join(texts[first:]).strip()


def _check(questions: Sequence[Question]) -> None:
    if not questions:
        raise TaidError("there are no questions to export.")
    for what, having in (("an image", [bool(q.images) for q in questions]),
                         ("options", [bool(q.choices) for q in questions])):
        if any(having) and not all(having):
            raise TaidError(
                f"{sum(having)} of {len(questions)} questions have {what}; VLMEvalKit needs them "
                f"in a table of their own (the first without: '"
                f"{questions[having.index(False)].id}').")
    for tag in (tag for question in questions for tag in question.tags if tag in _OWN):
        raise TaidError(f"the tag '{tag}' cannot be exported: VLMEvalKit's tables have a column of "
                        "that name.")


def _cells(questions: Sequence[Question]) -> list[Cells]:
    """All columns but the images."""
    numbered = all(question.id.isdecimal() for question in questions)
    rows: list[Cells] = []
    for place, question in enumerate(questions):
        text, hint = bare_question(question)
        gold = question.answers[0] if len(question.answers) == 1 else str(list(question.answers))
        row = {"index": question.id} if numbered else {"index": str(place), "id": question.id}
        row |= {"question": text, **({"hint": hint} if hint else {}), "answer": gold}
        row |= dict(zip(LETTERS, question.choices, strict=False)) | dict(question.tags)
        rows.append({key: cell + " " * (cell in _NOTHING) for key, cell in row.items()})
    return rows


def _with_images(rows: Sequence[Cells], questions: Sequence[Question]) -> Iterator[Cells]:
    """Rows with their images; several are written as a list, alone and without sharing."""
    seen: dict[bytes, str] = {}
    for row, question in zip(rows, questions, strict=True):
        texts = [_base64(image, question.id) for image in question.images]
        if len(texts) == 1:
            key = sha256([texts[0].encode()])
            yield {**row, "image": seen.get(key, texts[0])}
            seen.setdefault(key, row["index"])
        else:
            yield {**row, "image": str(texts)} if texts else row


def _base64(image: ImageRef, name: str) -> str:
    """The file's own bytes where whoever decodes them sees the same, and otherwise (transparency,
    16 bits, EXIF's directions) a PNG of what models are shown."""
    if image.kind == "video":
        raise TaidError(f"question '{name}' holds a video, which VLMEvalKit's tables do not.")
    try:
        text = in_base64(image)[1]
        # a shorter text is taken for the index of another row
        return text if len(text) > SHORTEST_BASE64 else in_base64(replace(
            image, value=image.load()))[1]
    except SampleDropped as problem:
        raise TaidError(f"question '{name}': {problem}") from None


def _read_back(path: Path, rows: Sequence[Cells], columns: Sequence[str], name: str) -> None:
    """Warn of cells that VLMEvalKit will read as something else, the option "1" as "1.0" say."""
    table = pd.read_csv(path, sep="\t", usecols=[c for c in columns if c != "image"])
    for column in table:
        given = (row.get(str(column), "").strip() for row in rows)
        other = [(text, str(cell)) for text, cell in zip(given, table[column], strict=True)
                 if str(cell).strip() != text and not (text == "" and pd.isna(cell))]
        if other:
            logger.warning("%s: VLMEvalKit reads %d cells of column '%s' otherwise than they are "
                           "written, %r as %r.", name, len(other), column, *other[0])
