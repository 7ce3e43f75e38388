"""Rendering a record through a model's own chat template, knowing where the answers stand.

The trick works with any template: each supervised text is wrapped in two private-use characters,
the template renders, the characters are taken out again, and their places are the spans.
(`return_assistant_tokens_mask` needs `{% generation %}` marks that almost no real template has,
and gives an all-zero mask without a word otherwise.)
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from taid_vlm.errors import AlignmentError, SampleDropped, TaidError
from taid_vlm.records import Record

Processor: TypeAlias = ProcessorMixin | PreTrainedTokenizerBase
Supervise = Literal["answers", "all"]
ContentForm = Literal["parts", "string"]

OPEN, CLOSE = "\ue000", "\ue001"
THOUGHT = re.compile(r"<think>\n(?=.*</think>)", re.DOTALL)


@dataclass(frozen=True)
class TextSpan:
    """Characters [start, end) of one supervised text; `turn` counts the assistant's answers."""

    start: int
    end: int
    turn: int
    is_answer: bool


@dataclass(frozen=True)
class Rendered:
    """A record as one model sees it, before its processor expands the images.

    add_special: whether the tokenizer is to add its own BOS (and EOS) around the text.
    """

    text: str
    spans: tuple[TextSpan, ...]
    add_special: bool = False


def has_chat_template(processor: Processor) -> bool:
    return bool(getattr(processor, "chat_template", None))


def content_form(processor: Processor, prefer: ContentForm, role: str) -> ContentForm:
    """Which form of `content` this template prints faithfully.

    Some text templates render typed parts as nothing or as a Python list, some templates of
    vision models drop plain strings; so both are tried on a probe.
    """
    forms: tuple[ContentForm, ContentForm] = (
        ("parts", "string") if prefer == "parts" else ("string", "parts")
    )
    for form in forms:
        probe = [_message("user", ["probe question"], form),
                 _message("assistant", ["probe answer"], form)]
        try:
            text = processor.apply_chat_template(probe, tokenize=False)
        except Exception:  # a template may raise anything; the other form is tried next
            continue
        once = text.count("probe question") == 1 and text.count("probe answer") == 1
        if once and "'type'" not in text:
            return form
    raise TaidError(
        f"{role}: the chat template does not print a question and an answer faithfully, neither "
        f"as a string nor as typed parts; set {role}.chat_template to another one.",
        code="unfaithful_template",
    )


def video_token_printed(processor: Processor, token: str) -> bool:
    """Whether the chat template prints a video's placeholder, once."""
    try:
        text = apply_template(processor, [
            _message("user", [None, "probe"], "parts", iter(["video"]))], "probe")
    except SampleDropped:
        return False
    return text.count(token) == 1 and "'type'" not in text


def render(
    processor: Processor, record: Record, form: ContentForm, supervise: Supervise = "answers"
) -> Rendered:
    """Render a conversation; spans are the assistant's texts, or all texts.

    Raises:
        SampleDropped: no answer, an empty one, or data that holds the two marking characters.
        AlignmentError: the template changes or drops an answer.
    """
    texts = [part for message in record.messages for part in message.parts if part]
    if any(OPEN in text or CLOSE in text for text in texts):
        raise SampleDropped("marking characters in the text", record.source)
    if not record.answers or not all(record.answers):
        raise SampleDropped("empty answer" if record.answers else "no answer", record.source)
    marked = [_marked(message, supervise) for message in record.messages]
    kinds = iter([image.kind for image in record.images])
    messages = [_message(m.role, parts, form, kinds)
                for m, parts in zip(record.messages, marked, strict=True)]
    raw = apply_template(processor, messages, record.source)
    owners = [_owner(message.role == "assistant", part)
              for message, parts in zip(record.messages, marked, strict=True)
              for part in parts if part is not None and OPEN in part]
    return _unmark(raw, owners, record.source)


def render_prompt(
    processor: Processor, record: Record, turn: int, form: ContentForm
) -> str:
    """The conversation up to the assistant's `turn`-th answer, ready to be continued."""
    messages, kinds = [], iter([image.kind for image in record.images])
    for message in record.before(turn):
        answer = message.role == "assistant"
        parts: list[str | None] = [message.text.strip()] if answer else list(message.parts)
        messages.append(_message(message.role, parts, form, kinds))
    return apply_template(processor, messages, record.source, add_generation_prompt=True)


def apply_template(
    processor: Processor, messages: list[dict[str, Any]], source: str, **options: Any
) -> str:
    try:
        return processor.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # jinja raises its own errors, templates raise theirs
        raise SampleDropped("chat template refused", f"{source}: {error}") from None


def _marked(message: Any, supervise: Supervise) -> list[str | None]:
    if message.role == "assistant":
        answer = message.text.strip()
        thought = THOUGHT.match(answer)  # a template that takes thoughts apart drops what is before
        start = thought.end() if thought else 0
        return [answer[:start] + OPEN + answer[start:] + CLOSE]
    if supervise == "answers":
        return list(message.parts)
    return [_around(part) if part and part.strip() else part for part in message.parts]


def _owner(is_answer: bool, part: str) -> tuple[bool, str, str]:
    """Whose text is marked: what belongs to it before the mark, and after."""
    before, after = part.split(OPEN)
    return is_answer, before if is_answer else "", after[: after.index(CLOSE)]


def _around(part: str) -> str:
    """The marks inside the outer whitespace, so that a template's `| trim` still trims."""
    core = part.strip()
    before, after = part.split(core, 1)
    return before + OPEN + core + CLOSE + after


def _message(
    role: str, parts: list[str | None], form: ContentForm, kinds: Iterator[str] | None = None
) -> dict[str, Any]:
    """`kinds`: of the pictures that stand where a part is None, "image" or "video"."""
    if form == "string":
        return {"role": role, "content": "".join(part for part in parts if part is not None)}
    kinds = kinds or itertools.repeat("image")
    content = [{"type": next(kinds)} if part is None else {"type": "text", "text": part}
               for part in parts]
    return {"role": role, "content": content}


def _unmark(raw: str, owners: list[tuple[bool, str, str]], source: str) -> Rendered:
    pieces: list[str] = []
    spans: list[TextSpan] = []
    length, start, turn = 0, 0, -1
    for piece in re.split(f"([{OPEN}{CLOSE}])", raw):
        if piece == OPEN:
            start = length
        elif piece == CLOSE:
            is_answer, before, _ = owners[len(spans)] if len(spans) < len(owners) else (
                False, "", "")
            turn += is_answer
            spans.append(TextSpan(start - len(before), length, max(turn, 0), is_answer))
        else:
            pieces.append(piece)
            length += len(piece)
    text = "".join(pieces)
    if [text[span.start : span.end] for span in spans] != [a + b for _, a, b in owners]:
        raise AlignmentError(
            f"{source}: the chat template changes or drops part of an answer, so the answer's "
            "tokens cannot be found; use a template that prints answers as they are."
        )
    return Rendered(text, tuple(spans))
