"""An answer that a model gave itself: its own tokens, and the record in which it stands.

The tokens are kept as they were drawn: a text has many spellings in tokens, and the one that a
tokenizer would choose need not be the one that the model was at. What another model is shown is
the text, through its own template.
"""

from __future__ import annotations

import codecs
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from taid_vlm.adapters.adapter import ModelAdapter
from taid_vlm.adapters.specials import CONTROL, refuse_media_tokens
from taid_vlm.adapters.template import OPENS_THOUGHT, Rendered, TextSpan
from taid_vlm.adapters.turns import THOUGHT, places_in
from taid_vlm.errors import SampleDropped
from taid_vlm.records import Message, Record

EMPTY, OPEN_THOUGHT = "empty", "cut in its thought"
CYCLE, REPEATED = 8, 24  # an answer repeats itself if the last so many (second) tokens are copies
# of at most so many (first)


@dataclass(frozen=True)
class Continuation:
    """A record with one of its answers given anew.

    turn: which answer. ids: its tokens, without the one that ends it. end: that one, None where the
    answer was cut.
    """

    record: Record
    turn: int
    ids: tuple[int, ...]
    end: int | None

    @property
    def source(self) -> str:
        return self.record.source


def repeating(ids: Sequence[Hashable]) -> bool:
    """Whether an answer ends in copies of a few tokens."""
    last = list(ids[-REPEATED:])
    return len(last) == REPEATED and any(
        last[cycle:] == last[:-cycle] for cycle in range(1, CYCLE + 1))


def continued_record(
    adapter: ModelAdapter, continuation: Continuation
) -> tuple[Record, Rendered]:
    """The record up to the answer, with the answer as the last message and the only one that is
    learned; and how the model that gave it sees it.

    Raises:
        SampleDropped: an answer that is empty or no text, holds a token that ends or begins
            something else, or was cut inside a thought that the prompt had opened.
    """
    record, turn = continuation.record, continuation.turn
    prompt = adapter.prompt(record, turn)
    ids, said = _text(adapter, continuation)
    space = min(len(said) - len(said.lstrip()), adapter.head_space)
    opened = OPENS_THOUGHT.search(prompt.text)
    opening = opened.group(0) if opened else ""
    whole = opening + said[space:]
    if not said.strip():
        raise SampleDropped(EMPTY, record.source)
    if opening and not THOUGHT.match(whole):
        raise SampleDropped(OPEN_THOUGHT, record.source)
    spoken = [message for message in record.messages if message.role == "assistant"]
    answer = Message("assistant", (whole,), spoken[turn].weight)
    earlier = [replace(message, weight=0.0) for message in record.before(turn)]
    new = replace(record, messages=(*earlier, answer), images=record.images_before(turn))
    refuse_media_tokens(new, adapter.media_tokens, adapter.role)
    start = len(prompt.text) + space
    pieces = tuple((kind, start - len(opening) + a, start - len(opening) + b)
                   for kind, a, b in places_in(whole, answer))
    span = TextSpan(start, len(prompt.text) + len(said), turn, True, answer.weight, pieces)
    end = () if continuation.end is None or len(ids) < len(continuation.ids) else (
        continuation.end,)
    closing = b"".join(adapter.table.literal[index] for index in end).decode()
    return new, replace(prompt, text=prompt.text + said + closing, spans=(span,),
                        own=(*ids, *end), own_at=len(prompt.text))


def _text(adapter: ModelAdapter, continuation: Continuation) -> tuple[tuple[int, ...], str]:
    """The longest beginning of the answer that is text, and the tokens that spell it: tokens can
    be parts of characters, and a student can say what is none."""
    ids, table = continuation.ids, adapter.table
    if any(index >= len(table) or index in adapter.unsayable for index in ids):
        raise SampleDropped(CONTROL, f"{continuation.source}: sampled by the {adapter.role}")
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, kept, said = "", 0, ""
    for count, index in enumerate(ids, 1):
        try:
            said += decoder.decode(table.literal[index])
        except UnicodeDecodeError:
            break
        if not decoder.getstate()[0]:  # no begun character waits
            text, kept = said, count
    return ids[:kept], text
