"""Which records these are, whatever file they lie in and wherever their images are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
        digest.update(_of_image(image))
    return digest.digest()


def _of_image(image: ImageRef) -> bytes:
    """Of what is stored, which need not be decoded."""
    value = image.stored()
    if not isinstance(value, (bytes, str, Path)):
        value = repr((value.mode, value.size)).encode() + value.tobytes()
    elif not isinstance(value, bytes):
        try:
            value = Path(value).read_bytes()
        except OSError:
            value = b"unreadable"
    return hashlib.sha256(value).digest()
