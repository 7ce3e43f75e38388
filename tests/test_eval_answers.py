"""eval_answers.jsonl: the same file from any number of processes, small, and whole."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image
from test_evaluation import evaluated, records

from taid_vlm.errors import TaidError
from taid_vlm.evaluation.answers import read_answers, to_lines
from taid_vlm.evaluation.held_out import AnswerTotals, Tally, summarise
from taid_vlm.records import Records, fingerprint, open_records
from taid_vlm.records.record import ImageRef, Record, parse_record


def lines(world: int) -> str:
    merged, data = Tally(), [parse_record(row, f"data.jsonl:{i}")
                             for i, row in enumerate(records())]
    for rank in range(world):
        merged.merge(evaluated(data, batch_size=1, process=(rank, world), keep_answers=True))
    return to_lines(merged.answers, merged.answers)


@pytest.mark.parametrize("world", [2, 3, 20])
def test_processes_write_the_same_file(world: int) -> None:
    assert lines(world) == lines(1)


def test_what_is_read_adds_up_to_the_summary(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(1))
    found, summary = read_answers(tmp_path / "a.jsonl"), summarise(evaluated(records()))
    assert len(found) == summary["n_answers"]
    assert [a.key for a in found] == sorted([a.key for a in found],
                                            key=lambda key: (int(key[0].split(":")[1]), key[1]))
    for name in ("kl", "jsd", "agreement", "nll", "tail_mass"):
        total = math.fsum(a.after[name] or 0 for a in found)
        assert total / sum(a.size(name) for a in found) == pytest.approx(summary[name], rel=1e-6)
    theirs = math.fsum(a.teacher["teacher_nll"] or 0 for a in found)
    assert theirs / summary["n_tokens"] == pytest.approx(summary["teacher_nll"], rel=1e-6)
    assert not any(name.startswith("teacher") for a in found for name in a.after)


def test_figures_that_only_some_tokens_have(tmp_path: Path) -> None:
    before = AnswerTotals("s:1", 0, "", 5, {"nll": 1.0, "kl": math.inf}, {"kl": 3})
    after = AnswerTotals("s:1", 0, "", 5, {"nll": 2.0, "kl": 0.5, "student_rest_mass": 1.0},
                         {"kl": 3, "student_rest_mass": 3})
    (tmp_path / "a").write_text(to_lines([before], [after]))
    line = json.loads((tmp_path / "a").read_text())
    assert line["counts"] == {"kl": 3}
    assert line["before"] == {"nll": 1.0, "kl": None}
    assert line["after"] == {"nll": 2.0, "kl": 0.5}
    answer = read_answers(tmp_path / "a")[0]
    assert [answer.size(name) for name in ("nll", "kl", "chunk_kl")] == [5, 3, 0]


def test_numbers_in_names_are_numbers() -> None:
    found = [AnswerTotals(f"eval-2.jsonl:{i}", 0, "\u2028", 1, {"nll": 1.0}) for i in (10, 9, 1)]
    written = to_lines(found, found)
    assert [json.loads(x)["source"] for x in written.split("\n")[:-1]] == [
        f"eval-2.jsonl:{i}" for i in (1, 9, 10)]


def test_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    """Shards of several folders may share their names, and so the places in them."""
    before, after = ([AnswerTotals("a.jsonl:1", 0, "", 2, {"nll": value}) for value in values]
                     for values in ((1.0, 2.0), (3.0, 4.0)))
    (tmp_path / "a").write_text(to_lines(before, after))
    found = read_answers(tmp_path / "a")
    assert [a.key for a in found] == [("a.jsonl:1", 0, 0), ("a.jsonl:1", 0, 1)]
    assert [(a.before["nll"], a.after["nll"]) for a in found] == [(1.0, 3.0), (2.0, 4.0)]


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"source": "x"}\n')
    with pytest.raises(TaidError, match=r"a:1: no line of eval_answers.jsonl"):
        read_answers(tmp_path / "a")


# ----- which data these were ----------------------------------------------------------------


def opened(path: Path) -> Records:
    found = open_records(str(path))
    assert isinstance(found, Records)
    return found


def test_the_fingerprint_is_of_what_records_hold(tmp_path: Path) -> None:
    """Not of file names, columns, or where images lie; but of every text and image."""
    rows = []
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{number}.png")
        rows.append({"prompt": "<image>what", "completion": colour, "image": f"{number}.png"})
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "elsewhere").mkdir()
    for row in rows:
        (tmp_path / "elsewhere" / row["image"]).write_bytes((tmp_path / row["image"]).read_bytes())
    other = [{"messages": [{"role": "user", "content": row["prompt"]},
                           {"role": "assistant", "content": row["completion"]}],
              "images": [row["image"]]} for row in rows]
    (tmp_path / "elsewhere" / "two.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in other))
    first = fingerprint(opened(tmp_path / "one.jsonl"))
    assert first == fingerprint(opened(tmp_path / "elsewhere" / "two.jsonl"))
    Image.new("RGB", (4, 4), "green").save(tmp_path / "1.png")
    assert fingerprint(opened(tmp_path / "one.jsonl")) != first


def test_the_fingerprint_sees_texts_order_and_turns() -> None:
    texts = [Record("a", text="one"), Record("b", text="two")]
    found = {fingerprint(x) for x in (texts, texts[::-1], texts[:1], [])}
    assert len(found) == 4
    picture = Image.new("L", (2, 2))
    images = [Record("a", text="t", images=(ImageRef(value, "a"),))
              for value in (picture, b"bytes", Path("gone.png"))]
    assert len({fingerprint([record]) for record in images}) == 3
    assert fingerprint([Record("x", text="one")]) == fingerprint([Record("y", text="one")])
