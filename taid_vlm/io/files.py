"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from taid_vlm.errors import TaidError


def as_json(value: Any) -> str:
    """Strict JSON: NaN and infinity become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False)


def write_json(value: Any, path: Path) -> Path:
    """Write strict JSON so that the file is whole or absent."""
    return write_text(as_json(value) + "\n", path)


def read_json(path: Path, what: str) -> Any:
    """What a JSON file holds; `what` it should be, for the TaidError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TaidError(f"'{path}' is not {what} ({error}).") from None


def write_text(text: str, path: Path) -> Path:
    """Write through a temporary file in the same folder: readers see the old file or the new one.

    Raises:
        TaidError: the folder or the file cannot be written.
    """
    return write_bytes(text.encode(), path)


def write_bytes(content: bytes, path: Path) -> Path:
    """The same for bytes."""
    try:
        return _replace_file(content, path)
    except OSError as error:
        raise TaidError(f"'{path}' could not be written: {error.strerror or error}") from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A hidden file beside `path` to write to, put in its place once all went well.

    Raises:
        TaidError: the folder or the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.chmod(partial, usual_mode())
        os.replace(partial, path)
    except TaidError:
        raise
    except Exception as error:  # libraries have errors of their own for a full disk
        raise TaidError(f"'{path}' could not be written: "
                        f"{getattr(error, 'strerror', None) or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def usual_mode() -> int:
    """Of a new file, as the user's umask has it; temporary files are for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _replace_file(content: bytes, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, usual_mode())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
