"""Rows as users have them, brought to the columns that a record is read from.

Read besides those columns, where none of them is there:
- `conversation`, as `messages` or `conversations` (Mantis, LMSYS);
- `query` and `response`, with `history` ([[question, answer], ...]) before them;
- `instruction`, with `input` or `context` in a line below it, and `output` or `response`;
- `question` and `answer`, where nothing stands beside them that belongs to the question.
`messages` and `conversations` may be lists, arrays, JSON or mappings of lists, with the keys `role`
and `content` or `from` and `value`; a WebDataset's sample is read by its members' endings.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from reprlib import repr as shown
from typing import Any

import numpy as np

from taid_vlm.errors import RecordError, nearest
from taid_vlm.io.jsonl import parse_json

CHAT_COLUMNS = ("messages", "conversations", "prompt", "completion")
PAIRS = (("query", "response"), ("instruction", "output"), ("instruction", "response"),
         ("question", "answer"))
BELOW = ("input", "context")  # what stands below an instruction
UNCLEAR = ("context", "passage", "choices", "options", "hint")  # beside a question: in which order?
_JSON_CHAT = re.compile(r'\s*\[\s*\{\s*"(role|content|from|value)"\s*:')
IDENTITY = {"id", "idx", "index", "uid", "uuid", "__key__", "__url__", "__index_level_0__"}
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
# what is proposed where nothing can be read
_QUESTIONS = ("prompt", "question", "query", "instruction", "problem", "user", "human", "input",
              "source", "statement", "sentence", "context")
_ANSWERS = ("completion", "answer", "response", "output", "assistant", "solution", "reply", "gpt",
            "target", "chosen", "label", "answers", "caption")


class Row(dict[str, Any]):
    """Columns, which remembers those that were read."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        super().__init__(columns)
        self._read = set(IDENTITY)

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return super().get(key, default)

    @property
    def unread(self) -> tuple[str, ...]:
        """Columns with a value that nothing has read."""
        return tuple(key for key, value in self.items() if key not in self._read
                     and not (isinstance(value, (str, list, dict)) and not value))


def read_columns(row: Mapping[Any, Any], source: str) -> Row:
    """The columns of one row; None and NaN count as absent.

    Raises:
        RecordError: a form of columns that says two things, or a cell without a column.
    """
    if None in row:
        raise RecordError(f"{source}: more cells than the header has names: {shown(row[None])}.")
    columns = {key if type(key) is str and key.isascii() else _name(key): value
               for key, value in row.items() if not _absent(value)}
    if "__key__" in columns:
        columns = _sample(columns)
    if _is_chat(columns.get("conversation")) and not any(name in columns for name in CHAT_COLUMNS):
        columns["messages"] = columns.pop("conversation")
    for name in ("messages", "conversations", "image", "images", "video", "videos", "categories"):
        if name in columns:
            columns[name] = _listed(columns[name], name, source)
    for name in ("prompt", "completion"):
        value = columns.get(name)
        if isinstance(value, (np.ndarray, Mapping)):
            columns[name] = _listed(value, name, source)
        elif isinstance(value, str) and _JSON_CHAT.match(value):
            with contextlib.suppress(RecordError):  # a text that only begins so
                columns[name] = _listed(value, name, source)
    if not any(name in columns for name in CHAT_COLUMNS):
        columns = _conversation(columns, source)
    return Row(columns)


def _is_chat(value: Any) -> bool:
    return bool(_JSON_CHAT.match(value)) if isinstance(value, str) else value is not None


def as_prompt(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row; one that has a question alone, with an answer that is empty."""
    there = {name for name, value in row.items() if not _absent(value)}
    pairs = [pair for pair in (("prompt", "completion"), *PAIRS) if pair[0] in there]
    if {"messages", "conversations", "conversation", "completion"} & there or not pairs or any(
            {*pair} <= there for pair in pairs):
        return row
    return {**row, pairs[0][1]: ""}


def _name(key: Any) -> str:
    """A column's name, which may hold half a character."""
    return str(key).encode(errors="backslashreplace").decode()


def _absent(value: Any) -> bool:
    """None, NaN, and what pandas has in their place."""
    return value is None or (isinstance(value, (float, np.floating)) and bool(value != value)) \
        or type(value).__name__ in ("NAType", "NaTType")


def _listed(value: Any, name: str, source: str) -> Any:
    """A list, where a value stands for one; others as they came."""
    images = name.startswith(("image", "video"))
    if isinstance(value, str) and value.lstrip().startswith("[") and (
            not images or value.rstrip().endswith("]")):
        value = parse_json(value, f"{source}: {name}")
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if images:
        return [item for item in value if not _absent(item)] if isinstance(value, list) else value
    if not isinstance(value, (list, tuple, Mapping)):
        return value
    turns = _rows(value, name, source)
    return turns if isinstance(turns, Mapping) else [_turn(item, name, source) for item in turns]


def _rows(value: Any, name: str, source: str) -> Any:
    """{"role": [...], "content": [...]} as a list of mappings: so `datasets` has sequences."""
    if not isinstance(value, Mapping):
        return list(value)
    lists = {key: value.tolist() if isinstance(value, np.ndarray) else value
             for key, value in value.items()}
    if not lists or not all(isinstance(value, (list, tuple)) for value in lists.values()):
        return value  # one mapping, which is refused by name
    if len({len(column) for column in lists.values()}) > 1:
        lengths = ", ".join(f"{key} {len(column)}" for key, column in lists.items())
        raise RecordError(f"{source}: {name} holds lists of different lengths ({lengths}).")
    return [dict(zip(lists, turn, strict=True)) for turn in zip(*lists.values(), strict=True)]


def _turn(item: Any, name: str, source: str) -> Any:
    """A message whose content may be an array or a mapping of lists, too."""
    if isinstance(item, Mapping):
        content = item.get("content")
        if isinstance(content, np.ndarray):
            content = content.tolist()
        if isinstance(content, Mapping):
            parts = _rows(content, f"{name}.content", source)
            content = [parts] if isinstance(parts, Mapping) else parts
        item = {**item, "content": content} if "content" in item else item
    return item


def chat_keys(value: Any, usual: tuple[str, str]) -> tuple[str, str]:
    """The two keys that a list's messages have: `role` and `content`, or `from` and `value`."""
    first = value[0] if isinstance(value, (list, tuple)) and value else None
    other = ("role", "content") if usual == ("from", "value") else ("from", "value")
    return other if isinstance(first, Mapping) and all(key in first for key in other) and not all(
        key in first for key in usual) else usual


# ----- other forms --------------------------------------------------------------------------


def _conversation(columns: dict[str, Any], source: str) -> dict[str, Any]:
    """Question and answer under other names, as prompt and completion (or messages)."""
    pairs = [pair for pair in PAIRS if all(name in columns for name in pair)]
    if not pairs:
        return columns
    (question, answer), *others = pairs
    beside = [name for name in UNCLEAR if columns.get(name)] if question == "question" else []
    if others or beside:
        what = " and ".join(f"'{a}' with '{b}'" for a, b in pairs) if others else \
            f"'question', 'answer' and '{beside[0]}', which can be joined in more ways than one"
        raise RecordError(f"{source}: holds {what}. To read only these two, paste "
                          f"{_line({'prompt': question, 'completion': answer})}.")
    texts = [_text(columns, question, source)]
    below = [name for name in BELOW if question == "instruction" and columns.get(name)]
    texts += [_text(columns, name, source) for name in below]
    prompt, completion = "\n".join(texts), _text(columns, answer, source)
    used = {question, answer, *(BELOW if question == "instruction" else ()), "history"}
    left = {key: value for key, value in columns.items() if key not in used}
    turns = [*_history(columns.get("history"), source), (prompt, completion)]
    if len(turns) == 1:
        return {**left, "prompt": prompt, "completion": completion}
    return {**left, "messages": [{"role": role, "content": text} for turn in turns
                                 for role, text in zip(("user", "assistant"), turn, strict=True)]}


def _text(columns: Mapping[str, Any], name: str, source: str) -> str:
    value = columns[name]
    if not isinstance(value, str):
        raise RecordError(f"{source}: {name} must be text, got {shown(value)}.")
    return value


def _history(value: Any, source: str) -> Iterator[Sequence[str]]:
    turns = value.tolist() if isinstance(value, np.ndarray) else value
    for turn in turns if isinstance(turns, (list, tuple)) else [turns] if turns else []:
        if not isinstance(turn, (list, tuple, np.ndarray)) or len(turn) != 2 or not all(
                isinstance(text, str) for text in turn):
            raise RecordError(f"{source}: history must be a list of [question, answer], got "
                              f"{shown(turn)}.")
        yield list(turn)


def _sample(columns: Mapping[str, Any]) -> dict[str, Any]:
    """A WebDataset's sample: the members' endings are its columns."""
    inner = columns.get("json")
    row = {key: value for key, value in columns.items() if key != "json"}
    images = [key for key in sorted(row) if key.lower().rpartition(".")[2] in IMAGE_ENDINGS]
    pictures = [row.pop(key) for key in images]
    if "txt" in row:
        row["text"] = row.pop("txt")
    row |= inner if isinstance(inner, Mapping) else {}
    named = row.pop("images", row.pop("image", None))
    paths = named if isinstance(named, list) else [named]
    if pictures and (not named or len(paths) == len(pictures)):  # by name or not, these are they
        named = pictures
    return row if named is None else {**row, "images": named}


# ----- what to paste ------------------------------------------------------------------------


def proposal(row: Mapping[str, Any]) -> str:
    """The line of a recipe that most likely reads these columns; "" where none is likely."""
    if not {"prompt", "completion"} & set(row):
        for key, value in row.items():
            turns = value.tolist() if isinstance(value, np.ndarray) else value
            if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
                return _line({"messages": key})
    names = {key.lower(): key for key in row}
    questions = [names[name] for name in _QUESTIONS if name in names]
    answers = [names[name] for name in _ANSWERS if name in names]
    texts = [key for key, value in row.items() if isinstance(value, str) and value
             and key not in IDENTITY]
    if "completion" in row:
        answers = ["completion"]
        questions = questions or [key for key in texts if key != "completion"]
    elif "prompt" in row:
        questions, answers = ["prompt"], answers or [key for key in texts if key != "prompt"]
    if not (questions and answers) and len(texts) > 1:
        questions = questions or [key for key in texts if key not in answers]
        answers = answers or [key for key in texts if key not in questions[:1]]
    if questions and answers:
        pairs = {"prompt": questions[0], "completion": answers[0]}
        return _line({key: name for key, name in pairs.items() if key != name})
    return _line({"text": texts[0]}) if texts and not questions and "completion" not in row else ""


def _line(columns: Mapping[str, str]) -> str:
    return f"data.train.columns: {{{', '.join(f'{a}: {b}' for a, b in columns.items())}}}"


def absent_column(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> str:
    """What is wrong where a source's `columns` name one that a row lacks; "" if none."""
    names = [str(key) for key in row]
    for key, name in columns.items():
        if name not in names:
            return (f"{where}: data.train.columns: {{{key}: {name}}}, but there is no column "
                    f"'{name}'.{nearest(name, names)}")
    return ""
