"""Hashes, quiet libraries, and what counts as a number."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from taid_vlm.benchmarks.store import path_hash
from taid_vlm.errors import TaidError, is_number
from taid_vlm.io.hashing import SHORT, file_sha256, folder_sha256, sha256, text_hash
from taid_vlm.io.quiet import quiet


def test_hashes_are_those_of_hashlib(tmp_path: Path) -> None:
    data = os.urandom(3 * 2**20 + 5)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(b"b")
    assert sha256([data[:7], data[7:]]) == hashlib.sha256(data).digest()
    assert file_sha256(tmp_path / "a") == hashlib.sha256(data).digest()
    assert file_sha256(tmp_path / "a", tmp_path / "b") == hashlib.sha256(data + b"b").digest()
    assert text_hash("ü") == hashlib.sha256("ü".encode()).hexdigest()[:SHORT]


def test_a_folders_hash_is_of_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    for name in ("a", "inside/b"):
        (tmp_path / name).write_text(name)

    def found() -> bytes:
        return folder_sha256(tmp_path, tmp_path.rglob("*"))

    before = found()
    assert before == found()
    (tmp_path / "a").rename(tmp_path / "c")
    renamed = found()
    (tmp_path / "c").write_text("b")
    assert len({before, renamed, found()}) == 3


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in ((tmp_path / "pipe", "no regular file"), (tmp_path, "no regular file"),
                         (tmp_path / "none", "No such file")):
        with pytest.raises(TaidError, match=f"'{path}' cannot be read: .*{reason}"):
            file_sha256(path)


def test_quiet_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    loud, other = logging.getLogger("a_library"), logging.getLogger("another")
    loud.setLevel(logging.INFO)

    def speak() -> list[str]:
        caplog.clear()
        for logger in (loud, other):
            logger.warning("careful, %s", logger.name)
        loud.error("broken")
        return [record.getMessage() for record in caplog.records]

    before = speak()
    assert before == ["careful, a_library", "careful, another", "broken"]
    with quiet("a_library"):
        assert speak() == before[1:]
    assert speak() == before
    with contextlib.suppress(KeyError), quiet("a_library", "another"):
        raise KeyError
    assert speak() == before
    assert loud.level == logging.INFO


def test_quiet_warnings() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet(warn=False):
            warnings.warn("inside", stacklevel=1)
        with quiet():
            warnings.warn("shown", stacklevel=1)
        warnings.warn("outside", stacklevel=1)
    assert [str(each.message) for each in caught] == ["shown", "outside"]


@pytest.mark.parametrize(("value", "expected"), [
    (0, True), (-1.5, True), (10**400, False), (True, False), (False, False), (math.nan, False),
    (math.inf, False), ("1", False), (None, False), ([1], False)])
def test_numbers(value: Any, expected: bool) -> None:
    assert is_number(value) is expected


def test_a_path_with_a_null_byte_is_no_file() -> None:
    with pytest.raises(TaidError, match="cannot be read: embedded null byte"):
        file_sha256(Path("a\0b.png"))
    assert path_hash(Path("a\0b.png")) == b"missing"
