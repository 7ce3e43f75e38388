"""Records as lines that `data.train` reads back as they were, and where their images lie."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from taid_vlm.io.files import write_bytes
from taid_vlm.io.hashing import SHORT, sha256
from taid_vlm.io.images import png
from taid_vlm.records import ImageRef, Message, Record
from taid_vlm.records.videos import LIST_RATE, VideoRef

IMAGES = "images"


@dataclass(frozen=True)
class Files:
    """Where images lie: those of the source's own files stay there and are named by their whole
    path; what lies inside other files is written to `images/`, once for equal bytes.

    copies: files are written there, too, so that the folder needs nothing outside it.
    """

    folder: Path
    copies: bool = False

    def place(self, value: Any) -> str:
        """The path of an image or video, from the folder."""
        if isinstance(value, (str, Path)) and not self.copies:
            return os.path.abspath(value)
        suffix = Path(value).suffix if isinstance(value, (str, Path)) else ""
        data = value if isinstance(value, bytes) else Path(value).read_bytes() if isinstance(
            value, (str, Path)) else png(value, None)
        name = f"{sha256([data]).hex()[:SHORT]}{suffix or _suffix(data)}"
        if not (self.folder / IMAGES / name).exists():
            write_bytes(data, self.folder / IMAGES / name)
        return f"{IMAGES}/{name}"


def _suffix(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return f".{(image.format or 'bin').lower()}"
    except OSError:  # a video
        return ".bin"


def answered(
    record: Record, turn: int, text: str, thought: str = "",
    calls: tuple[Mapping[str, Any], ...] = (),
) -> Record:
    """The record up to its `turn`-th answer and a new one there, the only one that is learned."""
    before, own = record.before(turn), record.messages[len(record.before(turn)) :][:1]
    earlier = [replace(each, weight=0.0) if each.role == "assistant" else each for each in before]
    answer = Message("assistant", (text,) if text else (), own[0].weight if own else 1.0,
                     thought or None, calls)
    category = record.category(turn)
    return replace(record, messages=(*earlier, answer), images=record.images_before(turn),
                   categories=(category,) if category else ())


def row_of(record: Record, files: Files) -> dict[str, Any]:
    """A conversation's columns, which `parse_record` reads as the same record."""
    pictures = iter(record.images)
    row: dict[str, Any] = {
        "messages": [_message(each, pictures, bool(record.images)) for each in record.messages]}
    for column, wanted in (("images", False), ("videos", True)):
        listed = [image for image in record.images if isinstance(image, VideoRef) is wanted]
        row |= {column: [_stored(image, files) for image in listed]} if listed else {}
    row |= {"tools": list(record.tools)} if record.tools else {}
    row |= {"category": record.categories[0]} if record.categories else {}
    return row | ({"teacher": record.teacher} if isinstance(record.teacher, str) else {})


def _message(message: Message, pictures: Iterator[ImageRef], typed: bool) -> dict[str, Any]:
    content: Any = message.text
    if typed or len(message.parts) > 1:
        content = [{"type": "text", "text": part} if part is not None else
                   _part(next(pictures)) for part in message.parts]
    more = {"reasoning_content": message.thought, "tool_calls": list(message.calls),
            "name": message.name, "tool_call_id": message.tool_call_id}
    return {"role": message.role, "content": content,
            **{key: value for key, value in more.items() if value},
            **({"weight": message.weight} if message.weight != 1 else {})}


def _part(image: ImageRef) -> dict[str, Any]:
    return {"type": image.kind, **dict(image.sizes)}


def _stored(image: ImageRef, files: Files) -> Any:
    """An image's path; a video's with how it is shown."""
    value = image.stored()
    if not isinstance(image, VideoRef):
        return files.place(value)
    how = {} if image.sampling is None else image.sampling.model_dump(exclude_none=True)
    if not isinstance(value, tuple):
        shown = {"nframes": how.pop("frames")} if "frames" in how else how
        return {"path": files.place(value), **shown}
    number = {"nframes": len(image.sampling_of(len(value), image.rate or LIST_RATE))} if how else {}
    rate = {} if image.rate is None else {"sample_fps": image.rate}
    return {"frames": [files.place(frame) for frame in value], **number, **rate}
