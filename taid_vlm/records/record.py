"""One record: a conversation (with images) or a plain text, whatever columns it came in.

Columns understood, with `image` or `images` (path, bytes, {"bytes", "path"} or PIL image) and
`video` or `videos` (file, bytes or list of frames) beside:
- `messages`: [{"role", "content"}], content a string with `<image>` and `<video>` tags or typed
  parts;
- `prompt` and `completion`: strings, or lists of messages;
- `conversations`: LLaVA's [{"from": "human" | "gpt", "value"}];
- `text`: plain text for pre-training, or a caption where an image stands beside it.
Optional: `category` (a string) or `categories` (one per assistant turn), for evaluation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from taid_vlm.config.data import VideoSpec
from taid_vlm.errors import RecordError, nearest
from taid_vlm.records.images import MAX_PIXELS, ImageRef
from taid_vlm.records.pictures import (
    Pictures,
    image_column,
    kind_of,
    settled,
    split_tags,
    video_column,
)

IMAGE_TAG = "<image>"
CHAT_COLUMNS = ("messages", "conversations", "prompt", "completion")
ROLES = {role: role for role in ("system", "user", "assistant")}
_LLAVA_ROLES = {"human": "user", "gpt": "assistant", **ROLES}


@dataclass(frozen=True)
class Malformed:
    """Stands for a row that is no record; `problem` names file and line."""

    problem: str


@dataclass(frozen=True)
class Message:
    """One turn; `parts` are texts, and None where an image or a video stands."""

    role: str
    parts: tuple[str | None, ...]

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if part is not None)


@dataclass(frozen=True)
class Record:
    """A conversation with its images and videos in order of appearance, or (without messages) a
    text."""

    source: str
    messages: tuple[Message, ...] = ()
    images: tuple[ImageRef, ...] = ()
    text: str | None = None
    categories: tuple[str, ...] = ()

    @property
    def answers(self) -> list[str]:
        """The assistant's texts."""
        return [message.text.strip() for message in self.messages if message.role == "assistant"]

    def before(self, turn: int) -> list[Message]:
        """The messages that stand before the `turn`-th assistant answer."""
        answers = [i for i, message in enumerate(self.messages) if message.role == "assistant"]
        return list(self.messages[: answers[turn]] if turn < len(answers) else self.messages)

    def question(self, turn: int) -> str:
        """The user's last words before the `turn`-th assistant answer."""
        questions = [message for message in self.before(turn) if message.role == "user"]
        return questions[-1].text.strip() if questions else ""

    def category(self, turn: int) -> str:
        """Category of the `turn`-th assistant answer, "" where none is known."""
        if not self.categories:
            return ""
        return self.categories[min(turn, len(self.categories) - 1)]


def parse_record(
    row: Mapping[str, Any], source: str, root: Path | None = None, max_pixels: int = MAX_PIXELS,
    video: VideoSpec | None = None,
) -> Record:
    """Read one row.

    Args:
        row: column -> value; columns that are None count as absent.
        source: what error messages call the row, for example "train.jsonl:12".
        root: folder that relative image paths start from.
        max_pixels: of an image; larger ones are not decoded.
        video: which frames of videos are shown, where they do not say it themselves.

    Raises:
        RecordError: columns or values that cannot be understood.
    """
    row = {key: value for key, value in row.items() if value is not None}
    images, videos = image_column(row, source, root), video_column(row, source, root)
    categories = _categories(row, source)
    if "text" in row and not images + videos and not any(column in row for column in CHAT_COLUMNS):
        text = _expect_str(row["text"], "text", source)
        return Record(source, text=text, categories=categories)
    messages, images = _resolve_images(
        _read_messages(row, source), images, videos, source, root)
    images = [settled(image, max_pixels, video) for image in images]
    return Record(source, messages, tuple(images), categories=categories)


def attempt(read: Callable[..., Record], *args: Any) -> Record | Malformed:
    """What `read` gives, or what takes the place of a row that is no record."""
    try:
        return read(*args)
    except RecordError as problem:
        return Malformed(str(problem))


def first_rows(data: Any, number: int | None = None) -> Iterator[Record | Malformed]:
    """The first (or all) rows of any data set, with a length or streamed, of records or columns."""
    rows = (attempt(data.__getitem__, i) for i in range(len(data))) \
        if hasattr(data, "__len__") else data
    for index, row in enumerate(itertools.islice(rows, number)):
        known = isinstance(row, (Record, Malformed))
        yield row if known else attempt(parse_record, row, f"row {index}")


# ----- texts --------------------------------------------------------------------------------

RawMessage = tuple[str, Any]  # role, content as it came


def _read_messages(row: Mapping[str, Any], source: str) -> list[RawMessage]:
    if "messages" in row:
        return _chat(row["messages"], "messages", source)
    if "conversations" in row:
        return _chat(row["conversations"], "conversations", source, ("from", "value"), _LLAVA_ROLES)
    if "prompt" in row or "completion" in row:
        for column in ("prompt", "completion"):
            if column not in row:
                raise _missing(column, row, source)
        return [*_side(row["prompt"], "prompt", "user", source),
                *_side(row["completion"], "completion", "assistant", source)]
    if "text" in row:  # with an image beside it: a caption
        return [("user", ""), ("assistant", _expect_str(row["text"], "text", source))]
    raise _missing("messages", row, source)


def _missing(column: str, row: Mapping[str, Any], source: str) -> RecordError:
    found = ", ".join(sorted(row)) or "none"
    return RecordError(
        f"{source}: column '{column}' is missing (found: {found}). A record needs 'messages', "
        "'prompt' and 'completion', 'conversations' or 'text'; rename columns with data.columns."
    )


def _side(value: Any, column: str, role: str, source: str) -> list[RawMessage]:
    if isinstance(value, str):
        return [(role, value)]
    if not isinstance(value, Sequence):
        raise RecordError(f"{source}: {column} must be text or a list of messages, got "
                          f"{shown(value)}.")
    return _chat(value, column, source)


def _chat(
    value: Any, column: str, source: str, keys: tuple[str, str] = ("role", "content"),
    roles: Mapping[str, str] = ROLES,
) -> list[RawMessage]:
    messages: list[RawMessage] = []
    for index, item in enumerate(_expect_list(value, column, source)):
        where = f"{column}[{index}]"
        if not isinstance(item, Mapping) or not all(key in item for key in keys):
            raise RecordError(f"{source}: {where} must hold '{keys[0]}' and '{keys[1]}', got "
                              f"{shown(item)}.")
        role = str(item[keys[0]])
        if role not in roles:
            raise RecordError(f"{source}: {where}.{keys[0]} = '{role}'.{nearest(role, roles)}")
        messages.append((roles[role], item[keys[1]]))
    return messages


def _categories(row: Mapping[str, Any], source: str) -> tuple[str, ...]:
    listed = row.get("categories", [row["category"]] if "category" in row else [])
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    return tuple(_expect_str(str(category), "a category", source) for category in listed)


def _expect_str(value: Any, where: str, source: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{source}: {where} must be text, got {type(value).__name__}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{source}: {where} holds half a character: {error}.") from None
    return value


def _expect_list(value: Any, where: str, source: str) -> Sequence[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence) or not value:
        raise RecordError(f"{source}: {where} must be a non-empty list, got "
                          f"{shown(value)}.")
    return value


# ----- images -------------------------------------------------------------------------------


def _resolve_images(
    raw: list[RawMessage], images: list[ImageRef], videos: list[ImageRef], source: str,
    root: Path | None,
) -> tuple[tuple[Message, ...], list[ImageRef]]:
    """Split content into parts and bring the images into the order in which they appear."""
    pictures = Pictures.of(images, videos, source, root)
    messages: list[Message] = []
    typed = any(kind_of(part) for _, content in raw for part in _as_parts(content))
    for role, content in raw:
        parts: list[str | None] = []
        for part in _as_parts(content):
            if kind_of(part):
                pictures.take_part(part, role)
                parts.append(None)
            else:
                text = _part_text(part, role, source)
                parts += [text] if typed else split_tags(text, pictures)
        if role == "assistant" and None in parts:
            raise RecordError(f"{source}: an image stands in an assistant's message, but models "
                              "answer with text; move it into the user's.")
        messages.append(Message(role, tuple(part for part in parts if part != "")))
    unmarked = pictures.unmarked()
    if not unmarked:
        return tuple(messages), pictures.taken
    return _open_with_images(messages, pictures.taken, unmarked, source)


def _as_parts(content: Any) -> Sequence[Any]:
    return content if isinstance(content, (list, tuple)) else [content]


def _part_text(part: Any, role: str, source: str) -> str:
    if part is None:
        return ""
    if isinstance(part, Mapping):
        if part.get("type") != "text":
            raise RecordError(f"{source}: content part of type '{part.get('type')}' in a {role} "
                              "message; only 'text', 'image' and 'video' are supported.")
        part = part.get("text")
    return _expect_str(part, f"the {role} message", source)


def _open_with_images(
    messages: list[Message], taken: list[ImageRef], unmarked: list[ImageRef], source: str
) -> tuple[tuple[Message, ...], list[ImageRef]]:
    """Images without a mark in the text open the first question."""
    before = 0
    for index, message in enumerate(messages):
        if message.role == "user":
            opened = Message("user", (*(None for _ in unmarked), *message.parts))
            return ((*messages[:index], opened, *messages[index + 1 :]),
                    [*taken[:before], *unmarked, *taken[before:]])
        before += message.parts.count(None)
    raise RecordError(f"{source}: images, but no user message they could stand in.")
