"""Which records these are, whatever file they lie in and wherever their images are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from taid_vlm.errors import RecordError
from taid_vlm.records.record import ImageRef, Record


def fingerprint(records: Sequence[Any]) -> str:
    """First 16 hex digits of the SHA-256 of all texts, roles, categories and images, in order."""
    digest = hashlib.sha256()
    for index in range(len(records)):
        try:
            digest.update(_of_record(records[index]))
        except RecordError:
            digest.update(b"malformed")
    return digest.hexdigest()[:16]


def _of_record(record: Record) -> bytes:
    said = [(message.role, message.parts) for message in record.messages]
    digest = hashlib.sha256(repr((said, record.text, record.categories)).encode())
    for image in record.images:
        digest.update(image_hash(image, _of_file))
    return digest.digest()


def image_hash(image: ImageRef, of_file: Callable[[Path], bytes]) -> bytes:
    """Of what is stored, which need not be decoded; `of_file` says it where that is a path."""
    value = image.stored()
    if isinstance(value, (str, Path)):
        return of_file(Path(value))
    if not isinstance(value, bytes):
        value = repr((value.mode, value.size)).encode() + value.tobytes()
    return hashlib.sha256(value).digest()


def _of_file(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError:
        data = b"unreadable"
    return hashlib.sha256(data).digest()
