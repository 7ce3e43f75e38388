"""NLVR: is a statement true of a drawing of boxes with shapes in them."""

from __future__ import annotations

from taid_vlm.benchmarks.metrics.yes_no import (
    NO,
    YES,
    as_word,
    detection,
    judged_by,
    right_answer,
)
from taid_vlm.benchmarks.question import Benchmark, Question, Rule, one_by_one
from taid_vlm.benchmarks.rows import Row

_LABELS = {"true": YES, "false": NO}  # as the authors' own files write them


def read(row: Row) -> list[Question]:
    """One question; the part of `identifier` before "-" is the statement's, which stands with
    several drawings."""
    label, name = row.text("label"), row.text("identifier")
    text = f"{row.text('statement')}\nIs this statement true of the image? Please answer yes or no."
    return [Question(
        id=name, prompt=(None, text), images=(row.image(),),
        answers=(right_answer(_LABELS.get(label.lower(), label), row.where),),
        tags={"n_objects": row.text("n_objects")} if "n_objects" in row else {},
        group=name.rpartition("-")[0])]


BENCHMARK = Benchmark("nlvr", "NLVR", read, (
    Rule("word", 1, one_by_one(judged_by(as_word)), detection,
         "own: exactly one of yes and no as a word"),))
