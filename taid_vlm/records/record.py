"""One record: a conversation (with images) or a plain text, whatever columns it came in.

Columns understood, with `image` or `images` (path, bytes, {"bytes", "path"} or PIL image) beside:
- `messages`: [{"role", "content"}], content a string with `<image>` tags or typed parts;
- `prompt` and `completion`: strings, or lists of messages;
- `conversations`: LLaVA's [{"from": "human" | "gpt", "value"}];
- `text`: plain text for pre-training, or a caption where an image stands beside it.
Optional: `category` (a string) or `categories` (one per assistant turn), for evaluation.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from PIL import Image

from taid_vlm.errors import RecordError, nearest
from taid_vlm.records.images import MAX_PIXELS, SIZE_KEYS, ImageRef, no_image, stored_image

IMAGE_TAG = "<image>"
CHAT_COLUMNS = ("messages", "conversations", "prompt", "completion")
_TAG = re.compile(r"<image>|<img>(?P<path>.*?)</img>", re.DOTALL)
ROLES = {role: role for role in ("system", "user", "assistant")}
_LLAVA_ROLES = {"human": "user", "gpt": "assistant", **ROLES}


@dataclass(frozen=True)
class Malformed:
    """Stands for a row that is no record; `problem` names file and line."""

    problem: str


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
    """A conversation with its images in order of appearance, or (without messages) a text."""

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
    row: Mapping[str, Any], source: str, root: Path | None = None, max_pixels: int = MAX_PIXELS
) -> Record:
    """Read one row.

    Args:
        row: column -> value; columns that are None count as absent.
        source: what error messages call the row, for example "train.jsonl:12".
        root: folder that relative image paths start from.
        max_pixels: of an image; larger ones are not decoded.

    Raises:
        RecordError: columns or values that cannot be understood.
    """
    row = {key: value for key, value in row.items() if value is not None}
    images = _image_column(row, source, root)
    categories = _categories(row, source)
    if "text" in row and not images and not any(column in row for column in CHAT_COLUMNS):
        text = _expect_str(row["text"], "text", source)
        return Record(source, text=text, categories=categories)
    raw = _read_messages(row, source)
    _refuse_videos(row, raw, source)
    messages, images = _resolve_images(raw, images, source, root)
    images = [replace(image, max_pixels=max_pixels) for image in images]
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


def _image_column(row: Mapping[str, Any], source: str, root: Path | None) -> list[ImageRef]:
    value = row.get("images", row.get("image"))
    listed = value if isinstance(value, (list, tuple)) else [value]
    return [_image_ref(item, source, root) for item in listed if not no_image(item)]


def _image_ref(value: Any, source: str, root: Path | None) -> ImageRef:
    value = stored_image(value, root)
    if not isinstance(value, (str, Path, bytes, Image.Image)):
        raise RecordError(f"{source}: an image must be a path, bytes or a PIL image, got "
                          f"{type(value).__name__}.")
    return ImageRef(value, source)


@dataclass
class _Shelf:
    """A row's images, and those that the marks in its text have taken, in order of appearance."""

    column: Sequence[ImageRef]
    source: str
    root: Path | None
    taken: list[ImageRef] = field(default_factory=list)
    used: set[int] = field(default_factory=set)
    by_index: set[bool] = field(default_factory=set)

    def take(self, index: Any = None) -> None:
        """The column's image at `index`, or the next one."""
        self.by_index.add(index is not None)
        if len(self.by_index) > 1:
            raise RecordError(f"{self.source}: some image parts have an 'index' and some have "
                              "none; give all of them one, or none.")
        place = len(self.used) if index is None else index
        if isinstance(place, bool) or place not in range(len(self.column)):
            raise RecordError(
                f"{self.source}: more image marks in the text than images." if index is None else
                f"{self.source}: an image part's index = {shown(index)}, but the row has "
                f"{len(self.column)} images, counted from 0.")
        self.used.add(int(place))
        self.taken.append(self.column[int(place)])

    def take_part(self, part: Mapping[str, Any]) -> None:
        inline = _inline_image(part)
        if no_image(inline):
            self.take(part.get("index"))
        else:
            self.take_inline(inline)
        sizes = tuple((key, part[key]) for key in SIZE_KEYS if part.get(key) is not None)
        for key, value in sizes:
            if type(value) is not int or value < 1:
                raise RecordError(f"{self.source}: an image part's {key} = {shown(value)}, but it "
                                  "must be a whole number of pixels.")
        self.taken[-1] = replace(self.taken[-1], sizes=sizes)

    def take_inline(self, value: Any) -> None:
        self.taken.append(_image_ref(value, self.source, self.root))


def _resolve_images(
    raw: list[RawMessage], column: list[ImageRef], source: str, root: Path | None
) -> tuple[tuple[Message, ...], list[ImageRef]]:
    """Split content into parts and bring the images into the order in which they appear."""
    shelf, messages = _Shelf(column, source, root), []
    typed = any(_is_image_part(part) for _, content in raw for part in _as_parts(content))
    for role, content in raw:
        parts: list[str | None] = []
        for part in _as_parts(content):
            if _is_image_part(part):
                shelf.take_part(part)
                parts.append(None)
            else:
                text = _part_text(part, role, source)
                parts += [text] if typed else _split_tags(text, shelf)
        if role == "assistant" and None in parts:
            raise RecordError(f"{source}: an image stands in an assistant's message, but models "
                              "answer with text; move it into the user's.")
        messages.append(Message(role, tuple(part for part in parts if part != "")))
    images = shelf.taken
    if column and not images:  # images without a mark in the text open the first question
        images, messages = list(column), _open_with_images(messages, len(column), source)
    elif len(shelf.used) < len(column):
        raise RecordError(f"{source}: {len(images)} image marks in the text, but "
                          f"{len(column)} images.")
    return tuple(messages), images


def _refuse_videos(row: Mapping[str, Any], raw: list[RawMessage], source: str) -> None:
    """Their frames would be left out, and the letters `<video>` learned from."""
    texts = [part for _, content in raw for part in _as_parts(content) if isinstance(part, str)]
    if row.get("videos") or row.get("video") or any("<video>" in text for text in texts):
        raise RecordError(f"{source}: holds a video ('videos', 'video' or <video> in a text), "
                          "which is not read; give its frames as images.")


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


def _split_tags(text: str, shelf: _Shelf) -> list[str | None]:
    """Texts, and None for every `<image>` and Qwen-VL's `<img>path</img>`, whose images are taken;
    without the newlines LLaVA writes around a tag."""
    if "<im" not in text:
        return [text]
    parts: list[str | None] = []
    start = 0
    for tag in _TAG.finditer(text):
        parts += [text[start : tag.start()].strip("\n"), None]
        start = tag.end()
        if tag["path"] is None:
            shelf.take()
        else:
            shelf.take_inline(tag["path"].strip())
    return [*parts, text[start:].strip("\n") if parts else text]


def _open_with_images(messages: list[Message], count: int, source: str) -> list[Message]:
    for index, message in enumerate(messages):
        if message.role == "user":
            opened = Message("user", (*(None for _ in range(count)), *message.parts))
            return [*messages[:index], opened, *messages[index + 1 :]]
    raise RecordError(f"{source}: images, but no user message they could stand in.")
