"""Cells on disk: two large tokenizers are compared once, not in every command.

A file is named by all that its cells follow from, so none is ever out of date; one that is not as
it was written counts as absent, and a folder that cannot be written costs time only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from taid_vlm import __version__
from taid_vlm.adapters import ModelAdapter
from taid_vlm.alignment.cells import ANCHOR, Cells, Glue, Roles, find_cells
from taid_vlm.errors import TaidError
from taid_vlm.io.files import write_bytes
from taid_vlm.io.hashing import sha256

logger = logging.getLogger(__name__)

VERSION = 1  # of `find_cells`; another number whenever it gives other cells
PARTS = ("teacher_token", "student_token", "teacher_cell", "student_cell")


class CellStore:
    """`find_cells` of one pair by way of the user's cache folder."""

    def __init__(self, teacher: ModelAdapter, student: ModelAdapter) -> None:
        self.teacher, self.student = teacher, student

    def find(self, roles: Roles = (), glue: Glue = (b"", b"")) -> Cells:
        """The cells as an earlier call stored them, or found and stored now."""
        folder = cache_folder()
        if folder is None:
            return find_cells(self.teacher, self.student, roles, glue)
        key = sha256([self._tokenizers, repr(([*roles], glue)).encode()])
        path = folder / "cells" / f"{key.hex()}.safetensors"
        cells = _read(path, key)
        if cells is None:
            cells = find_cells(self.teacher, self.student, roles, glue)
            _write(cells, path, key)
        return cells

    @cached_property
    def _tokenizers(self) -> bytes:
        versions = f"{VERSION} {__version__} {tokenizers.__version__}"
        return sha256([versions.encode(), *map(fingerprint, (self.teacher, self.student))])


def cache_folder() -> Path | None:
    """$TAID_VLM_CACHE, or taid-vlm in $XDG_CACHE_HOME or ~/.cache; None for a user without a home.
    """
    if named := os.environ.get("TAID_VLM_CACHE"):
        return Path(named)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "taid-vlm"
    except RuntimeError:
        return None


def fingerprint(model: ModelAdapter) -> bytes:
    """SHA-256 of what a tokenizer's tokens stand for and of all that it splits text by."""
    model.tokenizer(ANCHOR, add_special_tokens=False)  # leaves the backend without padding
    backend, table = model.tokenizer.backend_tokenizer, model.table
    lengths = np.array([-1 if text is None else len(text) for text in table.text])
    named = (len(table), sorted(table.special.items()), sorted(table.added), table.drops_space,
             backend.encode_special_tokens)
    return sha256([sha256([repr(named).encode(), lengths.tobytes(), *filter(None, table.text)]),
                   sha256([backend.to_str().encode()])])


def _read(path: Path, key: bytes) -> Cells | None:
    """What `_write` wrote under this key; None where a file is missing, torn or another's."""
    try:
        if not path.is_file():
            return None
        parts = load(path.read_bytes())
        t, s, t_cell, s_cell = (parts[name] for name in PARTS)
        if parts["digest"].tobytes() != _digest(key, (t, s, t_cell, s_cell)):
            return None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        logger.debug("'%s' is not read: %s", path, error)
        return None
    t, s, t_cell, s_cell = (part.astype(np.int64) for part in (t, s, t_cell, s_cell))
    return Cells((t, s), (t_cell, s_cell))


def _write(cells: Cells, path: Path, key: bytes) -> None:
    parts = [np.ascontiguousarray(part, np.int32) for part in (*cells.token, *cells.cell)]
    digest = np.frombuffer(_digest(key, parts), np.uint8)
    try:
        write_bytes(save({**dict(zip(PARTS, parts, strict=True)), "digest": digest}), path)
    except TaidError as error:  # read-only or full: the next command looks for itself, too
        logger.debug("%s", error)


def _digest(key: bytes, parts: Sequence[NDArray[Any]]) -> bytes:
    return sha256([key, *(part.tobytes() for part in parts)])
