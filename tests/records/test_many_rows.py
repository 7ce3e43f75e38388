"""Data as they grow and break: opening does not grow with them, and a bad row costs one record."""

import builtins
import gzip
import json
import pickle
import random
import subprocess
import sys
import time
import tracemalloc
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
from taid_vlm.errors import RecordError, TaidError
from taid_vlm.io import jsonl
from taid_vlm.io.jsonl import JsonLines, dump_lines, read_lines
from taid_vlm.records import (
    Malformed,
    Record,
    fingerprint,
    first_rows,
    open_records,
    parse_record,
)
from taid_vlm.records.record import attempt
from taid_vlm.records.sources import PROBED_LINES, Records, StreamedRecords


def line(number):
    return json.dumps({"prompt": f"What is {number} plus one?", "completion": f"It is {number}."})


def collator():
    return DistillationCollator(make_adapter(make_tokenizer("llama"), "student"))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """200,000 rows, the last one broken."""
    path = tmp_path_factory.mktemp("many") / "many.jsonl"
    path.write_text("\n".join(map(line, range(199_999))) + '\n{"prompt": "a"\n')
    return path


# ----- a file of many lines -----------------------------------------------------------------


def test_opening_is_one_pass_over_the_bytes(many):
    """0.03 s and 3.4 MB for 200,000 rows where this was written; both bounds are generous."""
    tracemalloc.start()
    records = open_records(str(many))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(records) == 200_000
    assert peak < 40_000_000
    started = time.process_time()
    open_records(str(many))
    assert time.process_time() - started < 1.5


@pytest.fixture(scope="module")
def million(tmp_path_factory):
    """1,000,000 rows as one file, as four, and behind gzip."""
    folder = tmp_path_factory.mktemp("million")
    text = ("\n".join(map(line, range(250_000))) + "\n").encode()
    for number in range(4):
        (folder / f"part-{number}.jsonl").write_bytes(text)
    (folder / "whole.jsonl").write_bytes(text * 4)
    (folder / "whole.jsonl.gz").write_bytes(gzip.compress(text, 1) * 4)
    return folder


START = """
import json, resource, sys, time
import datasets
from taid_vlm.config.data import DataSource
from taid_vlm.records import open_sources

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

for sources in json.loads(sys.argv[1]):
    before, started = peak(), time.process_time()
    records = open_sources([DataSource(**source) for source in sources], lambda source: None, "x")
    print(time.process_time() - started, peak() - before, getattr(records, "__len__", int)())
"""


def test_a_million_rows_start_at_once(million):
    """In a process of their own: 2 s of CPU and 200 MB each (0.01 to 0.32 s where this was
    written)."""
    lengths = {"file": 1_000_000, "pattern": 1_000_000, "gzip": 0, "stream": 0, "mix": 1_125_000,
               "mix with a stream": 0}
    whole, part, parts = ({"path": str(million / name)} for name in (
        "whole.jsonl", "part-0.jsonl", "part-*.jsonl"))
    cases = [[whole], [parts], [{"path": f"{whole['path']}.gz", "streaming": True}],
             [{**parts, "streaming": True}], [whole, {**part, "weight": 0.5}],
             [{**whole, "weight": 1}, {**part, "weight": 2, "streaming": True}]]
    done = subprocess.run([sys.executable, "-c", START, json.dumps(cases)], capture_output=True,
                          text=True, check=True)
    for (name, length), said in zip(lengths.items(), done.stdout.splitlines(), strict=True):
        seconds, memory, rows = map(float, said.split())
        assert rows == length, name
        assert seconds < 2, name
        assert memory < 200_000_000, name


def test_only_the_first_rows_are_parsed_before_training(many, monkeypatch):
    parsed = []
    monkeypatch.setattr(jsonl, "parse_line", lambda text, where: parsed.append(where) or
                        json.loads(text))
    assert not open_records(str(many)).has_images
    assert len(parsed) == PROBED_LINES
    parsed.clear()
    open_records(DataSource(str(many), max_records=7))
    assert len(parsed) == 7


def test_the_file_is_opened_once_and_not_for_every_row(many, monkeypatch):
    opened, plain = [], Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args, **kwargs: opened.append(path) or
                        plain(path, *args, **kwargs))
    monkeypatch.setattr(builtins, "open", lambda *args, **kwargs: pytest.fail("opened again"))
    records = open_records(str(many))
    for index in random.Random(0).sample(range(199_999), 2000):
        assert records[index].answers == [f"It is {index}."]
        assert records[index].source == f"many.jsonl:{index + 1}"
    assert len(opened) == 2  # for the places of the lines, and to read rows at them


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_at_places_of_their_own(tmp_path, context):
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(map(line, range(200))))
    records = open_records(str(path))
    loader = DataLoader(records, 5, shuffle=True, num_workers=2, collate_fn=_answers,
                        multiprocessing_context=context)
    found = [answer for batch in loader for answer in batch]
    assert sorted(found) == sorted((f"It is {n}.", f"a.jsonl:{2 * n + 1}") for n in range(200))


def _answers(rows):
    return [(row.answers[0], row.source) for row in rows]


def test_a_copy_reads_the_same(many):
    again = pickle.loads(pickle.dumps(open_records(str(many))))
    assert again[123_456].answers == ["It is 123456."]


def test_a_bad_line_deep_in_the_file_is_counted(many):
    records = open_records(str(many))
    with pytest.raises(RecordError, match=r"^many\.jsonl:200000: not valid JSON"):
        records[199_999]
    alone = collator()
    (batch,) = DataLoader(records, 3, collate_fn=alone, sampler=[5, 199_999, 199_998])
    assert batch["counts"]["dropped"] == {"malformed record": 1}
    assert batch["counts"]["rows"] == 2
    assert "many.jsonl:200000: not valid JSON" in alone.reported["malformed record"]


DEEP = '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize("text", [DEEP, '{"a": ' * 100_000, "[" * 100_000])
def test_json_that_is_nested_too_deeply(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RecordError, match=r"^a\.json: not valid JSON"):
        open_records(str(tmp_path / "a.json"))
    rows = [*map(line, range(PROBED_LINES)), text, line(7)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    records = open_records(str(tmp_path / "a.jsonl"))
    (batch,) = DataLoader(records, 3, collate_fn=collator(), sampler=[0, 512, 513])
    assert batch["counts"]["dropped"] == {"malformed record": 1}
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(RecordError, match=r"^a\.jsonl:1: not valid JSON"):
        open_records(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("depth", range(100, 1000, 60))
def test_values_that_are_just_not_too_deep_are_shown_cut_short(depth):
    value = json.loads("[" * depth + "]" * depth)
    for row in ({"messages": value}, {"prompt": {"a": value}, "completion": "a"}, {"text": value},
                {"messages": [{"role": "user", "content": value}]}, {"image": value, "text": "a"}):
        with pytest.raises(RecordError) as caught:
            parse_record(row, "a.jsonl:1")
        assert len(str(caught.value)) < 400


# ----- streams ------------------------------------------------------------------------------


def rows_with(bad, number=60, at=50):
    rows = [json.loads(line(n)) for n in range(number)]
    rows[at] = bad
    return rows


def streamed(kind, tmp_path):
    """Row 50 has no question; as one file, or as a folder that `datasets` reads."""
    rows = rows_with({"prompt": None, "completion": "a"})
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        return DataSource(str(tmp_path / "a.parquet"), streaming=True)
    (tmp_path / "train.jsonl").write_text(dump_lines(rows))
    return DataSource(str(tmp_path), streaming=True)


@pytest.mark.parametrize("kind", ["parquet", "folder of jsonl"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_malformed_row_of_a_stream_is_counted(kind, workers, tmp_path):
    records = open_records(streamed(kind, tmp_path))
    rows = list(records)
    assert len(rows) == 60
    assert [isinstance(row, Malformed) for row in rows].index(True) == 50
    assert "[streamed 50]: column 'prompt' is missing" in rows[50].problem
    batches = list(DataLoader(records, 20, collate_fn=collator(), num_workers=workers))
    assert [batch["counts"]["rows"] for batch in batches] == [20, 20, 19]
    assert batches[2]["counts"]["dropped"] == {"malformed record": 1}


def test_a_stream_that_breaks_is_one_message(tmp_path):
    """As a shard that is torn, or a connection that is gone."""
    def rows():
        yield from rows_with({"prompt": "a"}, number=3, at=1)
        raise pa.ArrowInvalid("corrupt page\nand more")

    records = StreamedRecords(rows(), DataSource("a.parquet"), "a.parquet", None)
    found = iter(records)
    assert [isinstance(next(found), Malformed) for _ in range(3)] == [False, True, False]
    with pytest.raises(TaidError, match=r"^data: 'a\.parquet' cannot be loaded: corrupt page$"):
        next(found)


def test_a_stream_without_a_readable_picture_is_refused(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "image": f"{n}.png"} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(TaidError, match=r"no image of .* can be read.*0\.png.*image_root"):
        open_records(DataSource(str(tmp_path / "a.parquet"), streaming=True))


# ----- the first rows of anything -----------------------------------------------------------


def test_first_rows_of_every_kind_of_data_set(tmp_path):
    rows = rows_with({"prompt": "a"}, number=20, at=2)
    (tmp_path / "a.jsonl").write_text(dump_lines(rows))
    lines = JsonLines(tmp_path / "a.jsonl")
    source = DataSource(str(tmp_path / "a.jsonl"))
    for data in (Records(lines, source, "a.jsonl", None), rows, iter(rows),
                 datasets.Dataset.from_list(rows), datasets.Dataset.from_list(
                     rows).to_iterable_dataset()):
        first = list(first_rows(data, 4))
        assert [isinstance(row, Malformed) for row in first] == [False, False, True, False]
        assert [row.answers for row in first if isinstance(row, Record)] == [
            ["It is 0."], ["It is 1."], ["It is 3."]]
    assert len(list(first_rows(rows))) == 20
    assert list(first_rows([])) == []


def test_a_malformed_row_has_a_fingerprint_too(tmp_path):
    rows = rows_with({"prompt": "a"}, number=6, at=2)
    (tmp_path / "a.jsonl").write_text(dump_lines([*rows[:2], *rows[3:]]))
    whole = open_records(str(tmp_path / "a.jsonl"))
    listed = [*first_rows(rows)]
    assert fingerprint(listed) == fingerprint(rows) != fingerprint(whole)


# ----- values that are no record ------------------------------------------------------------


@pytest.mark.parametrize("row", [
    {"text": "It is red \ud83d"}, {"prompt": "\udc00", "completion": "a"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]},
                  {"role": "assistant", "content": "a"}]},
    {"text": "a", "category": "\ud83d"}, {"text": "a", "categories": ["b", "\ud83d"]},
])
def test_half_a_character_is_named(row):
    with pytest.raises(RecordError, match=r"^a\.jsonl:1: .* holds half a character"):
        parse_record(row, "a.jsonl:1")


def test_rows_of_anything_are_records_or_malformed():
    """10,000 rows put together at random: never another error."""
    rng = random.Random(0)
    atoms = [None, True, 0, -1.5, float("nan"), "", "a", "<image>", "\ud83d", b"a", [], {}, "http://a"]
    keys = ["messages", "conversations", "prompt", "completion", "text", "image", "images",
            "category", "categories", "role", "content", "from", "value", "type", "image_url",
            "url", "path", "bytes", "system", "tools", "tool_calls", "function_call", "function",
            "name", "arguments", "parameters", "properties", "weight", "train", "masked",
            "reasoning_content", "tool_call_id", "id"]
    words = ["user", "assistant", "system", "human", "gpt", "image", "text", "tool", "developer",
             "function_call", '{"name": "a"}', "[1]", "{}"]

    def value(depth):
        kind = rng.random()
        if depth == 0 or kind < 0.3:
            return rng.choice([*atoms, *words])
        if kind < 0.6:
            return [value(depth - 1) for _ in range(rng.randint(0, 3))]
        return {rng.choice(keys): value(depth - 1) for _ in range(rng.randint(0, 4))}

    read = 0
    for _ in range(10_000):
        row = {rng.choice(keys): value(3) for _ in range(rng.randint(0, 4))}
        found = attempt(parse_record, row, "row")
        read += isinstance(found, Record)
        if isinstance(found, Malformed):
            assert found.problem.startswith("row: ")
            assert len(found.problem) < 1000
    assert read > 50


# ----- lines in and out ---------------------------------------------------------------------


def test_lines_come_back_as_they_were_written(tmp_path):
    rows = [{"a": "\u2028 ü\n"}, {}, {"b": [1.5, None]}]
    (tmp_path / "a").write_text(dump_lines(rows), encoding="utf-8")
    assert [row for _, row in read_lines(tmp_path / "a")] == rows
    assert [where for where, _ in read_lines(tmp_path / "a")] == [
        f"{tmp_path / 'a'}:{n}" for n in (1, 2, 3)]
    lines = JsonLines(tmp_path / "a")
    assert [lines[i] for i in range(3)] == rows


def test_a_torn_last_line(tmp_path):
    (tmp_path / "a").write_bytes(b'{"a": 1}\n{"a": "\xc3')
    assert [row for _, row in read_lines(tmp_path / "a", torn=True)] == [{"a": 1}]
    with pytest.raises(RecordError, match=r"a:2: not valid JSON"):
        list(read_lines(tmp_path / "a"))
