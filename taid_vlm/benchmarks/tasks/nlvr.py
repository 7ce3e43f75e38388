"""NLVR: is a statement true of a drawing of boxes with shapes, or (NLVR2) of two photographs."""

from __future__ import annotations

from pathlib import Path

from taid_vlm.benchmarks.metrics import yes_no
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row
from taid_vlm.errors import RecordError
from taid_vlm.records import ImageRef

_LABELS = {"true": yes_no.YES, "false": yes_no.NO}  # as the authors' own files write them
ORDERS = 6  # of a drawing's three boxes, each a picture of its own


def read(row: Row) -> list[Question]:
    """One question for every picture; the part of `identifier` before its last "-" is its group:
    the statement's, which stands with several drawings.

    The authors' JSON (`sentence`) holds no pictures. Of NLVR it means six files beside it,
    images/DIRECTORY/SPLIT-IDENTIFIER-0.png to 5.png, of NLVR2 (`left_url`) two in a question:
    SPLIT-SET-PAIR-img0.png and img1.png.
    """
    label, name = row.text("label"), row.text("identifier")
    answer = yes_no.right_answer(_LABELS.get(label.lower(), label), row.where)
    statement = row.text(row.first("statement", "sentence"))
    return [_question(row, f"{name}{place}", images, statement, answer)
            for place, images in _pictures(row, name).items()]


def _question(row: Row, name: str, images: tuple[ImageRef, ...], statement: str, answer: str
              ) -> Question:
    of = "image" if len(images) == 1 else "two images"
    text = f"{statement}\nIs this statement true of the {of}? Please answer yes or no."
    return Question(name, (*[None] * len(images), text), images, (answer,),
                    tags=row.tags("n_objects"),
                    group=row.text("identifier").rpartition("-")[0])


def _pictures(row: Row, name: str) -> dict[str, tuple[ImageRef, ...]]:
    """What is shown, by what tells one question of a row from another; raises RecordError."""
    if "image" in row or "sentence" not in row:
        return {"": (row.image(),)}
    if "left_url" in row:
        pair = name.rpartition("-")[0]
        return {"": tuple(_file(row, f"{pair}-img{side}.png") for side in (0, 1))}
    split = Path(row.where.partition(":")[0].partition("[")[0]).stem
    return {f"-{order}": (_file(row, f"{split}-{name}-{order}.png"),) for order in range(ORDERS)}


def _file(row: Row, name: str) -> ImageRef:
    """A picture of the authors' folders, which differ from release to release."""
    inside = row.text("directory", "")
    folders = ("", "images", f"images/{inside}", f"images/{name.partition('-')[0]}",
               f"images/{name.partition('-')[0]}/{inside}", name.partition("-")[0])
    for folder in folders if row.root is not None else ():
        if row.root is not None and (row.root / folder / name).is_file():
            return Row({"image": f"{folder}/{name}".lstrip("/")}, row.where, row.root).image()
    raise RecordError(f"{row.where}: there is no picture '{name}' beside the data, in "
                      f"'images/{inside}' or the like; the authors' JSON means it.")


BENCHMARK = Benchmark("nlvr", "NLVR", read, (yes_no.WORD,))
