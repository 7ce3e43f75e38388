"""SHA-256 of texts, files and folders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from taid_vlm.errors import TaidError

SHORT = 16  # hexadecimal digits of a hash that is shown


def sha256(parts: Iterable[bytes]) -> bytes:
    """Of all parts, one behind the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def text_hash(text: str) -> str:
    """In as many hexadecimal digits as are shown."""
    return sha256([text.encode()]).hex()[:SHORT]


def file_sha256(*paths: Path) -> bytes:
    """Of the files' bytes; raises TaidError.

    Only of regular files: a pipe or a device might never end.
    """
    return sha256(block for path in paths for block in _blocks(path))


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                yield block
    except (OSError, ValueError) as error:  # the latter where the path has a null byte
        reason = getattr(error, "strerror", None) or error
        raise TaidError(f"'{path}' cannot be read: {reason}") from error


def folder_sha256(root: Path, files: Iterable[Path]) -> bytes:
    """Of some files in a folder and their names."""
    return sha256(f"{path.relative_to(root).as_posix()}\0{file_sha256(path).hex()}\n".encode()
                  for path in sorted(path for path in files if path.is_file()))
