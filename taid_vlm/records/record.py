"""One record: a conversation (with images) or a plain text, whatever columns it came in.

Columns understood, with `image` or `images` (path, bytes, {"bytes", "path"} or PIL image) and
`video` or `videos` (file, bytes or list of frames) beside:
- `messages`: [{"role", "content"}], content a string with `<image>` and `<video>` tags or typed
  parts; what else a message may hold: `messages.py`;
- `prompt` and `completion`: strings, or lists of messages, of which only the completion is learned;
- `conversations`: LLaVA's [{"from": "human" | "gpt", "value"}];
- `text`: plain text for pre-training, or a caption where an image stands beside it;
and the forms of `columns.py`. A row of which a column says `train: false` is not learned.
Optional: `system` (the first turn), `tools` (JSON schemas of what can be called); for evaluation
`category` (a string) or `categories` (one per assistant turn).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from taid_vlm.config.data import VideoSpec
from taid_vlm.errors import RecordError
from taid_vlm.records.columns import CHAT_COLUMNS, Row, chat_keys, proposal, read_columns
from taid_vlm.records.images import MAX_PIXELS, ImageRef
from taid_vlm.records.messages import (
    LEARNED,
    LLAVA_ROLES,
    ROLES,
    Message,
    Turn,
    expect_text,
    read_tools,
    read_turns,
    without_filled,
)
from taid_vlm.records.pictures import (
    Pictures,
    image_column,
    kind_of,
    settled,
    split_tags,
    video_column,
)

IMAGE_TAG, VIDEO_TAG = "<image>", "<video>"
TEACHER = "teacher"  # a column
TAG_AS_TEXT = f"{IMAGE_TAG}: text, for the row has no image"


@dataclass(frozen=True)
class Malformed:
    """Stands for a row that is no record; `problem` names file and line, `reason` is what it is
    counted under."""

    problem: str
    reason: str = RecordError.reason
    origin: str = ""


@dataclass(frozen=True)
class Record:
    """A conversation with its images and videos in order of appearance, or (without messages) a
    text.

    tools: JSON schemas of what the assistant can call.
    without_effect: what stands in it and has none, in words: keys of messages, and tags.
    unread: columns of its row that nothing reads. origin: which of several sources it is of.
    context, goes_on: of a window of a longer text, how many of its characters are not learned, and
    whether the text goes on behind it.
    teacher: of several, the name of its own, or what each of some counts; None where neither its
    row nor its source says.
    """

    source: str
    messages: tuple[Message, ...] = ()
    images: tuple[ImageRef, ...] = ()
    text: str | None = None
    categories: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    without_effect: tuple[str, ...] = field(default=(), compare=False)
    unread: tuple[str, ...] = field(default=(), compare=False)
    origin: str = field(default="", compare=False)
    context: int = 0
    goes_on: bool = False
    teacher: str | Mapping[str, float] | None = field(default=None, compare=False)

    @property
    def answers(self) -> list[str]:
        """The assistant's texts."""
        return [message.text.strip() for message in self.messages if message.role == "assistant"]

    @property
    def learned(self) -> list[int]:
        """Which of the assistant's answers are learned: those that weigh anything."""
        spoken = (message for message in self.messages if message.role == "assistant")
        return [turn for turn, message in enumerate(spoken) if message.weight]

    def before(self, turn: int) -> list[Message]:
        """The messages that stand before the `turn`-th assistant answer."""
        answers = [i for i, message in enumerate(self.messages) if message.role == "assistant"]
        return list(self.messages[: answers[turn]] if turn < len(answers) else self.messages)

    def images_before(self, turn: int) -> tuple[ImageRef, ...]:
        """Images of the messages before the `turn`-th assistant answer."""
        return self.images[: sum(part is None for message in self.before(turn)
                                 for part in message.parts)]

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
        row: column -> value; columns that are None or NaN count as absent.
        source: what error messages call the row, for example "train.jsonl:12".
        root: folder that relative image paths start from.
        max_pixels: of an image; larger ones are not decoded.
        video: which frames of videos are shown, where they do not say it themselves.

    Raises:
        RecordError: columns or values that cannot be understood.

    Example:
        >>> from taid_vlm.records import parse_record
        >>> record = parse_record({"messages": [
        ...     {"role": "user", "content": "is it red?"},
        ...     {"role": "assistant", "content": "no"}]}, "train.jsonl:1")
        >>> [(message.role, message.parts) for message in record.messages]
        [('user', ('is it red?',)), ('assistant', ('no',))]
    """
    row = columns = read_columns(row, source)
    images, videos = image_column(row, source, root), video_column(row, source, root)
    categories, learned = _categories(row, source), _is_learned(columns)
    if "text" in row and not images + videos and not any(column in row for column in CHAT_COLUMNS):
        text = expect_text(row["text"], f"{source}: text")
        return Record(source, text=text, categories=categories, unread=columns.unread,
                      context=0 if learned else len(text), teacher=_teacher(row))
    turns = _with_system(_read_messages(row, source), row, source)
    tools = read_tools(row.get("tools"), source)
    messages, images = _resolve_images(
        [(t.role, t.content) for t in turns], images, videos, source, root)
    images = [settled(image, max_pixels, video) for image in images]
    messages = tuple(replace(m, **{**t.extra, "calls": without_filled(t.calls, tools)})
                     for m, t in zip(messages, turns, strict=True))
    if not learned:
        messages = tuple(replace(message, weight=0.0) for message in messages)
    without_effect = tuple(dict.fromkeys(key for turn in turns for key in turn.unread))
    if not images and any(IMAGE_TAG in message.text for message in messages):
        without_effect += (TAG_AS_TEXT,)
    return Record(source, messages, tuple(images), None, categories, tools, without_effect,
                  columns.unread, teacher=_teacher(row))


def _teacher(row: Row) -> str | None:
    """The name in its column, which only a run with several teachers reads."""
    name = dict.get(row, TEACHER)
    return None if name is None else str(name) or None  # an empty cell says nothing


def _is_learned(row: Row) -> bool:
    """False where a row says of itself that it is not: `train: false`, `loss: false`."""
    flags = [key for key in LEARNED if isinstance(dict.get(row, key), bool)]
    return all(row.get(key) for key in flags)


def problem_of(row: Malformed) -> RecordError:
    """The error that it stands for."""
    problem = RecordError(row.problem)
    problem.reason = row.reason
    return problem


def attempt(read: Callable[..., Record], *args: Any) -> Record | Malformed:
    """What `read` gives, or what takes the place of a row that is no record."""
    try:
        return read(*args)
    except RecordError as problem:
        return Malformed(str(problem), problem.reason)


def first_rows(data: Any, number: int | None = None) -> Iterator[Record | Malformed]:
    """The first (or all) rows of any data set, with a length or streamed, of records or columns."""
    rows = (attempt(data.__getitem__, i) for i in range(len(data))) \
        if hasattr(data, "__len__") else data
    for index, row in enumerate(itertools.islice(rows, number)):
        known = isinstance(row, (Record, Malformed))
        yield row if known else attempt(parse_record, row, f"row {index}")


# ----- texts --------------------------------------------------------------------------------

RawMessage = tuple[str, Any]  # role, content as it came


def _read_messages(row: Mapping[str, Any], source: str) -> list[Turn]:
    for column, usual in (("messages", ("role", "content")), ("conversations", ("from", "value"))):
        if column in row:
            keys = chat_keys(row[column], usual)
            roles = ROLES if (column, keys[0]) == ("messages", "role") else LLAVA_ROLES
            return read_turns(row[column], column, source, keys, roles)
    if "prompt" in row or "completion" in row:
        for column in ("prompt", "completion"):
            if column not in row:
                raise _missing(column, row, source)
        prompt = _side(row["prompt"], "prompt", "user", source)  # its answers are context
        return [*(replace(turn, extra={**turn.extra, "weight": 0.0})
                  if turn.role == "assistant" else turn for turn in prompt),
                *_side(row["completion"], "completion", "assistant", source)]
    if "text" in row:  # with an image beside it: a caption
        caption = expect_text(row["text"], f"{source}: text")
        return [Turn("user", "", {}), Turn("assistant", caption, {})]
    raise _missing("messages", row, source)


def _with_system(turns: list[Turn], row: Mapping[str, Any], source: str) -> list[Turn]:
    """The turns, with the row's `system` in front."""
    if not (text := row.get("system")):
        return turns
    first = Turn("system", expect_text(text, f"{source}: system"), {})
    if turns[0].role != "system":
        return [first, *turns]
    if turns[0].content == text:
        return turns
    raise RecordError(f"{source}: a system column, and a conversation that begins with another "
                      "system turn; keep one of them.")


def _missing(column: str, row: Mapping[str, Any], source: str) -> RecordError:
    found = ", ".join(sorted(row)) or "none"
    line = proposal(row) or "data.train.columns: {prompt: ..., completion: ...}"
    return RecordError(
        f"{source}: column '{column}' is missing (found: {found}). A record needs 'messages', "
        f"'prompt' and 'completion', 'conversations' or 'text'; rename columns with {line}."
    )


def _side(value: Any, column: str, role: str, source: str) -> list[Turn]:
    if isinstance(value, str):
        return [Turn(role, value, {})]
    if not isinstance(value, Sequence):
        raise RecordError(f"{source}: {column} must be text or a list of messages, got "
                          f"{shown(value)}.")
    return read_turns(value, column, source)


def _categories(row: Mapping[str, Any], source: str) -> tuple[str, ...]:
    listed = row.get("categories", [row["category"]] if "category" in row else [])
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    return tuple(expect_text(str(category), f"{source}: a category") for category in listed)


# ----- images -------------------------------------------------------------------------------


def _resolve_images(
    raw: list[RawMessage], images: list[ImageRef], videos: list[ImageRef], source: str,
    root: Path | None,
) -> tuple[tuple[Message, ...], list[ImageRef]]:
    """Split content into parts and bring the images into the order in which they appear."""
    pictures = Pictures.of(images, videos, source, root)
    messages: list[Message] = []
    typed = any(kind_of(part) for _, content in raw for part in _as_parts(content))
    tagged = set() if typed else _tagged(raw, len(images) + len(videos))
    for role, content in raw:
        parts: list[str | None] = []
        for part in _as_parts(content):
            if kind_of(part):
                pictures.take_part(part, role)
                parts.append(None)
            else:
                text = _part_text(part, role, source)
                parts += [text] if typed else split_tags(text, pictures, role, role in tagged)
        if role == "assistant" and None in parts:
            raise RecordError(f"{source}: an image stands in an assistant's message, but models "
                              "answer with text; move it into the user's.")
        messages.append(Message(role, tuple(part for part in parts if part != "")))
    unmarked = pictures.unmarked()
    if not unmarked:
        return tuple(messages), pictures.taken
    return _open_with_images(messages, pictures.taken, unmarked, source)


def _tagged(raw: list[RawMessage], pictures: int) -> set[str]:
    """Whose `<image>` stands for an image: nobody's where the row has none; the assistant's only
    where images are left over by the others."""
    if not pictures:
        return set()
    parts = [(role, part) for role, content in raw for part in _as_parts(content)]
    texts = [(role, part.get("text") if isinstance(part, Mapping) else part)
             for role, part in parts]
    asked = sum(text.count(IMAGE_TAG) + text.count(VIDEO_TAG) for role, text in texts
                if role != "assistant" and isinstance(text, str))
    roles = {role for role, _ in raw}
    return roles if asked < pictures else roles - {"assistant"}


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
    return expect_text(part, f"{source}: the {role} message")


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
