"""What `path` may be: patterns, lists, compressed lines, tar, parts of splits; streamed or not."""

import gzip
import io
import json
import tarfile

import datasets
import pyarrow as pa
import pytest
from torch.utils.data import DataLoader
from zoo import make_tokenizer

from taid_vlm.adapters import make_adapter
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.config.data import DataSource
from taid_vlm.errors import RecordError, TaidError
from taid_vlm.records import Malformed, open_records

ROWS = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(10)]
ANSWERS = [f"a{n}" for n in range(10)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(path, text=LINES):
    """Text as the ending says; two members where it is compressed."""
    half = text.index("\n", len(text) // 2) + 1
    halves = [text[:half].encode(), text[half:].encode()]
    if path.suffix == ".gz":
        path.write_bytes(b"".join(map(gzip.compress, halves)))
    elif path.suffix == ".zst":
        path.write_bytes(b"".join(pa.Codec("zstd").compress(x, asbytes=True) for x in halves))
    else:
        path.write_text(text)
    return str(path)


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(path)


def answers(path, **keys):
    return [record.answers[0] for record in open_records(DataSource(path, **keys))]


# ----- several files ------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_patterns_and_lists(tmp_path, streaming):
    for name in ("part-1.jsonl", "part-2.jsonl", "other.jsonl"):
        write(tmp_path / name)
    pattern, single = str(tmp_path / "part-*.jsonl"), str(tmp_path / "other.jsonl")
    assert answers(pattern, streaming=streaming) == ANSWERS * 2
    records = list(open_records(DataSource(path=[pattern, single], streaming=streaming)))
    assert [record.source for record in records[::10]] == [
        "part-1.jsonl:1", "part-2.jsonl:1", "other.jsonl:1"]
    assert answers(pattern, streaming=streaming, max_records=13) == (ANSWERS * 2)[:13]
    with pytest.raises(TaidError, match=r"no-\*\.jsonl' matches no file"):
        open_records(str(tmp_path / "no-*.jsonl"))


def test_files_of_several_kinds_and_folders(folder, png, seen):
    (folder / "deep").mkdir()
    (folder / "deep" / "green.png").write_bytes(png("green"))
    row = {"prompt": "Which?", "completion": "a"}
    one = write(folder / "pictures" / "a.jsonl", json.dumps({**row, "image": "red.png"}) + "\n")
    other = write(folder / "deep" / "a.jsonl", json.dumps({**row, "image": "green.png"}) + "\n")
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "b.parquet")
    records = open_records(DataSource(path=[one, other, str(folder / "b.parquet")]))
    assert [seen(records[n]) for n in range(3)] == [["red"], ["green"], []]
    assert [records[n].source for n in range(3)] == [
        "pictures/a.jsonl:1", "deep/a.jsonl:1", "b.parquet[0]"]
    streamed = list(open_records(DataSource(path=[one, other], streaming=True)))
    assert [seen(record) for record in streamed] == [["red"], ["green"]]


# ----- compressed ---------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_compressed_lines(tmp_path, end, kind, streaming):
    text = LINES if kind == "jsonl" else "prompt,completion\n" + "".join(
        f"{row['prompt']},{row['completion']}\n" for row in ROWS)
    path = write(tmp_path / f"a.{kind}{end}", text)
    records = list(open_records(DataSource(path, streaming=streaming)))
    assert [record.answers[0] for record in records] == ANSWERS
    assert records[9].source == f"a.{kind}{end}" + (":10" if kind == "jsonl" else "[9]")


def test_a_compressed_file_that_has_changed_is_unpacked_anew(tmp_path):
    path = write(tmp_path / "a.jsonl.gz")
    assert answers(path) == ANSWERS
    write(tmp_path / "a.jsonl.gz", LINES + LINES)
    assert answers(path) == ANSWERS * 2


@pytest.mark.parametrize("end", ["gz", "zst"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_torn_compressed_file(tmp_path, end, streaming):
    path = write(tmp_path / f"a.jsonl.{end}")
    (tmp_path / f"a.jsonl.{end}").write_bytes((tmp_path / f"a.jsonl.{end}").read_bytes()[:40])
    with pytest.raises(TaidError, match=rf"'a\.jsonl\.{end}' cannot be unpacked: .*is it whole"):
        list(open_records(DataSource(path, streaming=streaming)))


def test_what_is_not_read_compressed(tmp_path):
    with pytest.raises(TaidError, match=r"only lines are read .*before '\.gz'\); unpack it"):
        open_records(write(tmp_path / "a.json.gz"))


# ----- tar ----------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_samples_of_a_tar(tmp_path, png, seen, streaming):
    typed = [{"type": "image", "image": "4.png"}, {"type": "text", "text": "Which?"}]
    chat = [{"role": "user", "content": typed}, {"role": "assistant", "content": "blue"}]
    path = tar(tmp_path / "a.tar", {
        "x/1.png": png("red"), "x/1.txt": b"red",
        "x/2.json": {"prompt": "Which?", "completion": "green"}, "x/2.png": png("green"),
        "x/3.json": {"prompt": "<image><image>?", "completion": "a",
                     "images": ["3.b.png", "1.png"]},
        "x/3.b.png": png("blue"), "x/4.json": {"messages": chat}, "x/4.png": png("blue"),
        "x/5.json": {"prompt": "?", "completion": "red", "image": "x/1.png"}})
    records = list(open_records(DataSource(path, streaming=streaming)))
    assert [record.answers for record in records] == [["red"], ["green"], ["a"], ["blue"], ["red"]]
    assert [seen(record) for record in records] == [
        ["red"], ["green"], ["blue", "red"], ["blue"], ["red"]]
    assert records[0].source == "a.tar/x/1"
    assert all(record.unread == () for record in records)


def test_a_torn_tar_is_one_message(tmp_path, png):
    path = tar(tmp_path / "a.tar", {"1.png": png("red"), "1.txt": b"red"})
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:600])
    with pytest.raises(TaidError, match=r"'a\.tar' cannot be read as tar"):
        open_records(path)


# ----- parts of splits ----------------------------------------------------------------------


@pytest.mark.parametrize(("split", "expected"), [
    ("train[2:5]", ANSWERS[2:5]), ("train[:20%]", ANSWERS[:2]), ("train[-3:]", ANSWERS[-3:]),
    ("train[:1]+train[8:]", [ANSWERS[0], *ANSWERS[8:]]),
])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder", "saved", "splits"])
def test_a_part_of_a_split(tmp_path, split, expected, kind):
    path, data = tmp_path / f"a.{kind}", datasets.Dataset.from_list(ROWS)
    if kind == "jsonl":
        write(path)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "parquet":
        data.to_parquet(path)
    elif kind == "folder":
        path.mkdir()
        write(path / "train.jsonl")
    elif kind == "saved":
        data.save_to_disk(path)
    else:
        datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(path)
    assert answers(str(path), split=split) == expected


@pytest.mark.parametrize(("keys", "message"), [
    ({"split": "train[2:"}, "cannot be loaded: Unrecognized"), ({"split": "tain[:2]"}, "no effect"),
    ({"split": "train[:2]", "streaming": True}, "takes a part, which a stream does not have"),
])
def test_a_part_that_is_none(tmp_path, keys, message):
    with pytest.raises(TaidError, match=message):
        open_records(DataSource(write(tmp_path / "a.jsonl"), **keys))


def test_files_of_a_folder(tmp_path):
    write(tmp_path / "one.jsonl")
    write(tmp_path / "two.jsonl")
    assert answers(str(tmp_path), data_files="one.jsonl") == ANSWERS
    assert answers(str(tmp_path), data_files=["one.jsonl", "two.jsonl"]) == ANSWERS * 2
    with pytest.raises(TaidError, match=r"no file 'on\.jsonl' \(data_files\)\. Did you mean 'one"):
        open_records(DataSource(str(tmp_path), data_files="on.jsonl"))


def test_a_saved_dataset_is_streamed_in_order(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert answers(str(tmp_path / "saved"), streaming=True) == ANSWERS


# ----- a row that cannot be read ------------------------------------------------------------

MANY = 700  # so that the bad one lies behind those that are checked at the start


def with_bad_row(kind, tmp_path, png):
    """Row 650 is no record."""
    rows = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(MANY)]
    rows[650] = {"prompt": None, "completion": "a"}
    lines = [json.dumps(row) for row in rows]
    path = tmp_path / f"a.{kind}"
    if "jsonl" in kind:
        lines[650] = '{"prompt": "\\ud83d", "completion": "a"}' if kind == "jsonl" else '{"prompt'
        write(path, "\n".join(lines) + "\n")
    elif kind == "json":
        path.write_text(json.dumps([*rows[:650], 3, *rows[651:]]))
    elif kind in ("parquet", "saved"):
        data = datasets.Dataset.from_list(rows)
        data.to_parquet(path) if kind == "parquet" else data.save_to_disk(path)
    elif "csv" in kind:
        cells = [f"{row['prompt'] or ''},{row['completion']}" for row in rows]
        cells[650] = "a,b,c"
        write(path, "\n".join(["prompt,completion", *cells]) + "\n")
    else:
        tar(path, {f"{n:04}.json": row if n != 650 else b"{" for n, row in enumerate(rows)})
    return str(path)


KINDS = [("jsonl", False), ("jsonl", True), ("jsonl.gz", False), ("jsonl.gz", True),
         ("jsonl.zst", True), ("json", False), ("csv", False), ("csv", True), ("csv.gz", True),
         ("parquet", False), ("parquet", True), ("saved", False), ("saved", True), ("tar", False),
         ("tar", True)]


@pytest.mark.parametrize(("kind", "streaming"), KINDS)
def test_a_malformed_row_is_counted_in_the_same_way(kind, streaming, tmp_path, png):
    records = open_records(DataSource(with_bad_row(kind, tmp_path, png), streaming=streaming))
    collator = DistillationCollator(make_adapter(make_tokenizer("llama"), "student"))
    batches = list(DataLoader(records, 100, collate_fn=collator))
    assert [batch["counts"]["rows"] for batch in batches] == [100] * 6 + [99]
    reason = "half a character" if kind == "jsonl" else "malformed record"
    assert batches[6]["counts"]["dropped"] == {reason: 1}
    assert "65" in collator.reported[reason]  # row or line


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_lines_of_a_stream_that_are_not_utf8_are_counted(kind, tmp_path):
    good = b'{"text": "a"}' if kind == "jsonl" else b"a"
    bad = b'{"text": "\xff"}' if kind == "jsonl" else b"\xff"
    lines = [*([] if kind == "jsonl" else [b"text"]), *[good] * 20, bad, good]
    (tmp_path / f"a.{kind}").write_bytes(b"\n".join(lines) + b"\n")
    rows = list(open_records(DataSource(str(tmp_path / f"a.{kind}"), streaming=True)))
    assert [isinstance(row, Malformed) for row in rows] == [False] * 20 + [True, False]


# ----- columns that are not there -----------------------------------------------------------


def test_a_column_that_is_not_there(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", '{"statement": "a", "label": "b"}\n')
    with pytest.raises(RecordError, match=r"^a\.jsonl:1: data\.train\.columns: \{prompt: state\}"
                       r", but there is no column 'state'\. Did you mean 'statement'\? Val"):
        open_records(DataSource(path, columns={"prompt": "state", "completion": "label"}))
    open_records(DataSource(path, columns={
        "prompt": "statement", "completion": "label", "category": "kind"}))
    assert "columns names 'kind', which none of the first 1 rows has" in caplog.text
