"""Several sources: how often each row comes, in which order, and that nothing else decides it."""

import json
import time
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import datasets
import numpy as np
import pytest
from torch.utils.data import DataLoader

from taid_vlm.config.data import DataSource, DataSpec
from taid_vlm.config.section import check
from taid_vlm.errors import RecipeError, RecordError, TaidError
from taid_vlm.records import Malformed, Records, fingerprint, open_sources, parts_of
from taid_vlm.records.mix import MixedRecords, names


def write(path, name, number, bad=()):
    lines = [json.dumps({"prompt": f"{name} {n}?", "completion": f"{name}{n}"}) if n not in bad
             else "{" for n in range(number)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def mix(*sources, seed=0, weighted=True):
    listed = [DataSource(**source) for source in sources]
    return open_sources(listed, lambda source: None, "data.train", seed, weighted)


def answers(rows):
    return [row.answers[0] for row in rows]


@pytest.fixture
def paths(tmp_path):
    return [write(tmp_path / "a.jsonl", "a", 10), write(tmp_path / "b.jsonl", "b", 40)]


# ----- sources with a length ----------------------------------------------------------------


def test_an_epoch_is_every_row_of_each(paths):
    mixed = mix({"path": paths[0]}, {"path": paths[1]})
    assert sorted(answers(mixed)) == sorted([f"a{n}" for n in range(10)]
                                            + [f"b{n}" for n in range(40)])
    first = Counter(answer[0] for answer in answers(mixed)[:10])
    assert first == {"a": 2, "b": 8}  # evenly, from the first rows on


@pytest.mark.parametrize(("weights", "lengths"), [
    ((2, 1), (20, 40)), ((0.5, 0.25), (5, 10)), ((2.5, 0.1), (25, 4)), ((0.01, 1), (0, 40)),
])
def test_a_weight_is_how_often_a_row_comes(paths, weights, lengths):
    sources = [{"path": p, "weight": w} for p, w in zip(paths, weights, strict=True)]
    mixed = mix(*sources)
    counts = Counter(answers(mixed))
    assert len(mixed) == sum(lengths)
    for name, length, weight in zip("ab", lengths, weights, strict=True):
        times = [n for answer, n in counts.items() if answer[0] == name]
        assert sum(times) == length
        assert all(int(weight) <= n <= int(weight) + 1 for n in times)


def test_only_the_seed_decides_which_rows_a_fraction_takes(paths):
    sources = [{"path": paths[0]}, {"path": paths[1], "weight": 0.5}]
    one, again, other = (answers(mix(*sources, seed=seed)) for seed in (1, 1, 2))
    assert one == again
    assert sorted(one) != sorted(other)
    assert fingerprint(mix(*sources, seed=1)) == fingerprint(mix(*sources, seed=1))
    assert fingerprint(mix(*sources, seed=1)) != fingerprint(mix(*sources, seed=2))


def test_held_out_sources_stand_one_behind_the_other(paths):
    mixed = mix({"path": paths[0]}, {"path": paths[1], "max_records": 3}, weighted=False)
    assert answers(mixed) == [f"a{n}" for n in range(10)] + ["b0", "b1", "b2"]
    assert mixed.where(11) == "b.jsonl:2"
    with pytest.raises(IndexError):
        mixed[13]


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_know_their_source(tmp_path, workers):
    good = write(tmp_path / "a.jsonl", "a", 6)
    bad = write(tmp_path / "b.jsonl", "b", 600, bad=[590])
    mixed = mix({"path": good}, {"path": bad})
    rows = [row for batch in DataLoader(mixed, 7, collate_fn=list, num_workers=workers)
            for row in batch]
    assert Counter(row.origin for row in rows) == {"a.jsonl": 6, "b.jsonl": 600}
    assert [row.origin for row in rows if isinstance(row, Malformed)] == ["b.jsonl"]


def test_a_million_rows_are_mixed_at_once():
    rows = datasets.Dataset.from_dict({"text": ["a"]})

    class Many:
        def __len__(self):
            return 1_000_000

        def __getitem__(self, index):
            return rows[0]

    part = Records(Many(), DataSource("x"), "x", None)
    started = time.process_time()
    mixed = MixedRecords([part, part], [1, 0.5], 0)
    assert time.process_time() - started < 2
    assert len(mixed) == 1_500_000
    assert mixed._rows.nbytes + mixed._part.nbytes < 20_000_000


# ----- streams ------------------------------------------------------------------------------


def stream(paths, **more):
    return mix({"path": paths[0], "weight": 1}, {"path": paths[1], "weight": 3, "streaming": True},
               **more)


def test_a_stream_is_mixed_by_its_share(paths):
    rows = list(islice(stream(paths), 200))
    assert Counter(row.answers[0][0] for row in rows) == {"a": 50, "b": 150}
    assert Counter(row.answers[0][0] for row in rows[:20]) == {"a": 5, "b": 15}
    streamed = [answer for answer in answers(rows) if answer[0] == "b"]
    assert streamed == [f"b{n % 40}" for n in range(150)]  # it begins again
    passes = np.array([answer for answer in answers(rows) if answer[0] == "a"]).reshape(5, 10)
    assert all(set(one) == {f"a{n}" for n in range(10)} for one in passes)
    assert len({tuple(one) for one in passes}) == 5  # shuffled anew


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_batches_are_the_same_with_any_number_of_workers(paths, tmp_path, kind):
    if kind == "parquet":
        rows = [json.loads(line) for line in Path(paths[1]).read_text().splitlines()]
        paths[1] = str(tmp_path / "b.parquet")
        datasets.Dataset.from_list(rows).to_parquet(paths[1])
    found = []
    for workers in (0, 1, 3):
        mixed = stream(paths, seed=3)
        mixed.block = 4
        loader = DataLoader(mixed, 4, collate_fn=answers, num_workers=workers)
        found.append(list(islice(loader, 30)))
    assert found[0] == found[1] == found[2]


def test_files_in_a_stream_are_the_same_with_any_number_of_workers(paths):
    found = []
    for workers in (0, 2):
        records = mix({"path": paths[1], "streaming": True})
        records.block = 4
        found.append(list(DataLoader(records, 4, collate_fn=answers, num_workers=workers)))
    assert found[0] == found[1]
    assert list(chain(*found[0])) == [f"b{n}" for n in range(40)]


# ----- refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(("sources", "weighted", "message"), [
    ([{"weight": 2}], True, r"data\.train: weight = 2 has no effect on a single source"),
    ([{"weight": 2}, {}], False, r"data\.train: weight = 2 has no effect on held-out records"),
    ([{"streaming": True}, {"weight": 1}], True, r"data\.train\[0\]: .*needs a weight"),
    ([{"weight": 0.01}, {"weight": 0.001}], True, "no source has a row"),
])
def test_weights_without_effect_or_missing(paths, sources, weighted, message):
    sources = [{"path": path, **source} for path, source in zip(paths, sources, strict=False)]
    with pytest.raises(TaidError, match=message):
        mix(*sources, weighted=weighted)


def test_the_source_is_named(paths, tmp_path):
    with pytest.raises(TaidError, match=r"^data\.train\[1\]: '.*b\.jsnol' does not exist\. Did"):
        mix({"path": paths[0]}, {"path": paths[1].replace("jsonl", "jsnol")})
    (tmp_path / "c.jsonl").write_text('{"statement": "a", "reply": "b"}\n')
    with pytest.raises(RecordError, match=r"data\.train\[1\]\.columns: \{prompt: statement, comp"):
        mix({"path": paths[0]}, {"path": str(tmp_path / "c.jsonl")})


@pytest.mark.parametrize(("train", "message"), [
    ([], r"^data\.train = \[\], but it must name at least one source"),
    (["a", {"path": "b", "wieght": 1}], r"^data\.train\[1\] has no key 'wieght'.*'weight'"),
    (["a", {"path": "b", "weight": 0}], r"^data\.train\[1\]\.weight = 0, but it must be a num"),
])
def test_what_is_wrong_in_a_list_is_named(train, message):
    with pytest.raises(RecipeError, match=message):
        check(DataSpec, {"train": train}, at=("data",))


def test_names_of_sources():
    listed = [DataSource(path) for path in ("x/a.jsonl", "x/b.jsonl", "y/a.jsonl", "hub/name")]
    listed += [DataSource("hub/name", name="de"), DataSource("x/b.jsonl")]
    assert names(listed) == ["x/a.jsonl train", "x/b.jsonl train", "y/a.jsonl train", "name",
                             "name de", "x/b.jsonl train (2)"]
    assert parts_of([1]) == [[1]]
