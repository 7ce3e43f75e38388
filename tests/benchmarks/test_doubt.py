"""Figures that say little of a model: all answers wrong, or all alike, are said in words."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from taid_vlm import evaluate
from taid_vlm.benchmarks.question import Judged, Question, Verdict
from taid_vlm.benchmarks.scoring import FEW, doubt

DATA = Path(__file__).parents[2] / "data"


def answered(*pairs: tuple[str, str], unscored: str = "") -> list[Judged]:
    return [Judged(Question(str(number), (None, "which?"), answers=(right,)), said,
                   Verdict(float(said == right), said, unscored))
            for number, (said, right) in enumerate(pairs)]


def test_what_is_doubtful() -> None:
    wrong, fine = [("a long answer", "red")] * FEW, [("red", "red"), ("a", "b")] * FEW
    assert doubt(answered(*wrong)) == (
        f"none of {FEW} answers is right. The first: asked '<image>which?', answered "
        "'a long answer', right is 'red'.")
    assert doubt(answered(*[("yes", "yes"), ("yes", "no")] * FEW)).startswith(
        f"all {2 * FEW} answers are the same. ")
    assert doubt(answered(*wrong[1:])) == doubt(answered(*fine)) == ""  # few; one wrong of two
    assert doubt(answered(*[("yes", "yes")] * FEW)) == ""  # as all right ones are
    assert doubt(answered(*wrong, unscored="no judge")) == doubt([]) == ""


def test_a_teacher_of_bare_questions_is_asked_bare_questions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The demo's teacher on a newcomer's benchmark of held-out scenes."""
    rows = pq.read_table(DATA / "scenes/eval.parquet").slice(0, 30).to_pylist()
    lines = []
    for number, row in enumerate(rows):
        question, answer = (turn["content"] for turn in row["messages"][:2])
        Image.open(io.BytesIO(row["images"][0]["bytes"])).save(tmp_path / f"{number}.png")
        if row["categories"][0] != "caption":
            lines.append(json.dumps({"image": f"{number}.png", "answer": answer[0]["text"],
                                     "question": question[-1]["text"]}))
    (tmp_path / "held.jsonl").write_text("\n".join(lines))
    (tmp_path / "usual.yaml").write_text("type: short_answer\ndata: held.jsonl\n")
    (tmp_path / "alone.yaml").write_text(
        'type: short_answer\ndata: held.jsonl\nprompt: "{question}"\n')
    with caplog.at_level(logging.WARNING):
        results = evaluate(model=str(DATA / "models/scenes-teacher"), output_dir=tmp_path / "out",
                           tasks=[str(tmp_path / "usual.yaml"), str(tmp_path / "alone.yaml")])
    [tasks] = [result["tasks"] for result in results.values()]
    assert tasks["alone"]["figures"]["accuracy"]["value"] > 0.9
    assert tasks["usual"]["figures"]["accuracy"]["value"] == 0
    [warning] = [record.getMessage() for record in caplog.records
                 if "is right" in record.getMessage()]
    assert "usual: none of" in warning and '"{question}"' in warning
    assert "Answer the question using a single word or phrase." in warning
