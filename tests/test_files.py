"""Files are strict JSON and whole or absent."""

from __future__ import annotations

import io
import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from taid_vlm.errors import TaidError
from taid_vlm.io import files, images
from taid_vlm.runs import machine


def strict(path: Path) -> Any:
    """What a parser that knows no NaN reads."""
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text("utf-8"), parse_constant=refuse)


@pytest.mark.parametrize(("value", "read"), [
    (math.nan, None), (math.inf, None), (-math.inf, None), (0.1, 0.1), (1e-300, 1e-300),
    (True, True), (None, None), (2**60, 2**60), ("数量 naïve", "数量 naïve"),
    ({"a": {"b": [1, math.nan]}}, {"a": {"b": [1, None]}}), ((1, (math.inf,)), [1, [None]]),
    ({1: 2}, {"1": 2}), ({}, {}), ([], []),
])
def test_values(value: Any, read: Any, tmp_path: Path) -> None:
    path = files.write_json({"value": value}, tmp_path / "results.json")
    assert strict(path) == {"value": read}


def test_floats_keep_every_digit(tmp_path: Path) -> None:
    values = [math.pi / 10**k for k in range(20)]
    assert strict(files.write_json(values, tmp_path / "x.json")) == values


def test_characters_stay_readable(tmp_path: Path) -> None:
    path = files.write_json({"category": "数量"}, tmp_path / "results.json")
    assert "数量" in path.read_text("utf-8")
    assert path.read_bytes().endswith(b"}\n")


def test_folders_are_made_and_files_are_for_all_to_read(tmp_path: Path) -> None:
    path = files.write_text("text", tmp_path / "a" / "b" / "file.txt")
    assert path.read_text() == "text"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_new_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = files.write_text("first, and longer", tmp_path / "file.txt")
    files.write_text("second", path)
    assert path.read_text() == "second"


@pytest.mark.parametrize("call", ["replace", "chmod", "fdopen"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    call: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = files.write_text("old", tmp_path / "file.txt")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(os, call, fail)
    told = isinstance(error, OSError)
    with pytest.raises(TaidError if told else type(error)) as caught:
        files.write_text("new", path)
    monkeypatch.undo()
    if told:
        assert str(caught.value) == f"'{path}' could not be written: No space left on device"
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [files.write_text, files.write_json])
def test_a_folder_that_cannot_be_made(write: Callable[[str, Path], Path], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    path = tmp_path / "taken" / "inner" / "file"
    with pytest.raises(TaidError, match=f"'{path}' could not be written: Not a directory"):
        write("text", path)
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_values_that_are_no_json_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        files.write_json({"value": object()}, tmp_path / "results.json")
    assert list(tmp_path.iterdir()) == []


def test_what_can_change_a_figure_is_recorded() -> None:
    found = machine.versions()
    assert {"python", "taid-vlm", "torch", "transformers", "pillow"} <= found.keys()
    assert machine.machine().keys() == {"system", "architecture", "device", "threads"}
    assert machine.peak_memory()["peak_rss_bytes"] > 2**20


@pytest.mark.parametrize(("content", "told"), [
    (None, "No such file"), (b"{", "is not a recipe"), (b"\xff", "is not a recipe")])
def test_json_that_cannot_be_read(content: bytes | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TaidError, match=told) as caught:
        files.read_json(path, "a recipe")
    assert str(caught.value).startswith(f"'{path}' is not a recipe (")


@pytest.mark.parametrize(("size", "limit", "kind", "longest"), [
    ((900, 600), 512, b"\x89PNG", 512), ((40, 30), 512, b"\x89PNG", 40),
    ((900, 600), None, b"\x89PNG", 900)])
def test_images_as_png(
    size: tuple[int, int], limit: int | None, kind: bytes, longest: int
) -> None:
    image = Image.new("RGB", size, "red")
    encoded = images.png(image, limit)
    assert encoded.startswith(kind)
    assert max(Image.open(io.BytesIO(encoded)).size) == longest
    assert image.size == size  # the caller's own is left as it is
