"""Files and folders that records come from, and the checks before training."""

import csv
import json
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader
from zoo import make_tokenizer

from taid_vlm.adapters import make_adapter
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.config.data import DataSource
from taid_vlm.errors import RecordError, SampleDropped, TaidError
from taid_vlm.records import Malformed, Record, Records, StreamedRecords, open_records

QA = [{"prompt": f"{n} + 1 = ?", "completion": f"It is {n + 1}."} for n in range(5)]
ANSWERS = [[row["completion"]] for row in QA]
COLOURS = ["red", "green", "blue"]


def write_jsonl(path, rows, blank_before=()):
    lines = []
    for index, row in enumerate(rows):
        if index in blank_before:
            lines += ["", "   "]
        lines.append(row if isinstance(row, str) else json.dumps(row))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def write_table(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def write_any(path, rows):
    if path.suffix in (".jsonl", ".ndjson"):
        return write_jsonl(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
        return str(path)
    return write_table(path, rows)


def answers(records):
    return [record.answers for record in records]


def picture_rows(values, column="image"):
    return [{column: value, "prompt": "Which?", "completion": colour}
            for colour, value in zip(COLOURS, values, strict=True)]


# ----- every kind of file -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.parquet", "a.csv", "a.tsv"])
def test_every_kind_of_file(name, tmp_path):
    records = open_records(write_any(tmp_path / name, QA))
    assert isinstance(records, Records)
    assert len(records) == 5
    assert answers(records) == ANSWERS
    assert answers([records[-1]]) == ANSWERS[-1:]
    assert records[2].source.startswith(name)
    # relative paths start from `base`, where a recipe lies
    assert answers(open_records(name, base=tmp_path)) == ANSWERS
    assert answers(open_records(DataSource(name), base=tmp_path)) == ANSWERS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.csv"])
@pytest.mark.parametrize("limit", [1, 3, 99])
def test_max_records(name, limit, tmp_path):
    source = DataSource(write_any(tmp_path / name, QA), max_records=limit)
    records = open_records(source)
    assert len(records) == min(limit, 5)
    assert answers(records) == ANSWERS[:limit]  # iteration ends there too
    assert answers([records[-1]]) == ANSWERS[:limit][-1:]
    with pytest.raises(IndexError):
        records[len(records)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv"])
def test_columns_are_renamed(name, tmp_path):
    rows = [{"q": row["prompt"], "a": row["completion"], "text": "unused"} for row in QA]
    columns = {"prompt": "q", "completion": "a", "text": "absent"}
    records = open_records(DataSource(write_any(tmp_path / name, rows), columns=columns))
    assert answers(records) == ANSWERS


def test_renamed_column_no_longer_counts_under_its_old_name(tmp_path):
    """Their `text` is our question, so the row is a conversation and no plain text."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "answer": "b"}])
    columns = {"prompt": "text", "completion": "answer"}
    assert answers(open_records(DataSource(path, columns=columns))) == [["b"]]


def test_swapped_columns(tmp_path):
    swapped = DataSource(write_any(tmp_path / "a.jsonl", QA),
                         columns={"prompt": "completion", "completion": "prompt"})
    assert open_records(swapped)[0].answers == ["0 + 1 = ?"]


def test_json_lines_may_differ_in_their_columns(tmp_path):
    """The reason for a reader of our own: `datasets` wants one schema for all lines."""
    rows = [{"text": "plain"}, {"messages": [{"role": "user", "content": "a"},
                                             {"role": "assistant", "content": "b"}]},
            {"prompt": "c", "completion": "d", "extra": {"deep": [1]}},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "e"}]},
                          {"role": "assistant", "content": "f"}], "category": 3}]
    records = open_records(write_jsonl(tmp_path / "a.jsonl", rows))
    assert records[0].text == "plain"
    assert answers(records)[1:] == [["b"], ["d"], ["f"]]


def test_json_lines_in_other_scripts_and_with_windows_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("日本語", "ελληνικά", "é")]
    path.write_bytes("\r\n".join(lines).encode())  # and none after the last line
    assert [record.text for record in open_records(str(path))] == ["日本語", "ελληνικά", "é"]


# ----- line numbers -------------------------------------------------------------------------


def test_lines_are_counted_with_the_blank_ones(tmp_path):
    records = open_records(write_jsonl(tmp_path / "a.jsonl", QA, blank_before=(0, 2)))
    assert len(records) == 5
    assert [record.source for record in records] == [f"a.jsonl:{n}" for n in (3, 4, 7, 8, 9)]
    assert answers(records) == ANSWERS


@pytest.mark.parametrize(("bad", "message"), [
    ('{"prompt": "a", ', "not valid JSON"),
    ("[1, 2]", r"must be an object \{\.\.\.\}"),
    ('{"prompt": "a"}', r"'completion' is missing \(found: prompt\)"),
    ('{"statement": "a", "reply": "b"}', r"'messages' is missing \(found: reply, statement\)"),
    ('{"messages": [{"role": "usr", "content": "a"}]}', "role = 'usr'. Did you mean 'user'"),
])
def test_the_last_bad_line_is_found_before_training(bad, message, tmp_path):
    rows = [*QA * 80, bad]  # more lines than are probed in other files
    path = write_jsonl(tmp_path / "train.jsonl", rows, blank_before=(0, 4))
    with pytest.raises(RecordError, match=f"^train.jsonl:405: .*{message}"):
        open_records(path)


def test_bad_line_beyond_max_records_does_no_harm(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*QA, "{"])
    assert len(open_records(DataSource(path, max_records=5))) == 5


def test_line_that_is_not_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(RecordError, match=r"^a\.jsonl:2: not valid JSON"):
        open_records(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(("content", "message"), [
    ("[{", "not valid JSON"), ('{\n "text": "a"', "not valid JSON"),
    ('[{"text": "a"}]\n[{"text": "b"}]', "not valid JSON: Extra data"),
    ('{"text": "a"}', "must hold a list of objects"), ('["a"]', "must hold a list of objects"),
    ("", "not valid JSON"),
])
def test_malformed_json(content, message, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(RecordError, match=f"^a.json: {message}"):
        open_records(str(tmp_path / "a.json"))


def test_json_lines_may_be_called_json(tmp_path):
    """As POPE's question files are."""
    (tmp_path / "a.json").write_text("\n".join(["", *map(json.dumps, QA)]) + "\n")
    assert answers(open_records(str(tmp_path / "a.json"))) == ANSWERS
    (tmp_path / "b.json").write_text('{"text": "a"}\n{"text": "b"\n')
    with pytest.raises(RecordError, match=r"^b\.json:2: not valid JSON"):
        open_records(str(tmp_path / "b.json"))


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_missing_columns_in_tables(name, tmp_path):
    path = write_table(tmp_path / name, [{"statement": "a", "reply": "b"}])
    with pytest.raises(RecordError, match=rf"^{name}\[0\]: .*\(found: reply, statement\)"):
        open_records(path)


# ----- images -------------------------------------------------------------------------------


def test_pictures_beside_json_lines(folder, seen):
    rows = picture_rows([f"pictures/{colour}.png" for colour in COLOURS])
    records = open_records(write_jsonl(folder / "a.jsonl", rows))
    assert [seen(record) for record in records] == [[colour] for colour in COLOURS]


def test_image_root(folder, tmp_path_factory, seen):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = write_jsonl(elsewhere / "a.jsonl", picture_rows([f"{c}.png" for c in COLOURS]))
    records = open_records(DataSource(path, image_root=str(folder / "pictures")))
    assert [seen(record) for record in records] == [[colour] for colour in COLOURS]


def test_pictures_named_in_a_table(folder, seen):
    path = write_table(folder / "a.csv", picture_rows([f"pictures/{c}.png" for c in COLOURS]))
    assert [seen(record) for record in open_records(path)] == [[colour] for colour in COLOURS]


def image_table(kind, png):
    """The three ways pictures lie in Parquet files."""
    encoded = [png(colour) for colour in COLOURS]
    if kind == "bytes":
        return datasets.Dataset.from_list(picture_rows(encoded))
    structs = [{"bytes": value, "path": f"{n}.png"} for n, value in enumerate(encoded)]
    if kind == "structs":
        return datasets.Dataset.from_list(picture_rows(structs))
    if kind == "image":
        return datasets.Dataset.from_list(picture_rows(structs)).cast_column(
            "image", datasets.Image())
    return datasets.Dataset.from_list(picture_rows([[value] for value in structs], "images")
                                      ).cast_column("images", datasets.List(datasets.Image()))


@pytest.mark.parametrize("kind", ["bytes", "structs", "image", "images"])
@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_inside_parquet(kind, streaming, tmp_path, png, seen):
    path = tmp_path / "a.parquet"
    image_table(kind, png).to_parquet(path)
    records = open_records(DataSource(str(path), streaming=streaming))
    assert [seen(record) for record in records] == [[colour] for colour in COLOURS]
    assert all(isinstance(record.images[0].value, bytes) for record in records)  # not decoded


def test_typed_parts_through_parquet(tmp_path, png, seen):
    """Arrow gives every part every key, and None where a part has none."""
    question = [{"type": "text", "text": "Which?", "image": None},
                {"type": "image", "text": None, "image": png("blue")}]
    answer = [{"type": "text", "text": "blue", "image": None}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    [record] = open_records(write_table(tmp_path / "a.parquet", [{"messages": messages}]))
    assert record.messages[0].parts == ("Which?", None)
    assert record.answers == ["blue"]
    assert seen(record) == ["blue"]


@pytest.mark.parametrize("streaming", [False, True])
def test_one_broken_picture_costs_one_record(streaming, tmp_path, png, seen):
    structs = [{"bytes": b"broken", "path": None}, {"bytes": png("green"), "path": None},
               {"bytes": png("blue"), "path": None}]
    table = datasets.Dataset.from_list(picture_rows(structs))
    table.cast_column("image", datasets.Image(decode=False)).to_parquet(tmp_path / "a.parquet")
    first, *others = open_records(DataSource(str(tmp_path / "a.parquet"), streaming=streaming))
    with pytest.raises(SampleDropped, match=r"unreadable image: a.parquet\[.*0\]"):
        first.images[0].load()
    assert [seen(record) for record in others] == [["green"], ["blue"]]


def test_one_missing_picture_costs_one_record(folder):
    rows = picture_rows(["pictures/red.png", "pictures/lost.png", "pictures/blue.png"])
    records = open_records(write_jsonl(folder / "a.jsonl", rows))
    with pytest.raises(SampleDropped, match=r"a.jsonl:2: .*lost\.png"):
        records[1].images[0].load()


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_no_readable_picture_at_all_is_an_error(name, tmp_path):
    path = write_any(tmp_path / name, picture_rows(["x.png", "y.png", "z.png"]))
    with pytest.raises(TaidError, match=r"no image of .* can be read.*x\.png.*image_root"):
        open_records(path)


# ----- folders ------------------------------------------------------------------------------


def test_image_folder_with_metadata(folder, seen):
    rows = [{"file_name": f"{colour}.png", "text": f"All {colour}."} for colour in COLOURS]
    write_jsonl(folder / "pictures" / "metadata.jsonl", rows, blank_before=(1,))
    records = open_records(str(folder / "pictures"))
    assert [seen(record) for record in records] == [[colour] for colour in COLOURS]
    assert answers(records) == [[f"All {colour}."] for colour in COLOURS]
    assert records[1].source == "pictures/metadata.jsonl:4"
    source = DataSource(str(folder / "pictures"), columns={"text": "text"}, max_records=2)
    assert len(open_records(source)) == 2


def test_folder_with_metadata_of_conversations(folder, seen):
    row = {"file_name": "red.png", "question": "Which?", "answer": "red"}
    write_jsonl(folder / "pictures" / "metadata.jsonl", [row])
    columns = {"prompt": "question", "completion": "answer"}
    [record] = open_records(DataSource(str(folder / "pictures"), columns=columns))
    assert seen(record) == ["red"]
    assert record.answers == ["red"]


def test_saved_dataset(tmp_path, png, seen):
    image_table("image", png).save_to_disk(tmp_path / "saved")
    records = open_records(str(tmp_path / "saved"))
    assert [seen(record) for record in records] == [[colour] for colour in COLOURS]


def test_saved_splits(tmp_path):
    splits = {"train": datasets.Dataset.from_list(QA), "test": datasets.Dataset.from_list(QA[3:])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert len(open_records(str(tmp_path / "saved"))) == 5
    source = DataSource(str(tmp_path / "saved"), split="test", max_records=1)
    assert answers(open_records(source)) == ANSWERS[3:4]


@pytest.mark.parametrize("kind", [".parquet", ".jsonl", ".csv"])
def test_folder_of_data_files(kind, tmp_path):
    write_any(tmp_path / f"train{kind}", QA)
    write_any(tmp_path / f"test{kind}", QA[:2])
    assert answers(open_records(str(tmp_path))) == ANSWERS
    assert answers(open_records(DataSource(str(tmp_path), split="test"))) == ANSWERS[:2]


def test_folder_with_nothing_known_in_it(folder):
    with pytest.raises(TaidError, match=r"pictures: a folder needs metadata\.jsonl"):
        open_records(str(folder / "pictures"))


def test_the_working_directory_has_to_hold_data_of_its_own(tmp_path, monkeypatch):
    """Everything below it would be read: a home directory holds millions of files."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    (project / "data").mkdir()
    write_jsonl(project / "data" / "train.jsonl", QA)
    monkeypatch.setattr(Path, "rglob", None)
    for path in (".", "..", str(project)):
        with pytest.raises(TaidError, match=r"a folder needs metadata\.jsonl"):
            open_records(path)
    assert answers(open_records("data")) == ANSWERS


@pytest.mark.parametrize("inside", ["data", "default/train"])
def test_folders_laid_out_as_on_the_hub(inside, tmp_path):
    (tmp_path / "set" / inside).mkdir(parents=True)
    write_any(tmp_path / "set" / inside / "train.parquet", QA)
    assert answers(open_records(str(tmp_path / "set"))) == ANSWERS


# ----- streams ------------------------------------------------------------------------------


def test_streamed_records(tmp_path):
    path = write_table(tmp_path / "a.parquet", QA)
    records = open_records(DataSource(path, streaming=True))
    assert isinstance(records, StreamedRecords)
    assert answers(records) == ANSWERS == answers(records)  # it can be read again
    assert next(islice(records, 3, None)).source == "a.parquet[streamed 3]"
    assert answers(open_records(DataSource(path, streaming=True, max_records=2))) == ANSWERS[:2]


def test_stream_with_wrong_columns(tmp_path):
    path = write_table(tmp_path / "a.parquet", [{"statement": "a", "reply": "b"}])
    with pytest.raises(RecordError, match=r"\[streamed 0\]: .*\(found: reply, statement\)"):
        open_records(DataSource(path, streaming=True))
    columns = {"prompt": "statement", "completion": "reply"}
    assert answers(open_records(DataSource(path, streaming=True, columns=columns))) == [["b"]]


# ----- nothing there ------------------------------------------------------------------------


def test_wrong_path_names_its_nearest_sibling(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", QA)
    write_jsonl(tmp_path / "other.jsonl", QA)
    with pytest.raises(TaidError, match=r"trian\.jsonl' does not exist\. Did you mean 'train\.js"):
        open_records(str(tmp_path / "trian.jsonl"))
    with pytest.raises(TaidError, match=r"Did you mean 'train\.jsonl'"):
        open_records("trian.jsonl", base=tmp_path)


def test_wrong_folder_is_named(tmp_path):
    with pytest.raises(TaidError, match=r"does not exist\. No folder .*nowhere"):
        open_records(str(tmp_path / "nowhere" / "train.jsonl"))


def test_unknown_name_on_the_hub_is_one_message():
    with pytest.raises(TaidError, match=r"'nobody/nothing' cannot be loaded: .*There is no file or "
                                        r"folder 'nobody/nothing' here"):
        open_records("nobody/nothing")


@pytest.mark.parametrize(("name", "hint"), [
    ("a.jsn", "Did you mean '.json'"), ("a.parqet", "Did you mean '.parquet'"),
    ("a.xlsx", r"Valid: \.csv, \.json"), ("noending", r"Valid: \.csv, \.json"),
])
def test_unknown_kind_of_file(name, hint, tmp_path):
    (tmp_path / name).write_text("a")
    with pytest.raises(TaidError, match=f"is not supported.*{hint}"):
        open_records(str(tmp_path / name))


@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl", ""), ("a.jsonl", "\n \n\n"), ("a.json", "[]"),
])
def test_empty_file(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(TaidError, match="holds no records"):
        open_records(str(tmp_path / name))


def test_no_records_asked_for(tmp_path):
    path = write_table(tmp_path / "a.parquet", QA)
    for streaming in (False, True):
        with pytest.raises(TaidError, match="max_records = 0, but it must be at least 1"):
            open_records(DataSource(path, max_records=0, streaming=streaming))


@pytest.mark.parametrize(("name", "content"), [
    ("a.parquet", ""), ("a.parquet", "not parquet"),
])
def test_unreadable_table_is_one_message(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(TaidError, match=f"'{name}' cannot be loaded: .+"):
        open_records(str(tmp_path / name))


@pytest.mark.parametrize("content", ["", "prompt,completion\n"])
def test_empty_csv_is_one_message(content, tmp_path):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(TaidError, match="holds no records"):
        open_records(str(tmp_path / "a.csv"))


def test_csv_cells_stay_text(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\n1+1?,2\nWhich?,None\n")
    records = open_records(str(tmp_path / "a.csv"))
    assert [record.answers for record in records] == [["2"], ["None"]]


def test_saved_dataset_without_the_split_names_the_others(tmp_path):
    parts = datasets.DatasetDict({"test": datasets.Dataset.from_list([{"text": "a"}])})
    parts.save_to_disk(tmp_path / "d")
    with pytest.raises(TaidError, match=r"no split 'train'.*test"):
        open_records(str(tmp_path / "d"))


def test_image_root_starts_where_the_path_starts(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    records = open_records(DataSource("a.jsonl", image_root="pics"), base=tmp_path)
    assert records.root == tmp_path / "pics"


def test_a_malformed_row_deep_in_a_table_is_counted_and_not_fatal(tmp_path):
    """Only the first rows are checked when a table is opened."""
    rows = [{"prompt": "a", "completion": "b"} for _ in range(300)]
    rows[290]["prompt"] = None
    records = open_records(write_table(tmp_path / "deep.parquet", rows))
    with pytest.raises(RecordError, match="290"):
        records[290]
    good, bad = records.__getitems__([289, 290])
    assert isinstance(good, Record) and isinstance(bad, Malformed)
    assert "290" in bad.problem
    collator = DistillationCollator(make_adapter(make_tokenizer("llama"), "student"))
    (batch,) = DataLoader(records, 2, collate_fn=collator, sampler=[290, 289])
    assert batch["counts"]["dropped"] == {"malformed record": 1}
    assert batch["counts"]["rows"] == 1


# ----- what has no effect -------------------------------------------------------------------


@pytest.mark.parametrize("key", [{"split": "test"}, {"name": "b"}, {"revision": "main"},
                                 {"data_files": "b.csv"}])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_file_has_no_splits(key, kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    path.write_text('{"prompt": "a", "completion": "b"}\n' if kind == "jsonl"
                    else "prompt,completion\na,b\n")
    assert len(open_records(DataSource(str(path), split="train"))) == 1
    with pytest.raises(TaidError, match=rf"{next(iter(key))} = .* has no effect .*take it out"):
        open_records(DataSource(str(path), **key))
