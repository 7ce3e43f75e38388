"""Which records these are, whatever file they lie in and wherever their images are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from taid_vlm.errors import TaidError
from taid_vlm.io.hashing import SHORT, file_sha256, sha256
from taid_vlm.records.images import ImageRef
from taid_vlm.records.record import Malformed, Record, first_rows
from taid_vlm.records.videos import VideoRef


def fingerprint(records: Sequence[Any]) -> str:
    """First 16 hex digits of the SHA-256 of all texts, roles, categories and images, in order."""
    return sha256(map(record_hash, first_rows(records))).hex()[:SHORT]


def record_hash(
    record: Record | Malformed, of_file: Callable[[Path], bytes] | None = None
) -> bytes:
    """Of one record; `of_file` says it of an image's path."""
    of_file = of_file or _of_file
    if isinstance(record, Malformed):
        return b"malformed"
    messages = [(message.role, message.parts) for message in record.messages]
    more = [(m.weight, m.thought, m.calls, m.name, m.tool_call_id) for m in record.messages]
    plain = all(each == (1.0, None, (), None, None) for each in more) and not record.tools
    texts = repr((messages, record.text, record.categories,
                  *(() if plain else (more, record.tools)))).encode()
    return sha256([texts, *(image_hash(image, of_file) for image in record.images)])


def image_hash(image: ImageRef, of_file: Callable[[Path], bytes]) -> bytes:
    """Of what is stored, which need not be decoded; `of_file` says it where that is a path."""
    value = image.stored()
    frames = value if isinstance(value, tuple) else (value,)
    hashes = [_stored_hash(frame, of_file) for frame in frames]
    shown: list[Any] = [image.sizes] if image.sizes else []
    if isinstance(image, VideoRef):
        shown = [(image.kind, type(value) is tuple, image.rate, repr(image.sampling))]
    return sha256([*hashes, repr(shown).encode()]) if shown else hashes[0]


def _stored_hash(value: Any, of_file: Callable[[Path], bytes]) -> bytes:
    if isinstance(value, (str, Path)):
        return of_file(Path(value))
    if not isinstance(value, bytes):
        value = repr((value.mode, value.size)).encode() + value.tobytes()
    return sha256([value])


def _of_file(path: Path) -> bytes:
    try:
        return file_sha256(path)
    except TaidError:
        return sha256([b"unreadable"])
