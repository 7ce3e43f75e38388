"""Data in the hub's columns, whatever file they are in; questions; means with their errors."""

from __future__ import annotations

import base64
import io
import json
import math
import pickle
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader
from zoo.images import images

from taid_vlm.benchmarks.question import (
    Benchmark,
    Judged,
    Question,
    Rule,
    Verdict,
    accuracy,
    groups,
    one_by_one,
)
from taid_vlm.benchmarks.reading import read_questions
from taid_vlm.benchmarks.rows import Row
from taid_vlm.config.data import DataSource
from taid_vlm.errors import RecordError, SampleDropped, TaidError
from taid_vlm.evaluation.statistics import mean_of, mean_of_means


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    images(1, seed=seed)[0].save(buffer, "PNG")
    return buffer.getvalue()


def read(row: Row) -> list[Question]:
    if row.text("question") == "skip me":
        raise SampleDropped("the word skip", row.where)
    return [Question(row.id("index"), (None, row.text("question")), row.images(),
                     row.golds("answer"))]


def same(question: Question, answer: str) -> Verdict:
    return Verdict(float(answer in question.answers), answer or None)


PLAIN = Benchmark("plain", "Plain", read, (Rule("same", 1, one_by_one(same)),))
ROWS = [{"index": str(n), "question": f"What {n}?", "answer": f"thing {n}"} for n in range(4)]


def source_of(path: Path, rows: list[dict], picture: bytes | None = None) -> DataSource:
    """Rows with a picture each, as the file's type has pictures: bytes, base64 or a path."""
    kind = path.suffix.lower()
    if picture is not None:
        (path.parent / "picture.png").write_bytes(picture)
        image = {".parquet": {"bytes": picture, "path": "x.png"}, ".jsonl": "picture.png",
                 ".json": base64.b64encode(picture).decode(),
                 ".tsv": base64.b64encode(picture).decode()}[kind]
        rows = [{"image": image, **row} for row in rows]
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [list(rows[0]), *([str(x) for x in row.values()] for row in rows)]
        path.write_text("".join("\t".join(line) + "\n" for line in lines))
    return DataSource(str(path))


# ----- files --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json", "a.tsv", "a.TSV"])
def test_every_kind_of_file_gives_the_same_questions(tmp_path: Path, name: str) -> None:
    found = read_questions(PLAIN, source_of(tmp_path / name, ROWS, png()))
    assert [(q.id, q.prompt, q.answers) for q in found] == [
        (str(n), (None, f"What {n}?"), (f"thing {n}",)) for n in range(4)]
    for question in found:
        pixels = np.asarray(question.images[0].load())
        assert np.array_equal(pixels, np.asarray(images(1)[0].convert("RGB")))


def test_images_of_a_tsv_shared_by_index(tmp_path: Path) -> None:
    texts = [base64.b64encode(png(seed)).decode() for seed in (1, 2)]
    rows = [{**row, "image": image} for row, image in
            zip(ROWS, ["2", texts[0], texts[1], "1"], strict=True)]
    found = read_questions(PLAIN, source_of(tmp_path / "a.tsv", rows))
    assert [q.images[0].stored() for q in found] == [png(2), png(1), png(2), png(1)]


def test_a_short_text_that_is_no_index_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png())
    found = read_questions(PLAIN, source_of(tmp_path / "a.tsv", [{**ROWS[0], "image": "one.png"}]))
    assert found[0].images[0].value == tmp_path / "one.png"


def test_an_image_that_is_not_there_is_told_when_it_is_looked_at(tmp_path: Path) -> None:
    found = read_questions(PLAIN, source_of(tmp_path / "a.jsonl", [{**ROWS[0], "image": "no.png"}]))
    with pytest.raises(SampleDropped, match=r"unreadable image: a.jsonl:1: .*no.png"):
        found[0].images[0].load()
    long = "no base64 at all " * 500
    found = read_questions(PLAIN, source_of(tmp_path / "a.jsonl", [{**ROWS[0], "image": long}]))
    with pytest.raises(SampleDropped, match="unreadable image"):
        found[0].images[0].load()


@pytest.mark.parametrize("name", ["a.parquet", "a.json", "a.tsv"])
def test_images_stay_in_their_file_until_they_are_looked_at(tmp_path: Path, name: str) -> None:
    """Each is read from its own row, by a worker in another process, too."""
    source = source_of(tmp_path / name, ROWS, png())
    pictures = [base64.b64encode(png(seed)).decode() for seed in range(4)]
    if name != "a.parquet":
        source = source_of(tmp_path / name, [
            {**row, "image": picture} for row, picture in zip(ROWS, pictures, strict=True)])
    found = pickle.loads(pickle.dumps(read_questions(PLAIN, source)))
    for seed, question in enumerate(found):
        assert not isinstance(question.images[0].value, bytes)
        assert question.images[0].stored() == png(0 if name == "a.parquet" else seed)
    loader = DataLoader(found, 1, collate_fn=lambda rows: rows[0].images[0].load().size,
                        num_workers=2)
    assert list(loader) == [images(1)[0].size] * 4


def test_every_image_of_a_row_is_read_from_its_own_place(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "image": [{"bytes": png(2 * n)}, {"bytes": png(2 * n + 1)}]}
            for n in range(2)]
    rows[1]["index"] = "1"
    found = read_questions(PLAIN, source_of(tmp_path / "a.parquet", rows))
    assert [[ref.stored() for ref in q.images] for q in found] == [
        [png(0), png(1)], [png(2), png(3)]]
    written = [{**ROWS[0], "image": repr([base64.b64encode(png(n)).decode() for n in (5, 6)])}]
    found = read_questions(PLAIN, source_of(tmp_path / "a.tsv", written))
    assert [ref.stored() for ref in found[0].images] == [png(5), png(6)]


def test_bytes_that_are_no_image_are_told_when_they_are_looked_at(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "image": {"bytes": b"no image", "path": "x.png"}}]
    found = read_questions(PLAIN, source_of(tmp_path / "a.parquet", rows))
    with pytest.raises(SampleDropped, match=r"a.parquet\[0\]: its bytes are no image"):
        found[0].images[0].load()


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """Questions about 20 MB of pictures, read where nothing of them is kept."""
    rows = [{"index": str(n), "question": "?", "answer": "x",
             "image": {"bytes": random.Random(n).randbytes(400_000), "path": None}}
            for n in range(50)]
    source = source_of(tmp_path / "a.parquet", rows)
    del rows
    read_questions(PLAIN, source)  # the table is prepared once
    tracemalloc.start()
    found = read_questions(PLAIN, source)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 50 and found[49].images[0].stored() == random.Random(49).randbytes(400_000)
    assert kept < 2_000_000 and most < 6_000_000


def test_several_images_in_a_row() -> None:
    row = Row({"image": [{"bytes": png(1)}, png(2)], "image_2": images(1)[0], "empty": None},
              "a[0]")
    found = row.images("image", "nothing", "empty", "image_2")
    assert [ref.value for ref in found[:2]] == [png(1), png(2)] and len(found) == 3
    assert all(ref.load().mode == "RGB" for ref in found)
    with pytest.raises(RecordError, match=r"a\[0\]: image holds no image"):
        Row({"image": {"bytes": None, "path": None}}, "a[0]").image()


def test_ids_must_differ(tmp_path: Path) -> None:
    source = source_of(tmp_path / "a.jsonl", [*ROWS, ROWS[1]])
    with pytest.raises(TaidError, match=r"plain: two .* have the id '1' \(questions 1 and 4, from"):
        read_questions(PLAIN, source)


def test_rows_without_an_id_are_numbered(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "index"} for row in ROWS]
    found = read_questions(PLAIN, source_of(tmp_path / "a.parquet", rows))
    assert [q.id for q in found] == ["0", "1", "2", "3"]
    first = DataSource(str(tmp_path / "a.parquet"), max_records=2)
    assert [q.id for q in read_questions(PLAIN, first)] == ["0", "1"]


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_no_rows_at_all(tmp_path: Path, kind: str) -> None:
    with pytest.raises(TaidError, match=r"plain: '.*a.json(l?)' holds no questions\."):
        read_questions(PLAIN, source_of(tmp_path / f"a{kind}", []))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    source_of(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(TaidError, match=r"does not exist\. Did you mean 'rows.jsonl'"):
        read_questions(PLAIN, DataSource(str(tmp_path / "row.jsonl")))
    with pytest.raises(TaidError, match="cannot be streamed"):
        read_questions(PLAIN, DataSource(str(tmp_path / "rows.jsonl"), streaming=True))


def test_a_relative_path_starts_from_the_base(tmp_path: Path) -> None:
    source_of(tmp_path / "rows.jsonl", ROWS)
    assert len(read_questions(PLAIN, DataSource("rows.jsonl"), tmp_path)) == 4


def test_rows_that_are_left_out_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*ROWS[:2], {"question": "skip me"}, *ROWS[2:], {"question": "skip me"}]
    source = source_of(tmp_path / "a.jsonl", rows)
    left_out = Counter({"before": 1})
    found = read_questions(PLAIN, source, left_out=left_out)
    assert len(found) == 4 and left_out == {"before": 1, "the word skip": 2}
    assert caplog.messages == []
    assert len(read_questions(PLAIN, source)) == 4
    assert caplog.messages == [f"plain: rows of '{source.path}' left out: 2 with the word skip."]


def test_what_only_all_questions_together_tell(tmp_path: Path) -> None:
    backwards = Benchmark("b", "B", read, PLAIN.rules, complete=lambda all_: all_[::-1])
    found = read_questions(backwards, source_of(tmp_path / "a.jsonl", ROWS))
    assert [q.id for q in found] == ["3", "2", "1", "0"]


# ----- columns ------------------------------------------------------------------------------


def test_a_missing_column_is_named_with_its_row_and_the_nearest(tmp_path: Path) -> None:
    rows = [ROWS[0], {"index": "1", "qestion": "?", "answer": "x"}]
    with pytest.raises(RecordError, match=r"a.jsonl:2: column 'question' is missing \(found: "
                                          r"answer, index, qestion\). Did you mean 'qestion'"):
        read_questions(PLAIN, source_of(tmp_path / "a.jsonl", rows))
    with pytest.raises(RecordError, match=r"column 'image' is missing \(found: none\)"):
        Row({}, "a[0]").image()


def test_empty_cells_count_as_absent() -> None:
    row = Row({"a": None, "b": " ", "c": math.nan, "d": 0, "e": False, "f": []}, "a[0]")
    assert list(row) == ["d", "e", "f"] and len(row) == 3
    assert row.text("a", "none") == "none" and row.id("a", "d") == "0"
    with pytest.raises(RecordError, match="'b' is missing"):
        row.text("b")


@pytest.mark.parametrize(("value", "wanted"), [
    (3, 3), ("3", 3), ("3.0", 3), (3.0, 3), (" 7 ", 7), (-2, -2), ("1000241", 1_000_241)])
def test_whole_numbers(value, wanted) -> None:
    assert Row({"x": value}, "a[0]").integer("x") == wanted


@pytest.mark.parametrize("value", ["x", 2.5, "2.5", [1], {"a": 1}, "inf", math.inf, "nan", "1e999"])
def test_what_is_no_whole_number(value) -> None:
    with pytest.raises(RecordError, match=r"a\[0\]: x must be a whole number, got"):
        Row({"x": value}, "a[0]").integer("x")


@pytest.mark.parametrize(("value", "wanted"), [
    (["a", "b"], ["a", "b"]), ("['a', 'b']", ["a", "b"]), ('["a", null]', ["a", "None"]),
    ("a, b", ["a, b"]), ("1,000", ["1,000"]), ("(3, 4)", ["(3, 4)"]),
    ("[not a list", ["[not a list"]),
    (2, ["2"]), ((1, 2), ["1", "2"]), ("[" * 5000, ["[" * 5000]), (None, [])])
def test_lists_of_texts(value, wanted) -> None:
    assert Row({"x": value}, "a[0]").texts("x") == wanted


# ----- questions and figures ----------------------------------------------------------------


def test_a_question_as_a_conversation() -> None:
    image = Row({"image": png()}, "a[0]").image()
    question = Question("q", (None, "What?"), (image,))
    assert [m.role for m in question.record().messages] == ["user"]
    told = question.record("this")
    assert [m.parts for m in told.messages] == [(None, "What?"), ("this",)]
    assert told.images == (image,) and told.source == "q"


def test_accuracy_groups_and_lengths() -> None:
    questions = [Question(str(number), ("?",), answers=("a",), group=group)
                 for number, group in enumerate(["g", "g", ""])]
    verdicts = PLAIN.rules[0].judge(questions, ["a", "b", ""])
    found = [Judged(*each) for each in zip(questions, ["a", "b", ""], verdicts, strict=True)]
    assert groups(found) == ["g", "g", "2"]
    assert accuracy(found)["accuracy"].value == pytest.approx(1 / 3)
    assert [v.read for v in verdicts] == ["a", "b", None]
    with pytest.raises(ValueError, match="zip"):
        PLAIN.rules[0].judge(questions, ["a"])


def naive_cluster_error(scores: list[float], names: list[str]) -> float:
    """The sandwich estimator of a mean, with sums by group and the usual small-sample factor."""
    mean = np.mean(np.array(scores, dtype=np.float64))
    sums = [sum(s - mean for s, n in zip(scores, names, strict=True) if n == name)
            for name in sorted(set(names))]
    count = len(sums)
    return math.sqrt(count / (count - 1) * sum(x * x for x in sums)) / len(scores)


def test_a_mean_and_its_error() -> None:
    draw = random.Random(0)
    scores = [float(draw.random() < 0.4) for _ in range(200)]
    found = mean_of(scores)
    assert found.value == pytest.approx(np.mean(scores)) and found.n == 200
    assert found.stderr == pytest.approx(np.std(scores, ddof=1) / math.sqrt(200))
    names = [str(draw.randrange(30)) for _ in scores]
    assert mean_of(scores, names).stderr == pytest.approx(naive_cluster_error(scores, names))
    twice = mean_of(scores * 2, [str(n) for n in range(200)] * 2)
    assert twice.stderr == pytest.approx(found.stderr)  # the same items again say nothing new


def test_means_of_little() -> None:
    nothing, one = mean_of([]), mean_of([0.5])
    assert math.isnan(nothing.value) and math.isnan(nothing.stderr) and nothing.n == 0
    assert one.value == 0.5 and math.isnan(one.stderr) and one.n == 1
    assert math.isnan(mean_of([0, 1], ["g", "g"]).stderr)
    assert mean_of([1, 1, 1]).stderr == 0


def test_a_mean_of_means() -> None:
    found = mean_of_means([1, 0, 1, 1, 1, 0, 0, 0], list("aabbbbcc"))
    assert found.value == pytest.approx((0.5 + 0.75 + 0) / 3) and found.n == 8
    errors = [np.std(x, ddof=1) / math.sqrt(len(x)) for x in ([1, 0], [1, 1, 1, 0], [0, 0])]
    assert found.stderr == pytest.approx(math.sqrt(sum(e * e for e in errors)) / 3)
    assert mean_of_means([1, 0], ["a", "b"]).value == 0.5
    assert math.isnan(mean_of_means([1, 0], ["a", "b"]).stderr)
    assert math.isnan(mean_of_means([], []).value)
