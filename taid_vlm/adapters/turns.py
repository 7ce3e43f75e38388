"""Turns as a chat template takes them, with marks around what is learned.

A template may take a thought out of an answer's text ("<think>...</think>") and print it elsewhere
or not at all, so that thought and answer have marks of their own.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from taid_vlm.errors import TaidError, nearest
from taid_vlm.records import Message, Record
from taid_vlm.records.messages import THOUGHTS

Processor: TypeAlias = ProcessorMixin | PreTrainedTokenizerBase
Supervise = Literal["answers", "all"]
ContentForm = Literal["parts", "string"]
Kind = Literal["thought", "text"]

OPEN, CLOSE, OPEN_THOUGHT, CLOSE_THOUGHT = "\ue000", "\ue001", "\ue002", "\ue003"
_OWN_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception",
                  "strftime_now", "range", "dict", "namespace", "loop", "continue_final_message"}
MARKS = OPEN + CLOSE + OPEN_THOUGHT + CLOSE_THOUGHT
THOUGHT = re.compile(
    r"\s*<think>\s*(?P<thought>.*?)(?P<after>\s*</think>\s*)(?P<rest>.*)", re.DOTALL)
_READS = re.compile(rf"""\.({'|'.join(THOUGHTS)})\b|['"]({'|'.join(THOUGHTS)})['"]""")


@dataclass(frozen=True)
class Style:
    """What a chat template does with messages, as its source says.

    form: the form of `content` that it prints faithfully.
    variables: what it reads beside the messages.
    thoughts: keys of a message that it reads a thought from.
    splits: whether it takes a thought out of an answer's text.
    developer: whether it knows that role; where it does not, its turns are the system's.
    """

    form: ContentForm
    variables: frozenset[str] = frozenset()
    thoughts: tuple[str, ...] = ()
    splits: bool = False
    developer: bool = False


def style_of(processor: Processor, form: ContentForm) -> Style:
    """Read a template's style off its source (of several named ones, off all of them)."""
    return _style(template_source(processor), form)


@functools.lru_cache(maxsize=64)
def _style(source: str, form: ContentForm) -> Style:
    keys = tuple(sorted({a or b for a, b in _READS.findall(source)}))
    return Style(form, template_variables(source), keys, "</think>" in source,
                 re.search("""['"]developer['"]""", source) is not None)


def template_source(processor: Processor) -> str:
    """The chat template, or all of them where a tokenizer has several by name."""
    value = getattr(processor, "chat_template", None) or ""
    return "\n".join(map(str, value.values())) if isinstance(value, Mapping) else str(value)


@functools.lru_cache(maxsize=64)
def template_variables(source: str) -> frozenset[str]:
    """What a template reads from outside; nothing where it cannot be parsed."""
    import jinja2
    import jinja2.meta

    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)
    parser = jinja2.Environment(
        extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"], autoescape=True)
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(parser.parse(plain)))
    except jinja2.TemplateError:
        return frozenset()


def check_kwargs(processor: Processor, kwargs: Mapping[str, Any], role: str) -> None:
    """Raise TaidError for a variable that the template never reads."""
    tokens = getattr(processor, "tokenizer", processor).special_tokens_map
    valid = template_variables(template_source(processor)) - {*_OWN_VARIABLES, *tokens}
    for key in kwargs:
        if key not in valid:
            hint = nearest(key, valid) if valid else " It reads none."
            raise TaidError(f"{role}.chat_template_kwargs: the chat template reads no '{key}'."
                            f"{hint}")


@dataclass(frozen=True)
class Marked:
    """One text with marks: which message it belongs to, and what stands between the marks."""

    message: int
    kind: Kind
    text: str


def has_thought(message: Message) -> bool:
    """Whether an answer begins with a thought, of its own key or in its text."""
    return bool(message.thought) or THOUGHT.match(message.text) is not None


def is_thoughtful(message: Message) -> bool:
    """Whether that thought says anything."""
    return bool((_split(message)[0] or "").strip())


def without_thought(message: Message) -> Message:
    """An answer's text and calls alone."""
    return replace(message, thought=None, parts=(_split(message)[1],))


def kinds_of(record: Record) -> Iterator[str]:
    """Of the pictures that stand where a message's part is None: "image" or "video"."""
    return iter([image.kind for image in record.images])


def chat_message(
    message: Message, style: Style, marked: bool = False, stand_in: bool = False,
    kinds: Iterator[str] | None = None,
) -> dict[str, Any]:
    """A message as apply_chat_template takes it.

    Args:
        marked: with marks inside the outer whitespace of its texts, so that a template's `| trim`
            still trims; an answer's thought has marks of its own.
        kinds: what its pictures are, as `kinds_of` has it; without, all are images.
        stand_in: with a word in place of its text and its calls, to see what is printed around.
    """
    role = "system" if message.role == "developer" and not style.developer else message.role
    out: dict[str, Any] = {"role": role}
    parts: list[str | None] = list(message.parts)
    if message.role == "assistant":
        text, thought = _answer(message, style, marked, stand_in)
        parts = [text] if text else []
        out |= {key: thought for key in style.thoughts if thought}
    elif marked:
        parts = [_around(part) if part and part.strip() else part for part in parts]
    out["content"] = _content(parts, style.form, kinds or itertools.repeat("image"))
    if message.calls and not stand_in:
        out["tool_calls"] = [dict(call) for call in message.calls]
    for key in ("name", "tool_call_id"):
        if getattr(message, key) is not None:
            out[key] = getattr(message, key)
    return out


def marked_texts(index: int, message: Message) -> Iterator[Marked]:
    """The marked texts of a message, in the order in which they are printed."""
    if message.role != "assistant":
        yield from (Marked(index, "text", part.strip())
                    for part in message.parts if part and part.strip())
        return
    thought, text = _split(message)
    if thought is not None and thought.strip():
        yield Marked(index, "thought", thought.strip())
    if text.strip():
        yield Marked(index, "text", text.strip())


def places_in(text: str, message: Message) -> Iterator[tuple[str, int, int]]:
    """(kind, start, end) of the marked texts of an answer that stands there as it is."""
    end = 0
    for marked in marked_texts(0, message):
        front = text.index("<think>") + len("<think>") if marked.kind == "thought" else end
        start = text.index(marked.text, front)
        end = start + len(marked.text)
        yield marked.kind, start, end


def _split(message: Message) -> tuple[str | None, str]:
    """An answer's thought (None: it has none) and the rest of its text."""
    if message.thought is not None:
        return message.thought, message.text
    match = THOUGHT.match(message.text)
    return (match["thought"], match["rest"]) if match else (None, message.text)


def _answer(
    message: Message, style: Style, marked: bool, stand_in: bool
) -> tuple[str, str | None]:
    """An answer's text, and its thought where the template reads that from a key."""
    thought, text = _split(message)
    match = THOUGHT.match(message.text) if message.thought is None else None
    if stand_in:
        text = OPEN + "word" + CLOSE
    elif marked:
        text = _around(text) if text.strip() else text
    if thought is None:
        return text, None
    shown = thought
    if (marked or stand_in) and thought.strip():
        shown = _around(thought, OPEN_THOUGHT, CLOSE_THOUGHT)
    by_key = style.thoughts and (match is None or not style.splits)
    if by_key:
        return text, shown
    if match is None:
        return f"<think>\n{shown.strip()}\n</think>\n\n{text}", None
    front = match.string[: match.start("thought")]
    return front + shown + match["after"] + text, None


def _around(text: str, opens: str = OPEN, closes: str = CLOSE) -> str:
    core = text.strip()
    before, after = text.split(core, 1)
    return before + opens + core + closes + after


def _content(parts: list[str | None], form: ContentForm, kinds: Iterator[str]) -> Any:
    if form == "string":
        return "".join(part for part in parts if part is not None)
    return [{"type": next(kinds)} if part is None else {"type": "text", "text": part}
            for part in parts]
