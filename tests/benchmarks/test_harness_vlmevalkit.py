"""Tables for VLMEvalKit: what it reads from them, and what this package reads back."""

from __future__ import annotations

import ast
import base64
import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from zoo.images import image

from taid_vlm.benchmarks.harness.vlmevalkit import bare_question, export_tsv
from taid_vlm.benchmarks.question import Question
from taid_vlm.benchmarks.reading import read_questions
from taid_vlm.benchmarks.rows import Row
from taid_vlm.benchmarks.tasks import ai2d, mmbench, mmstar, ocrbench
from taid_vlm.config.data import DataSource
from taid_vlm.errors import TaidError
from taid_vlm.records import ImageRef


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    image("square", seed).save(buffer, "PNG")
    return buffer.getvalue()


def rows(count: int, **more: Any) -> list[Row]:
    """Multiple choice over two images, in the hub's columns."""
    odd = ['the "red" one', "a\tb", "two\nlines", "数量", "None", "1"]
    return [Row({"index": i, "question": f"Which  one, {i}?", "hint": "Look." if i % 2 else "",
                 "A": odd[i % 6], "B": odd[(i + 1) % 6], "C": odd[(i + 2) % 6],
                 "answer": "ABC"[i % 3], "category": f"kind {i % 2}",
                 "image": {"bytes": png(i % 2)}, **more}, f"t[{i}]")
            for i in range(count)]


def loaded(path: Path) -> pd.DataFrame:
    """As vlmeval 0.0.20 loads a custom table: smp/file.py load, dataset/image_base.py __init__."""
    data = pd.read_csv(path, sep="\t")
    data = data[~pd.isna(data["image"])]
    data["index"], data["image"] = [str(x) for x in data["index"]], [str(x) for x in data["image"]]
    images = dict(zip(data["index"], data["image"], strict=True))
    for name, held in images.items():
        if len(held) <= 64:
            assert len(images[held]) > 64
            images[name] = images[held]
    data["image"] = [images[name] for name in data["index"]]
    return data


def pixels(value: str) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(value))).convert("RGB").tobytes()


def same(first: Question, second: Question) -> bool:
    plain = (replace(q, images=(), extra={}) for q in (first, second))
    seen = ([i.load().tobytes() for i in q.images] for q in (first, second))
    return next(plain) == next(plain) and next(seen) == next(seen)


@pytest.mark.parametrize("task", [ai2d, mmbench])
def test_a_table_comes_back_as_the_same_questions(task: Any, tmp_path: Path) -> None:
    more = {"options": None} if task is ai2d else {}
    questions = [q for row in rows(7, **more) for q in task.BENCHMARK.read(row)]
    path = export_tsv(questions, tmp_path / "Own.tsv")
    back = read_questions(replace(task.BENCHMARK, complete=lambda held: held),
                          DataSource(str(path)))
    assert len(back) == 7
    for first, second in zip(questions, back, strict=True):
        assert same(first, second), (first, second)


def test_vlmevalkit_finds_everything(tmp_path: Path) -> None:
    questions = mmbench.with_rotations(
        [q for row in rows(7) for q in mmbench.BENCHMARK.read(row)])
    data = loaded(export_tsv(questions, tmp_path / "Own.tsv"))
    assert list(data.columns)[:3] == ["index", "question", "hint"] and len(data) == 21
    for (_, line), question in zip(data.iterrows(), questions, strict=True):
        assert line["index"] == question.id and line["answer"] == question.answers[0]
        options = tuple(str(line[c]).strip() for c in "ABC" if not pd.isna(line[c]))
        assert options == question.choices, "an option was lost"
        assert pixels(line["image"]) == question.images[0].load().tobytes()
        assert line["category"] == question.tags["category"]


def test_an_image_is_written_once(tmp_path: Path) -> None:
    questions = [q for row in rows(6) for q in mmbench.BENCHMARK.read(row)]
    path = export_tsv(questions, tmp_path / "Own.tsv")
    cells = [str(x) for x in pd.read_csv(path, sep="\t")["image"]]
    assert cells[2:] == ["0", "1", "0", "1"] and all(len(cell) > 64 for cell in cells[:2])


def test_inline_options_are_not_said_twice(tmp_path: Path) -> None:
    text = "Where is it?\nOptions: A: left, B: right, C: above, D: (below)"
    row = Row({"index": 3, "question": text, "answer": "B", "image": {"bytes": png(0)}}, "t[0]")
    (question,) = mmstar.BENCHMARK.read(row)
    assert bare_question(question) == ("Where is it?", "")
    (line,) = loaded(export_tsv([question], tmp_path / "Own.tsv")).to_dict("records")
    assert [line[c] for c in "ABCD"] == ["left", "right", "above", "(below)"]
    (back,) = read_questions(mmstar.BENCHMARK, DataSource(str(tmp_path / "Own.tsv")))
    assert (back.choices, back.answers, back.id) == (question.choices, question.answers, "3")


def test_open_questions_keep_their_prompt_their_golds_and_their_ids(tmp_path: Path) -> None:
    held = [Row({"id": f"a{i}", "question": f"What is written, {i}?", "answer": ["one", "two"],
                 "question_type": "Scene Text-centric VQA", "dataset": "x",
                 "image": {"bytes": png(i)}}, f"t[{i}]") for i in range(2)]
    questions = [q for row in held for q in ocrbench.BENCHMARK.read(row)]
    data = loaded(export_tsv(questions, tmp_path / "Own.tsv"))
    assert "A" not in data and [int(x) for x in data["index"]] == [0, 1]
    assert [ast.literal_eval(x) for x in data["answer"]] == [["one", "two"]] * 2
    back = read_questions(ocrbench.BENCHMARK, DataSource(str(tmp_path / "Own.tsv")))
    assert all(same(a, b) for a, b in zip(questions, back, strict=True))


def test_several_images_keep_their_places(tmp_path: Path) -> None:
    pictures = tuple(ImageRef(image("square", seed), "t") for seed in range(3))
    question = Question("7", (None, "First, then ", None, " or ", None, "?"), pictures, ("1",))
    (line,) = loaded(export_tsv([question], tmp_path / "Own.tsv")).to_dict("records")
    assert line["question"] == "First, then <image 2> or <image 3>?"
    assert [pixels(x) for x in ast.literal_eval(line["image"])] == [
        picture.load().tobytes() for picture in pictures]
    row = Row(line, "t[0]")
    assert [i.load().tobytes() for i in row.images()] == [i.load().tobytes() for i in pictures]


def test_cells_that_pandas_changes_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture = (ImageRef(png(0), "t"),)
    questions = [Question("0", (None, "How many?"), picture, ("A",), ("1", "2")),
                 Question("1", (None, "How many?"), picture, ("A",), ("3", "4", "5"))]
    with caplog.at_level(logging.WARNING):
        export_tsv(questions, tmp_path / "Own.tsv")
    assert "1 cells of column 'C'" in caplog.text and "'5' as '5.0'" in caplog.text


@pytest.mark.parametrize(("change", "message"), [
    ({"images": ()}, "1 of 2 questions have an image"),
    ({"choices": ()}, "1 of 2 questions have options"),
    ({"tags": {"answer": "x"}}, "tag 'answer' cannot be exported"),
    ({"images": (ImageRef(b"no image" * 20, "t"),)}, "question '1': unreadable image"),
])
def test_what_cannot_be_held_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    question = Question("0", (None, "Which?"), (ImageRef(png(0), "t"),), ("A",), ("x", "y"))
    with pytest.raises(TaidError, match=message):
        export_tsv([question, replace(question, id="1", **change)], tmp_path / "Own.tsv")
    assert not list(tmp_path.iterdir())


def test_the_name_and_the_place_are_checked(tmp_path: Path) -> None:
    question = Question("0", ("Which?",), (), ("A",), ("x", "y"))
    with pytest.raises(TaidError, match=r"NAME\.tsv"):
        export_tsv([question], tmp_path / "Own.csv")
    (tmp_path / "file").write_text("")
    with pytest.raises(TaidError, match="is a file"):
        export_tsv([question], tmp_path / "file" / "Own.tsv")
    with pytest.raises(TaidError, match="no questions"):
        export_tsv([], tmp_path / "Own.tsv")
