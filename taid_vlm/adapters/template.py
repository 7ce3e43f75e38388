"""Rendering a record through a model's own chat template, knowing where the answers stand.

The trick works with any template: each supervised text is wrapped in two private-use characters,
the template renders, the characters are taken out again, and their places are the spans.
(`return_assistant_tokens_mask` needs `{% generation %}` marks that almost no real template has,
and gives an all-zero mask without a word otherwise.) What marks cannot hold, tool calls and the
space around a text, is what the same conversation prints where another word stands in the turn.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from reprlib import repr as shown
from typing import Any

from taid_vlm.adapters.turns import (
    CLOSE,
    CLOSE_THOUGHT,
    MARKS,
    OPEN,
    OPEN_THOUGHT,
    ContentForm,
    Marked,
    Processor,
    Style,
    Supervise,
    chat_message,
    has_thought,
    is_thoughtful,
    kinds_of,
    marked_texts,
    style_of,
    without_thought,
)
from taid_vlm.errors import AlignmentError, SampleDropped, TaidError
from taid_vlm.records import Message, Record
from taid_vlm.records.messages import as_json

NO_TOOLS = "tools for a chat template without"
NOT_PRINTED = "not printed by the chat template"
PRINTED_DIFFERENTLY = "printed differently by the two chat templates"
PARTLY = "answers that the two chat templates print differently: what both print is compared"
WHOLE = "whole"
BESIDE_CALL = "text beside a tool call that the {}'s chat template does not print"
THOUGHT_GONE = "a thought that the {}'s chat template takes out of an earlier turn"
OPENS_THOUGHT = re.compile(r"(<\|?think(ing)?\|?>|<thought>|<reasoning>|\[THINK\]"
                            r"|<\|channel>thought|<\|channel\|>analysis<\|message\|>)\s*\Z")
_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*\Z")


@dataclass(frozen=True)
class TextSpan:
    """Characters [start, end) of one supervised text; `turn` counts the assistant's answers.

    weight: a factor of its tokens' losses.
    pieces: (name, start, end) of what other templates may print, too, but with other text between:
        a thought, a text without the space around it, a call's name and arguments.
    """

    start: int
    end: int
    turn: int
    is_answer: bool
    weight: float = 1.0
    pieces: tuple[tuple[str, int, int], ...] = ()

    def shifted(self, by: int) -> TextSpan:
        return replace(self, start=self.start + by, end=self.end + by,
                       pieces=tuple((name, a + by, b + by) for name, a, b in self.pieces))


@dataclass(frozen=True)
class Rendered:
    """A record as one model sees it, before its processor expands the images.

    add_special: whether the tokenizer is to add its own BOS (and EOS) around the text.
    notes: what of the record this model does not see, in words.
    own: token ids of all that stands behind the `own_at`-th character, where they are not the
        tokenizer's to choose.
    """

    text: str
    spans: tuple[TextSpan, ...]
    add_special: bool = False
    notes: tuple[str, ...] = ()
    own: tuple[int, ...] = ()
    own_at: int = 0

    def to_tokenize(self) -> Rendered:
        """What of it the tokenizer splits."""
        return replace(self, text=self.text[: self.own_at], spans=()) if self.own else self


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
    probe = (Message("user", ("probe question",)), Message("assistant", ("probe answer",)))
    for form in forms:
        style = Style(form)
        try:
            text = processor.apply_chat_template(
                [chat_message(message, style) for message in probe], tokenize=False)
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
        text = apply_template(processor, [chat_message(
            Message("user", (None, "probe")), Style("parts"), kinds=iter(["video"]))],
            Record("probe"), {})
    except SampleDropped:
        return False
    return text.count(token) == 1 and "'type'" not in text


def render(
    processor: Processor, record: Record, form: ContentForm, supervise: Supervise = "answers",
    kwargs: Mapping[str, Any] | None = None, role: str = "model",
) -> Rendered:
    """Render a conversation; spans are the assistant's texts, or all texts.

    Args:
        kwargs: variables for the template.
        role: whose template it is, for messages.

    Raises:
        SampleDropped: no answer, an empty one, data that holds the marking characters, or
            something that the template does not print.
        AlignmentError: the template changes or drops an answer.
    """
    _check(record, role)
    return _Rendering(processor, record, style_of(processor, form), supervise, kwargs or {},
                      role).rendered()


def render_prompt(
    processor: Processor, record: Record, turn: int, form: ContentForm,
    kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The conversation up to the assistant's `turn`-th answer, ready to be continued."""
    style = style_of(processor, form)
    kinds = kinds_of(record)
    messages = [chat_message(message, style, kinds=kinds) for message in record.before(turn)]
    return apply_template(processor, messages, record, kwargs or {}, add_generation_prompt=True)


def apply_template(
    processor: Processor, messages: list[dict[str, Any]], record: Record,
    kwargs: Mapping[str, Any], **options: Any
) -> str:
    tools: dict[str, Any] = {"tools": list(record.tools)} if record.tools else {}
    try:
        return processor.apply_chat_template(
            messages, tokenize=False, **tools, **kwargs, **options)
    except Exception as error:  # jinja raises its own errors, templates raise theirs
        raise SampleDropped("chat template refused", f"{record.source}: {error}") from None


def _check(record: Record, role: str) -> None:
    texts = [part for message in record.messages for part in (*message.parts, message.thought)
             if part]
    if any(mark in text for text in texts for mark in MARKS):
        raise SampleDropped("marking characters in the text", record.source)
    answers = [message for message in record.messages if message.role == "assistant"]
    if not answers:
        raise SampleDropped("no answer", record.source)
    if not record.learned:
        raise SampleDropped("no answer is learned", f"{record.source}: every one weighs 0")
    if any(message.weight and message.is_empty for message in answers):
        raise SampleDropped("empty answer", record.source)


# ----- one record ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where a marked text is printed."""

    marked: Marked
    start: int
    end: int


@dataclass(frozen=True)
class _Rendering:
    """One record on its way through a template."""

    processor: Processor
    record: Record
    style: Style
    supervise: Supervise
    kwargs: Mapping[str, Any]
    role: str

    def rendered(self) -> Rendered:
        if self.record.tools and "tools" not in self.style.variables:
            raise SampleDropped(NO_TOOLS, f"{self.record.source} has tools, but the {self.role}'s "
                                "chat template prints none")
        text, marks = _unmark(self._raw(marked=True))
        expected = [each for index, message in enumerate(self.record.messages)
                    if self._is_marked(message)
                    for each in marked_texts(index, message)]
        places = self._matched(marks, text, expected)
        self._check_printed(text)
        gone = [marked for marked in expected if marked not in {each.marked for each in places}]
        notes = dict.fromkeys(self._gone(marked).format(self.role) for marked in gone)
        return Rendered(text, tuple(self._spans(text, places)), notes=tuple(notes))

    def _gone(self, marked: Marked) -> str:
        """What it means that a marked text is not printed."""
        messages = self.record.messages
        earlier = any(message.role == "assistant" for message in messages[marked.message + 1 :])
        thought = marked.kind == "thought" and earlier
        return BESIDE_CALL if messages[marked.message].calls and not thought else THOUGHT_GONE

    def _is_marked(self, message: Message) -> bool:
        """Whether a message is learned. What tools say is context, whatever is supervised."""
        said = message.role == "assistant" or (
            self.supervise == "all" and message.role != "tool")
        return said and message.weight > 0

    def _raw(self, marked: bool, stand_ins: Mapping[int, Message] | None = None,
             end: int | None = None, **options: Any) -> str:
        """The first `end` messages as printed, those of `stand_ins` with a word for their text."""
        others, kinds = stand_ins or {}, kinds_of(self.record)
        messages = [
            chat_message(others.get(i, message), self.style, marked and self._is_marked(message),
                         i in others, kinds)
            for i, message in enumerate(self.record.messages[:end])]
        return apply_template(self.processor, messages, self.record, self.kwargs, **options)

    def _matched(
        self, marks: Sequence[tuple[str, int, int]], text: str, expected: Sequence[Marked]
    ) -> list[_Place]:
        """Every mark's text; what may be left out are thoughts of earlier turns, and what stands
        beside a call."""
        printed = [(kind, text[start:end]) for kind, start, end in marks]
        wanted = [(marked.kind, marked.text) for marked in expected]
        kept: list[int] | None = list(range(len(wanted)))
        if printed != wanted:
            kept = _subsequence(printed, wanted, [not self._may_lack(each) for each in expected])
        if kept is None:
            raise self._unfaithful()
        return [_Place(expected[index], start, end)
                for index, (_, start, end) in zip(kept, marks, strict=True)]

    def _may_lack(self, marked: Marked) -> bool:
        message, *later = self.record.messages[marked.message :]
        earlier = any(each.role == "user" for each in later)
        return bool(message.calls) or (marked.kind == "thought" and earlier)

    def _unfaithful(self) -> AlignmentError:
        return AlignmentError(
            f"{self.record.source}: the {self.role}'s chat template changes or drops part of an "
            "answer, so the answer's tokens cannot be found.",
            mend=f"Set {self.role}.chat_template to one that prints answers as they are, or write "
                 "thoughts as it takes them (<think>...</think> in front, or reasoning_content).")

    def _check_printed(self, text: str) -> None:
        """What answers follow on must be there; and marks must have changed nothing."""
        for message in self.record.messages:
            texts = [call["function"]["name"] for call in message.calls]
            if message.role != "assistant":
                texts += [part.strip() for part in message.parts if part]
            for each in texts:
                if each not in text and as_json(each)[1:-1] not in text:
                    raise self._not_printed("a call" if message.calls else "text", message, each)
        marked = any(m.calls or has_thought(m) for m in self.record.messages)
        if marked and self._raw(marked=False) != text:
            raise self._unfaithful()

    def _not_printed(self, what: str, message: Message, text: str) -> SampleDropped:
        return SampleDropped(NOT_PRINTED, f"{self.record.source}: {what} of a {message.role} "
                             f"message, by the {self.role}'s: {shown(text)}")

    # ----- spans ----------------------------------------------------------------------------

    def _spans(self, text: str, places: Sequence[_Place]) -> Iterator[TextSpan]:
        thinking = {place.marked.message for place in places if place.marked.kind == "thought"}
        regions, turn = self._regions(text, thinking), -1
        for index, message in enumerate(self.record.messages):
            own = [place for place in places if place.marked.message == index]
            answers = message.role == "assistant"
            turn += answers
            if answers and self._is_marked(message):
                yield self._answer(text, message, own, turn, regions.get(index))
            elif not answers:
                for place in own:
                    yield TextSpan(place.start, place.end, max(turn, 0), False, message.weight)

    def _answer(
        self, text: str, message: Message, places: Sequence[_Place], turn: int,
        region: tuple[int, int] | None,
    ) -> TextSpan:
        """One answer, from its thought to its last call, with all that is printed between."""
        start, end = region or (places[-1].start, places[-1].end)
        if places:
            start, end = min(start, places[0].start), max(end, places[-1].end)
        opens = OPENS_THOUGHT if places and places[0].marked.kind == "thought" else \
            _EMPTY_THOUGHT if has_thought(message) and not is_thoughtful(message) else None
        if opens is not None and (match := opens.search(text, max(0, start - 40), start)):
            start = match.start()
        for call in message.calls:
            if call["function"]["name"] not in text[start:end]:
                raise self._not_printed("a call", message, call["function"]["name"])
        pieces = [(str(place.marked.kind), place.start, place.end) for place in places]
        cursor = places[-1].end if places else start
        for number, call in enumerate(message.calls):
            for name, value in call["function"].items():
                at = text.find(as_json(value), cursor, end)
                if at >= 0:
                    cursor = at + len(as_json(value))
                    pieces.append((f"call {number}: {name}", at, cursor))
        return TextSpan(start, end, turn, True, message.weight, tuple(pieces))

    def _regions(self, text: str, thinking: Collection[int]) -> dict[int, tuple[int, int]]:
        """Where answers with calls, or with space around them, begin and end.

        Args:
            thinking: the messages whose thoughts are printed.
        """
        indices = {index: message if index in thinking else Message("assistant", ())
                   for index, message in enumerate(self.record.messages)
                   if message.role == "assistant" and self._is_marked(message)
                   and (message.calls or message.text != message.text.strip())}
        if not indices:
            return {}
        try:
            around = list(_around(self._raw(marked=False, stand_ins=indices)))
        except SampleDropped:  # a template may want calls before their results
            around = []
        regions = dict(zip(indices, _between(text, around), strict=False))
        return {index: regions[index] if len(regions) == len(indices) == len(around) - 1
                and not self._holds_results(text, index, *regions[index])
                else self._as_printed(thinking, index)._after_prompt(text, stand_in)
                for index, stand_in in indices.items()}

    def _as_printed(self, thinking: Collection[int], last: int) -> _Rendering:
        """The conversation up to one answer, without the thoughts that the whole does not print:
        where nothing follows, a template may print them."""
        messages = tuple(
            without_thought(message) if message.role == "assistant" and index not in thinking
            and self._is_marked(message) and is_thoughtful(message) else message
            for index, message in enumerate(self.record.messages[: last + 1]))
        return replace(self, record=replace(self.record, messages=messages))

    def _holds_results(self, text: str, index: int, start: int, end: int) -> bool:
        """Whether a template prints what the tools said into the turn that called them."""
        results = itertools.takewhile(
            lambda message: message.role == "tool", self.record.messages[index + 1 :])
        if not any(message.text.strip() in text[start:end] for message in results):
            return False
        messages = tuple(  # a short result may stand in the call, too
            replace(message, parts=(OPEN + message.text + CLOSE,)) if message.role == "tool"
            else message for message in self.record.messages)
        marked, places = _unmark(replace(
            self, record=replace(self.record, messages=messages))._raw(marked=False))
        return marked != text or any(start <= place < end for _, place, _ in places)

    def _after_prompt(self, text: str, stand_in: Message) -> tuple[int, int]:
        """The same for the last answer, by what the conversation up to it prints."""
        last = len(self.record.messages) - 1
        before = self._raw(marked=False, end=last, add_generation_prompt=True)
        after, ending = self._raw(marked=False), ""
        with contextlib.suppress(SampleDropped):
            ending = list(_around(self._raw(False, {last: stand_in})))[-1]
        whole = after.removesuffix(ending)
        if not text.startswith(whole) or not whole.startswith(before) or whole == before:
            raise self._unfaithful()
        return len(before), len(whole)


def _subsequence(
    printed: Sequence[object], wanted: Sequence[object], needed: Sequence[bool]
) -> list[int] | None:
    """Which of `wanted` are printed, all that are `needed` among them; None if they are not.

    Where several ways are open, the later ones of what is equal count as printed.
    """
    open_, rows = {0}, []  # how many are printed so far, after each of the wanted
    for item, need in zip(wanted, needed, strict=True):
        rows.append(open_)
        taken = {n + 1 for n in open_ if n < len(printed) and printed[n] == item}
        open_ = taken if need else open_ | taken
    kept, number = list[int](), len(printed)
    if number not in open_:
        return None
    for index in range(len(wanted) - 1, -1, -1):
        if number and number - 1 in rows[index] and printed[number - 1] == wanted[index]:
            kept.append(index)
            number -= 1
    return kept[::-1]


def _around(raw: str) -> Iterator[str]:
    """What is printed before, between and after the words that stand in for answers."""
    for piece in re.split(f"{OPEN}[^{CLOSE}]*{CLOSE}", raw):
        yield re.sub(f"[{MARKS}]", "", piece)


def _between(text: str, around: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Where the text departs from what stands around; nothing from the first that is not there."""
    if not around or not text.startswith(around[0]):
        return
    start = len(around[0])
    for index, after in enumerate(around[1:], 1):
        last = index == len(around) - 1
        end = len(text) - len(after) if last and text.endswith(after) else text.find(after, start)
        if end < start or (last and end + len(after) != len(text)):
            return
        yield start, end
        start = end + len(after)


def _unmark(raw: str) -> tuple[str, list[tuple[str, int, int]]]:
    """The text without marks, and (kind, start, end) of what stood between them."""
    pieces: list[str] = []
    marks: list[tuple[str, int, int]] = []
    length = start = 0
    for piece in re.split(f"([{MARKS}])", raw):
        if piece in (OPEN, OPEN_THOUGHT):
            start = length
        elif piece in (CLOSE, CLOSE_THOUGHT):
            marks.append(("text" if piece == CLOSE else "thought", start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), marks


# ----- two templates ------------------------------------------------------------------------


def agree(rendered: Mapping[str, Rendered], source: str) -> dict[str, Rendered]:
    """One record in two templates, with spans of the same texts.

    Where one template prints an answer otherwise (its thought, its calls, the space around it),
    the pieces that both print remain.

    Raises:
        SampleDropped: an answer of which no piece is the same.
    """
    if len({len(each.spans) for each in rendered.values()}) != 1 or len(rendered) < 2:
        return dict(rendered)
    spans: dict[str, list[TextSpan]] = {role: [] for role in rendered}
    for together in zip(*(each.spans for each in rendered.values()), strict=True):
        texts = [_pieces(each.text, span)
                 for each, span in zip(rendered.values(), together, strict=True)]
        names = [name for name in texts[0]
                 if all(name in other and other[name][0] == texts[0][name][0] for other in texts)]
        if not names:
            raise SampleDropped(PRINTED_DIFFERENTLY, f"{source}: no part of an answer is the same "
                                f"text in the templates of {' and '.join(rendered)}")
        whole = names[0] == WHOLE
        for role, span, own in zip(rendered, together, texts, strict=True):
            spans[role] += [span] if whole else [
                replace(span, start=own[name][1], end=own[name][2], pieces=()) for name in names]
    return {role: replace(each, spans=tuple(spans[role]), notes=(
        *each.notes, *([PARTLY] if len(spans[role]) != len(each.spans) or any(
            a != b for a, b in zip(spans[role], each.spans, strict=False)) else [])))
        for role, each in rendered.items()}


def _pieces(text: str, span: TextSpan) -> dict[str, tuple[str, int, int]]:
    """The pieces of a span with their texts, the whole first."""
    named = ((WHOLE, span.start, span.end), *span.pieces)
    return {name: (text[start:end], start, end) for name, start, end in named}
