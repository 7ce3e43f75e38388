"""The shipped data sets are what the generator writes, and what their README says."""

import importlib.util
import io
import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

DATA = Path(__file__).resolve().parents[2] / "data"
SPLITS = {"train": 4000, "eval": 600}


def generator():
    """`data/generate.py` as a module."""
    spec = importlib.util.spec_from_file_location("generate", DATA / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(world: str, split: str) -> list[dict]:
    """The rows of one shipped file."""
    if world == "scenes":
        return pq.read_table(DATA / "scenes" / f"{split}.parquet").to_pylist()
    lines = (DATA / "words" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("world", ["scenes", "words"])
def test_the_columns_are_complete(world, split):
    table = rows(world, split)
    assert len(table) == SPLITS[split]
    for row in table:
        assert len(row["messages"]) == 2 * len(row["categories"])
        assert row["categories"].count("caption") == 1
        assert -math.inf < row["caption_log_probability"] < 0


@pytest.mark.parametrize("split", SPLITS)
def test_images_are_png_of_64_pixels(split):
    for row in rows("scenes", split)[:50]:
        (image,) = row["images"]
        assert image["path"] is None
        picture = Image.open(io.BytesIO(image["bytes"]))
        assert (picture.format, picture.size, picture.mode) == ("PNG", (64, 64), "RGB")


def without_nulls(messages: list[dict]) -> list[dict]:
    """The messages with arrow's null fields taken out."""
    parts = [
        [{k: v for k, v in p.items() if v is not None} for p in m["content"]] for m in messages
    ]
    return [m | {"content": content} for m, content in zip(messages, parts, strict=True)]


@pytest.mark.parametrize("split", SPLITS)
def test_the_generator_writes_what_is_shipped(split):
    module = generator()
    _, seed = module.SPLITS[split]
    for shipped, again in zip(rows("scenes", split), module.scenes_rows(20, seed), strict=False):
        assert without_nulls(shipped["messages"]) == again["messages"]
        assert shipped["categories"] == again["categories"]
    for shipped, again in zip(rows("words", split), module.words_rows(20, seed), strict=False):
        assert shipped == again


def test_the_splits_share_no_drawing():
    train, held_out = ({row["images"][0]["bytes"] for row in rows("scenes", s)} for s in SPLITS)
    assert not train & held_out


def test_the_script_writes_data_models_or_both(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr("worlds.pretrain.train_all", trained.append)
    module = generator()
    monkeypatch.setattr(module, "SPLITS", {"train": (3, 11), "eval": (2, 12)})
    module.main(["--only-models", "--output-dir", str(tmp_path / "models alone")])
    assert not (tmp_path / "models alone").exists()
    module.main(["--output-dir", str(tmp_path / "data")])
    assert trained == [tmp_path / "models alone" / "models"]
    module.main(["--models", "--output-dir", str(tmp_path / "data")])
    assert trained[1:] == [tmp_path / "data" / "models"]
    files = {str(p.relative_to(tmp_path / "data")) for p in (tmp_path / "data").rglob("*.*")}
    assert files == {f"{world}/{split}.{suffix}" for split in SPLITS
                     for world, suffix in (("scenes", "parquet"), ("words", "jsonl"))}
