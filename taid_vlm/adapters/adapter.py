"""Modality adapters: how one model sees a record, and where the answer's tokens are in it.

Two implementations of one interface: `TextAdapter` for any causal LM, `ImageTextAdapter` for any
model with a transformers processor. Both give padded model inputs and, for every row, the byte
span of each supervised token relative to its answer, which is all that alignment needs.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from taid_vlm.adapters.template import (
    ContentForm,
    Processor,
    Rendered,
    Supervise,
    TextSpan,
    content_form,
    has_chat_template,
    render,
    render_prompt,
)
from taid_vlm.adapters.tokens import TokenTable, tile, token_table
from taid_vlm.errors import AlignmentError, SampleDropped, TaidError
from taid_vlm.records import Message, Record

Side = Literal["left", "right"]
# whether a template's space is glued to an answer depends on the word having such a token
PROBE_WORDS = ("yes", "The", "the", "a", "is", "in", "It", "A")


@dataclass(frozen=True)
class AnswerToken:
    """One token of a supervised text.

    position: index in the padded row (the predicting position is the one before).
    start, end: bytes of the answer it covers, relative to the answer's start.
    prefix, suffix: bytes of template text glued to it before or after the answer.
    """

    position: int
    start: int
    end: int
    prefix: bytes = b""
    suffix: bytes = b""


@dataclass(frozen=True)
class AnswerSpan:
    """One supervised text as this model's tokens.

    end_of_turn: position of the special token that closes it, or None; `tail` are the template's
        bytes between the two.
    """

    turn: int
    is_answer: bool
    tokens: tuple[AnswerToken, ...]
    end_of_turn: int | None
    tail: bytes = b""


@dataclass(frozen=True)
class EncodedRow:
    """One record in one model's tokens, without padding; `offset` is the padding on its left."""

    ids: list[int]
    offset: int
    text: str
    byte_spans: list[tuple[int, int]]
    answers: tuple[AnswerSpan, ...]
    images: tuple[tuple[int, int], ...]  # byte spans of the expanded images


@dataclass(frozen=True)
class EncodedBatch:
    """Padded inputs of one model, and its rows."""

    inputs: dict[str, Tensor]
    rows: list[EncodedRow]


class ModelAdapter:
    """The interface; `_process` is what the two implementations differ in.

    Args:
        processor: a tokenizer or a processor; its pad token is set where it has none.
        role: "teacher" or "student", for messages.
        max_length: tokens a row may have after image expansion; longer conversations are
            dropped and counted, longer plain texts are cut at the end and counted.

    Raises:
        TaidError: a chat template that does not print answers faithfully.
    """

    prefer: ContentForm = "string"
    sees_images = False

    def __init__(self, processor: Processor, role: str, max_length: int | None = None) -> None:
        self.processor, self.role, self.max_length = processor, role, max_length
        self.tokenizer: PreTrainedTokenizerBase = getattr(processor, "tokenizer", processor)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or "<pad>"
        self.table: TokenTable = token_table(self.tokenizer)
        self.form: ContentForm | None = None
        if has_chat_template(processor):
            self.form = content_form(processor, self.prefer, role)

    # ----- rendering ------------------------------------------------------------------------

    def render(self, record: Record, supervise: Supervise = "answers") -> Rendered:
        """The record as this model's text; raises SampleDropped where it cannot be used."""
        if record.images and not self.sees_images:
            raise TaidError(
                f"{record.source} holds an image, but the {self.role} is a text model and cannot "
                f"see it; choose a {self.role} with vision, or text records."
            )
        if record.text is not None:
            return self._render_text(record.text, record.source)
        if self.form is None:
            return self._render_without_template(record)
        return self._after_template(render(self.processor, record, self.form, supervise))

    def _after_template(self, rendered: Rendered) -> Rendered:
        """For tokenizers the template is all there is; processors may add a BOS."""
        return rendered

    def _render_text(self, text: str, source: str) -> Rendered:
        """A plain document: everything is learned, and then that it ends."""
        if not text.strip():
            raise SampleDropped("empty text", source)
        return self._with_special(Rendered(text, (TextSpan(0, len(text), 0, True),)), ends=True)

    def _render_without_template(self, record: Record) -> Rendered:
        """A base model: one question and one answer, simply joined."""
        roles = [message.role for message in record.messages]
        if roles != ["user", "assistant"]:
            raise TaidError(
                f"{record.source} is a conversation ({', '.join(roles)}), but the {self.role} has "
                f"no chat template; set {self.role}.chat_template."
            )
        prompt, completion = (message.text for message in record.messages)
        answer = completion.strip()
        if not answer:
            raise SampleDropped("empty answer", record.source)
        prompt += completion[: completion.index(answer[0])]  # the space before the answer
        span = TextSpan(len(prompt), len(prompt) + len(answer), 0, True)
        return self._with_special(Rendered(prompt + answer, (span,)), ends=True)

    def cut(self, rendered: Rendered, row: EncodedRow) -> Rendered:
        """A plain text shortened to `max_length` tokens (without the end that it now lacks)."""
        assert self.max_length is not None
        (span,), (answer,) = rendered.spans, row.answers
        kept = (t.end for t in answer.tokens if t.position - row.offset < self.max_length)
        whole = rendered.text[span.start : span.end].encode()
        text = whole[: max(kept, default=0)].decode(errors="ignore")
        bos = self._added_bos
        return Rendered(bos + text, (TextSpan(len(bos), len(bos) + len(text), 0, True),))

    def _with_special(self, rendered: Rendered, ends: bool = False) -> Rendered:
        """Let the tokenizer add its BOS; where a document `ends`, make sure that an EOS follows."""
        eos = self.tokenizer.eos_token or ""
        text = rendered.text + (eos if ends and not self._adds_eos else "")
        return Rendered(text, rendered.spans, add_special=self._adds_bos or self._adds_eos)

    def _alike(self, rendered: Sequence[Rendered]) -> tuple[Sequence[Rendered], bool]:
        """One setting of `add_special_tokens` for the batch.

        Where rows differ (chats beside plain texts), the special tokens are written out instead.
        """
        flags = {item.add_special for item in rendered}
        if len(flags) == 1:
            return rendered, flags.pop()
        return [self._written_out(item) if item.add_special else item for item in rendered], False

    def _written_out(self, rendered: Rendered) -> Rendered:
        bos, eos = self._added_bos, (self.tokenizer.eos_token or "") if self._adds_eos else ""
        spans = tuple(TextSpan(s.start + len(bos), s.end + len(bos), s.turn, s.is_answer)
                      for s in rendered.spans)
        return Rendered(bos + rendered.text + eos, spans)

    @cached_property
    def _adds_bos(self) -> bool:
        ids = self.tokenizer("a")["input_ids"]
        return self.tokenizer.bos_token_id is not None and ids[0] == self.tokenizer.bos_token_id

    @property
    def _added_bos(self) -> str:
        """What the tokenizer puts before a text by itself, as text."""
        return (self.tokenizer.bos_token or "") if self._adds_bos else ""

    @cached_property
    def _adds_eos(self) -> bool:
        return self.tokenizer("a")["input_ids"][-1] == self.tokenizer.eos_token_id

    # ----- encoding -------------------------------------------------------------------------

    def encode(
        self,
        rendered: Sequence[Rendered],
        images: Sequence[Sequence[Image.Image]],
        padding_side: Side = "right",
    ) -> EncodedBatch:
        """Tokenize a batch.

        Returns:
            Inputs with leading dimension len(rendered) where the model has one (image tensors of
            some families are flat over all images), and one EncodedRow per row.

        Raises:
            AlignmentError: a row whose tokens do not spell its text.
        """
        rendered, add_special = self._alike(rendered)
        texts = [item.text for item in rendered]
        inputs, replacements = self._process(texts, images, padding_side, add_special)
        mask = inputs["attention_mask"].bool()
        rows = []
        for index, item in enumerate(rendered):
            offset = int(mask[index].int().argmax())
            ids = inputs["input_ids"][index][mask[index]].tolist()
            rows.append(self._row(item, ids, offset, replacements[index]))
        return EncodedBatch(inputs, rows)

    def encode_prompts(
        self, records: Sequence[tuple[Record, int]], images: Sequence[Sequence[Image.Image]]
    ) -> dict[str, Tensor]:
        """Left-padded inputs of conversations cut before their `turn`-th answer."""
        rendered = [self._prompt(record, turn) for record, turn in records]
        alike, add_special = self._alike(rendered)
        return self._process([item.text for item in alike], images, "left", add_special)[0]

    def _prompt(self, record: Record, turn: int) -> Rendered:
        if self.form is not None:
            text = render_prompt(self.processor, record, turn, self.form)
            prompt = self._after_template(Rendered(text, ()))
        else:
            text = record.messages[0].text if record.messages else ""
            prompt = Rendered(text, (), add_special=self._adds_bos)
        if not (prompt.add_special and self._adds_eos):
            return prompt
        return Rendered(self._added_bos + text, ())  # an EOS would end what is to be continued

    def _process(
        self, texts: list[str], images: Sequence[Sequence[Image.Image]], padding_side: Side,
        add_special: bool,
    ) -> tuple[dict[str, Tensor], list[list[dict[str, Any]]]]:
        """Padded inputs, and per row the image expansions ({span, new_span, replacement})."""
        raise NotImplementedError

    def _row(
        self, rendered: Rendered, ids: list[int], offset: int, expansions: list[dict[str, Any]]
    ) -> EncodedRow:
        text, shift = _expand(rendered.text, expansions)
        to_byte = _byte_index(text)
        byte_spans = tile(self.table, ids, text)
        data = text.encode()
        answers = tuple(
            self._answer(span, to_byte[shift(span.start)], to_byte[shift(span.end)], ids, offset,
                         byte_spans, data)
            for span in rendered.spans
        )
        images = tuple((to_byte[e["new_span"][0]], to_byte[e["new_span"][1]]) for e in expansions)
        return EncodedRow(ids, offset, text, byte_spans, answers, images)

    def _answer(
        self, span: TextSpan, start: int, end: int, ids: list[int], offset: int,
        byte_spans: list[tuple[int, int]], data: bytes,
    ) -> AnswerSpan:
        index = bisect.bisect_right(byte_spans, start, key=lambda covered: covered[1])
        tokens = []
        while index < len(ids) and byte_spans[index][0] < end:
            a, b = byte_spans[index]
            if b > a:
                if self.table.text[ids[index]] is None:
                    raise SampleDropped("special token inside an answer", repr(data[a:b]))
                tokens.append(AnswerToken(
                    index + offset, max(a, start) - start, min(b, end) - start,
                    prefix=data[a:start], suffix=data[end:b],
                ))
            index += 1
        ends_at = self._end_of_turn(ids, index) if span.is_answer else None
        if ends_at is None:
            return AnswerSpan(span.turn, span.is_answer, tuple(tokens), None)
        tail = data[end : max(end, byte_spans[ends_at][0])]
        return AnswerSpan(span.turn, True, tuple(tokens), ends_at + offset, tail)

    def _end_of_turn(self, ids: list[int], index: int) -> int | None:
        """The special token that closes the answer; spaces may stand before it."""
        while index < len(ids):
            token = self.table.text[ids[index]]
            if token is None:
                return index
            if token.strip():
                return None
            index += 1
        return None

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """The special token this model ends an answer with."""
        if self.form is None:
            return self.tokenizer.eos_token_id
        row = next(filter(None, map(self.probe, PROBE_WORDS)), None)
        if row is None:
            return self.tokenizer.eos_token_id
        position = row.answers[0].end_of_turn
        return None if position is None else row.ids[position - row.offset]

    def probe(self, answer: str) -> EncodedRow | None:
        """A small conversation in this model's tokens, to read its conventions off.

        None if the tokenizer cannot spell it.
        """
        messages = (Message("user", (answer,)), Message("assistant", (answer,)))
        record = Record("probe", messages)
        try:
            return self.encode([self.render(record)], [[]]).rows[0]
        except (AlignmentError, SampleDropped):
            return None


class TextAdapter(ModelAdapter):
    """Any causal language model with its tokenizer."""

    def _process(self, texts, images, padding_side, add_special):  # type: ignore[no-untyped-def]
        encoded = self.tokenizer(
            texts, padding=True, padding_side=padding_side, return_tensors="pt",
            add_special_tokens=add_special,
        )
        return dict(encoded), [[] for _ in texts]


class ImageTextAdapter(ModelAdapter):
    """Any model with a processor that expands image placeholders."""

    prefer: ContentForm = "parts"
    sees_images = True

    def __init__(self, processor: Processor, role: str, max_length: int | None = None) -> None:
        super().__init__(processor, role, max_length)
        if self.form is None:
            raise TaidError(f"{role}: the processor has no chat template; set "
                            f"{role}.chat_template to a jinja file.")
        if self.form == "string":
            raise TaidError(f"{role}: the chat template prints no typed parts, so images cannot be "
                            f"placed; set {role}.chat_template to one that does.")

    def _after_template(self, rendered: Rendered) -> Rendered:
        """As ProcessorMixin.apply_chat_template: a BOS unless the template wrote one."""
        bos = self.tokenizer.bos_token
        return rendered if bos and rendered.text.startswith(bos) else self._with_special(rendered)

    def _process(self, texts, images, padding_side, add_special):  # type: ignore[no-untyped-def]
        given = [list(row) for row in images] if any(images) else None
        with _recorded_expansions(self.processor) as expansions:
            encoded = self.processor(
                text=list(texts), images=given, padding=True, padding_side=padding_side,
                add_special_tokens=add_special, return_tensors="pt", return_mm_token_type_ids=True,
            )
        inputs = {key: value for key, value in encoded.items() if isinstance(value, Tensor)}
        return inputs, expansions or [[] for _ in texts]


@contextlib.contextmanager
def _recorded_expansions(processor: Any) -> Iterator[list[list[dict[str, Any]]]]:
    """Where the processor replaces an image's placeholder by its tokens, per row.

    `return_text_replacement_offsets=True` gives the same, but some processors (InternVL) then try
    to turn the offsets into a tensor and fail, so they are taken where they are computed.
    """
    replace, recorded = processor.get_text_with_replacements, []

    def spy(*args: Any, **kwargs: Any) -> Any:
        text, offsets = replace(*args, **kwargs)
        recorded.extend(offsets)
        return text, offsets

    processor.get_text_with_replacements = spy
    try:
        yield recorded
    finally:
        del processor.get_text_with_replacements


def make_adapter(processor: Processor, role: str, max_length: int | None = None) -> ModelAdapter:
    """TextAdapter for a tokenizer, ImageTextAdapter for a processor."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return TextAdapter(processor, role, max_length)
    if isinstance(processor, ProcessorMixin) and hasattr(processor, "tokenizer"):
        return ImageTextAdapter(processor, role, max_length)
    raise TaidError(
        f"{role}: {type(processor).__name__} is neither a tokenizer nor a processor with one."
    )


def _expand(text: str, expansions: list[dict[str, Any]]):  # type: ignore[no-untyped-def]
    """The text after image expansion, and a function from old to new character offsets."""
    ends = [e["span"][1] for e in expansions]
    gains = [0, *(e["new_span"][1] - e["span"][1] for e in expansions)]
    for e in reversed(expansions):
        text = text[: e["span"][0]] + e["replacement"] + text[e["span"][1] :]
    return text, lambda offset: offset + gains[bisect.bisect_right(ends, offset)]


def _byte_index(text: str) -> list[int]:
    """Byte offset of every character, and of the end."""
    if text.isascii():
        return list(range(len(text) + 1))
    offsets, total = [0], 0
    for character in text:
        total += len(character.encode())
        offsets.append(total)
    return offsets


def check_spelled(adapter: ModelAdapter, text: str) -> list[tuple[int, int]]:
    """Byte spans of a bare text in this model's tokens; raises AlignmentError."""
    ids = adapter.tokenizer(text, add_special_tokens=False)["input_ids"]
    return [span for span in tile(adapter.table, ids, text) if span[1] > span[0]]
