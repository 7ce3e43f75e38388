"""One record: a conversation (with images) or a plain text, whatever columns it came in.

Columns understood, with `image` or `images` (path, bytes, {"bytes", "path"} or PIL image) beside:
- `messages`: [{"role", "content"}], content a string with `<image>` tags or typed parts;
- `prompt` and `completion`: strings, or lists of messages;
- `conversations`: LLaVA's [{"from": "human" | "gpt", "value"}];
- `text`: plain text for pre-training, or a caption where an image stands beside it;
and the forms of `columns.py`.
Optional: `category` (a string) or `categories` (one per assistant turn), for evaluation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from PIL import Image

from taid_vlm.errors import RecordError, nearest
from taid_vlm.records.columns import CHAT_COLUMNS, chat_keys, proposal, read_columns
from taid_vlm.records.images import MAX_PIXELS, ImageRef, stored_image

IMAGE_TAG = "<image>"
ROLES = {role: role for role in ("system", "user", "assistant")}
_LLAVA_ROLES = {"human": "user", "gpt": "assistant", **ROLES}


@dataclass(frozen=True)
class Malformed:
    """Stands for a row that is no record; `problem` names file and line."""

    problem: str
    origin: str = ""


@dataclass(frozen=True)
class Message:
    """One turn; `parts` are texts, and None where an image stands."""

    role: str
    parts: tuple[str | None, ...]

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if part is not None)


@dataclass(frozen=True)
class Record:
    """A conversation with its images in order of appearance, or (without messages) a text.

    unread: columns of its row that nothing reads. origin: which of several sources it is of.
    context, goes_on: of a window of a longer text, how many of its characters are not learned, and
    whether the text goes on behind it.
    """

    source: str
    messages: tuple[Message, ...] = ()
    images: tuple[ImageRef, ...] = ()
    text: str | None = None
    categories: tuple[str, ...] = ()
    unread: tuple[str, ...] = field(default=(), compare=False)
    origin: str = field(default="", compare=False)
    context: int = 0
    goes_on: bool = False

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
    row: Mapping[str, Any], source: str, root: Path | None = None, max_pixels: int = MAX_PIXELS
) -> Record:
    """Read one row.

    Args:
        row: column -> value; columns that are None or NaN count as absent.
        source: what error messages call the row, for example "train.jsonl:12".
        root: folder that relative image paths start from.
        max_pixels: of an image; larger ones are not decoded.

    Raises:
        RecordError: columns or values that cannot be understood.
    """
    row = columns = read_columns(row, source)
    images = _image_column(row, source, root)
    categories = _categories(row, source)
    if "text" in row and not images and not any(column in row for column in CHAT_COLUMNS):
        text = _expect_str(row["text"], "text", source)
        return Record(source, text=text, categories=categories, unread=columns.unread)
    messages, images = _resolve_images(_read_messages(row, source), images, source, root)
    images = [replace(image, max_pixels=max_pixels) for image in images]
    return Record(source, messages, tuple(images), categories=categories, unread=columns.unread)


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
    for column, usual in (("messages", ("role", "content")), ("conversations", ("from", "value"))):
        if column in row:
            keys = chat_keys(row[column], usual)
            roles = ROLES if (column, keys[0]) == ("messages", "role") else _LLAVA_ROLES
            return _chat(row[column], column, source, keys, roles)
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
    line = proposal(row) or "data.train.columns: {prompt: ..., completion: ...}"
    return RecordError(
        f"{source}: column '{column}' is missing (found: {found}). A record needs 'messages', "
        f"'prompt' and 'completion', 'conversations' or 'text'; rename columns with {line}."
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


def _image_column(row: Mapping[str, Any], source: str, root: Path | None) -> list[ImageRef]:
    value = row.get("images", row.get("image"))
    if value is None:
        return []
    listed = value if isinstance(value, (list, tuple)) else [value]
    return [_image_ref(item, source, root) for item in listed
            if item is not None and not (isinstance(item, str) and not item)]


def _image_ref(value: Any, source: str, root: Path | None) -> ImageRef:
    value = stored_image(value, root)
    if not isinstance(value, (str, Path, bytes, Image.Image)):
        raise RecordError(f"{source}: an image must be a path, bytes or a PIL image, got "
                          f"{type(value).__name__}.")
    return ImageRef(value, source)


def _resolve_images(
    raw: list[RawMessage], column: list[ImageRef], source: str, root: Path | None
) -> tuple[tuple[Message, ...], list[ImageRef]]:
    """Split content into parts and bring the images into the order in which they appear."""
    waiting, images, messages = list(column), [], []
    typed = any(_is_image_part(part) for _, content in raw for part in _as_parts(content))
    for role, content in raw:
        parts: list[str | None] = []
        for part in _as_parts(content):
            if _is_image_part(part):
                images.append(_next_image(_inline_image(part), waiting, source, root))
                parts.append(None)
            else:
                texts = _split_tags(_part_text(part, role, source), split=not typed)
                for piece in texts:
                    if piece is None:
                        images.append(_next_image(None, waiting, source, root))
                    parts.append(piece)
        messages.append(Message(role, tuple(part for part in parts if part != "")))
    if waiting and not images:  # images without a mark in the text open the first question
        images, messages = list(waiting), _open_with_images(messages, len(waiting), source)
    elif waiting:
        raise RecordError(f"{source}: {len(images)} image marks in the text, but "
                          f"{len(column)} images.")
    return tuple(messages), images


def _as_parts(content: Any) -> Sequence[Any]:
    return content if isinstance(content, (list, tuple)) else [content]


def _is_image_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


def _inline_image(part: Mapping[str, Any]) -> Any:
    """The image a typed part carries itself, or None; `image_url` as chat APIs write it."""
    url = part.get("image_url")
    inline = url.get("url") if isinstance(url, Mapping) else url
    return part.get("image") or part.get("path") or part.get("url") or inline


def _part_text(part: Any, role: str, source: str) -> str:
    if part is None:
        return ""
    if isinstance(part, Mapping):
        if part.get("type") != "text":
            raise RecordError(f"{source}: content part of type '{part.get('type')}' in a {role} "
                              "message; only 'text' and 'image' are supported.")
        part = part.get("text")
    return _expect_str(part, f"the {role} message", source)


def _split_tags(text: str, split: bool) -> list[str | None]:
    """Texts and None for every `<image>` tag, without the newlines LLaVA writes around a tag."""
    if not split or IMAGE_TAG not in text:
        return [text]
    parts: list[str | None] = []
    for index, piece in enumerate(text.split(IMAGE_TAG)):
        parts.extend([None, piece.strip("\n")] if index else [piece.strip("\n")])
    return parts


def _next_image(
    inline: Any, waiting: list[ImageRef], source: str, root: Path | None
) -> ImageRef:
    if inline is not None:
        return _image_ref(inline, source, root)
    if not waiting:
        raise RecordError(f"{source}: more image marks in the text than images.")
    return waiting.pop(0)


def _open_with_images(messages: list[Message], count: int, source: str) -> list[Message]:
    for index, message in enumerate(messages):
        if message.role == "user":
            opened = Message("user", (*(None for _ in range(count)), *message.parts))
            return [*messages[:index], opened, *messages[index + 1 :]]
    raise RecordError(f"{source}: images, but no user message they could stand in.")
