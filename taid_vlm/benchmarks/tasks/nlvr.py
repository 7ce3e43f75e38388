"""NLVR: is a statement true of a drawing of boxes with shapes in them."""

from __future__ import annotations

from taid_vlm.benchmarks.metrics import yes_no
from taid_vlm.benchmarks.prompts import about_image
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row

_LABELS = {"true": yes_no.YES, "false": yes_no.NO}  # as the authors' own files write them


def read(row: Row) -> list[Question]:
    """One question; the part of `identifier` before "-" is the statement's, which stands with
    several drawings."""
    label, name = row.text("label"), row.text("identifier")
    text = f"{row.text('statement')}\nIs this statement true of the image? Please answer yes or no."
    answer = yes_no.right_answer(_LABELS.get(label.lower(), label), row.where)
    return about_image(row, name, text, answer, tags=row.tags("n_objects"),
                       group=name.rpartition("-")[0])


BENCHMARK = Benchmark("nlvr", "NLVR", read, (yes_no.WORD,))
