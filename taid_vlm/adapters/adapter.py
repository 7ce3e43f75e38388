"""Modality adapters: how one model sees a record, and where the answer's tokens are in it.

Two implementations of one interface: `TextAdapter` for any causal LM, `ImageTextAdapter` for any
model with a transformers processor (`families.py` has the exceptions). Both give padded model
inputs and, for every row, the byte span of each supervised token relative to its answer, which is
all that alignment needs.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from taid_vlm.adapters.encoded import (
    AnswerSpan,
    AnswerToken,
    EncodedBatch,
    EncodedRow,
    Side,
    byte_index,
    expand,
    with_continuations,
)
from taid_vlm.adapters.pictures import arguments
from taid_vlm.adapters.specials import CONTROL, control_ids, refuse_media_tokens
from taid_vlm.adapters.template import (
    Rendered,
    TextSpan,
    render,
    video_token_printed,
)
from taid_vlm.adapters.texts import PROBE_WORDS, Texts
from taid_vlm.adapters.tokens import tile
from taid_vlm.adapters.turns import (
    ContentForm,
    Processor,
)
from taid_vlm.errors import AlignmentError, SampleDropped, TaidError
from taid_vlm.records import Message, Record
from taid_vlm.records.videos import Picture


class ModelAdapter(Texts):
    """The interface; `_process` is what the two implementations differ in."""

    answer_type = 0  # what token_type_ids say of an answer's tokens

    # ----- encoding -------------------------------------------------------------------------

    def encode(
        self,
        rendered: Sequence[Rendered],
        images: Sequence[Sequence[Any]],
        padding_side: Side = "right",
        shown: bool = True,
    ) -> EncodedBatch:
        """Tokenize a batch.

        Args:
            images: of every row its pictures; where they are not `shown` the texts that the
                processor puts in their places, and the inputs are ids and attention mask alone.

        Returns:
            Inputs with leading dimension len(rendered) where the model has one (image tensors of
            some families are flat over all images), and one EncodedRow per row.

        Raises:
            AlignmentError: a row whose tokens do not spell its text.
        """
        rendered, add_special = self._alike(rendered)
        process = self._process if shown else self._expanded
        inputs, replacements = process(
            [item.to_tokenize() for item in rendered], images, padding_side, add_special)
        if any(item.own for item in rendered):
            inputs = with_continuations(inputs, [item.own for item in rendered], padding_side,
                                        self.tokenizer.pad_token_id, self.answer_type)
        inputs |= self._positions(inputs, padding_side)
        mask = inputs["attention_mask"].bool()
        rows = []
        for index, item in enumerate(rendered):
            offset = int(mask[index].int().argmax())
            ids = inputs["input_ids"][index][mask[index]].tolist()
            rows.append(self._row(item, ids, offset, replacements[index]))
        return EncodedBatch(inputs, rows)

    def encode_endings(
        self, rendered: Sequence[Sequence[Rendered]], images: Sequence[Sequence[Picture]]
    ) -> tuple[EncodedBatch, list[list[EncodedRow]]] | None:
        """Conversations that differ in their ends, with their pictures processed once.

        Returns:
            Right-padded inputs of every group's first conversation, and the rows of all; None where
            a processor makes other tokens of a text than its tokenizer does of the same text with
            its pictures expanded.

        Raises:
            AlignmentError: as `encode`.
        """
        alike, add_special = self._alike([item for group in rendered for item in group])
        rest = iter(alike)
        groups = [[next(rest) for _ in group] for group in rendered]
        firsts = [group[0] for group in groups]
        inputs, expansions = self._process(firsts, images, "right", add_special)
        mask, rows = inputs["attention_mask"].bool(), []
        for index, (group, own) in enumerate(zip(groups, expansions, strict=True)):
            texts = [expand(item.text, own)[0] for item in group]
            encoded = self.tokenizer(texts, add_special_tokens=add_special)["input_ids"]
            if encoded[0] != inputs["input_ids"][index][mask[index]].tolist():
                return None
            rows.append([self._row(*each, 0, own) for each in zip(group, encoded, strict=True)])
        return EncodedBatch(inputs, [group[0] for group in rows]), rows

    def _positions(self, inputs: Mapping[str, Tensor], padding_side: Side) -> dict[str, Tensor]:
        return {}

    def encode_prompts(
        self, records: Sequence[tuple[Record, int]], images: Sequence[Sequence[Picture]]
    ) -> dict[str, Tensor]:
        """Left-padded inputs of conversations cut before their `turn`-th answer."""
        for record, _ in records:
            refuse_media_tokens(record, self.media_tokens, self.role)
        rendered = [self.prompt(record, turn) for record, turn in records]
        alike, add_special = self._alike(rendered)
        return self._process(alike, images, "left", add_special)[0]

    def _process(
        self, rendered: Sequence[Rendered], images: Sequence[Sequence[Picture]],
        padding_side: Side, add_special: bool,
    ) -> tuple[dict[str, Tensor], list[list[dict[str, Any]]]]:
        """Padded inputs, and per row the image expansions ({span, new_span, replacement})."""
        raise NotImplementedError

    def _expanded(
        self, rendered: Sequence[Rendered], texts: Sequence[Sequence[str]],
        padding_side: Side, add_special: bool,
    ) -> tuple[dict[str, Tensor], list[list[dict[str, Any]]]]:
        """As `_process`, with what stands in the places of pictures known."""
        written, expansions = self.processor.get_text_with_replacements(
            [item.text for item in rendered], [text for row in texts for text in row])
        encoded = self.tokenizer(written, padding=True, padding_side=padding_side,
                                 add_special_tokens=add_special, return_tensors="pt")
        return ({key: encoded[key] for key in ("input_ids", "attention_mask")},
                expansions or [[] for _ in rendered])

    def _row(
        self, rendered: Rendered, ids: list[int], offset: int, expansions: list[dict[str, Any]]
    ) -> EncodedRow:
        text, shift = expand(rendered.text, expansions)
        to_byte = byte_index(text)
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
        first = bisect.bisect_right(byte_spans, start, key=lambda covered: covered[1])
        index = self._head_start(first, start, ids, byte_spans) if span.is_answer else first
        tokens: list[AnswerToken] = []
        while index < len(ids) and byte_spans[index][0] < end:
            a, b = byte_spans[index]
            special = self.table.text[ids[index]] is None
            if special and ids[index] in self.controls:
                if b == end and tokens:  # the end of a turn that a call has to itself
                    end = a
                    break
                raise SampleDropped(
                    CONTROL, f"{data[a:b].decode(errors='replace')!r} of the {self.role}")
            if b > a or index < first:
                tokens.append(AnswerToken(
                    index + offset, max(a - start, 0), max(min(b, end) - start, 0),
                    prefix=data[a : min(b, start)], suffix=data[end:b], special=special,
                ))
            index += 1
        ends_at = self._end_of_turn(ids, index) if span.is_answer else None
        if ends_at is None:
            return AnswerSpan(span.turn, span.is_answer, tuple(tokens), None, weight=span.weight)
        tail = data[end : max(end, byte_spans[ends_at][0])]
        return AnswerSpan(span.turn, True, tuple(tokens), ends_at + offset, tail, span.weight)

    def _head_start(
        self, index: int, start: int, ids: list[int], byte_spans: list[tuple[int, int]]
    ) -> int:
        """Index of the first token that has to be generated for an answer.

        Space that the template puts between prompt and answer, or that the tokenizer puts in front
        of a word, can be a token of its own ("Assistant:", " ", "21").
        """
        while index > 0:
            a, b = byte_spans[index - 1]
            token = self.table.text[ids[index - 1]]
            if token is None or token.strip() or not start - self.head_space <= a <= b <= start:
                break
            index -= 1
        return index

    @cached_property
    def head_space(self) -> int:
        """Bytes of whitespace between the generation prompt and an answer."""
        if self.form is None:
            return 0
        prompt_end, trained_end = self._before(PROBE_WORDS[0])
        head = trained_end.removeprefix(prompt_end)
        return 0 if head.strip() else len(head.encode())

    @cached_property
    def controls(self) -> frozenset[int]:
        """Special tokens that an answer cannot hold."""
        probe = next(filter(None, map(self.probe, PROBE_WORDS)), None)
        return control_ids(self.tokenizer, self.media_tokens, self.end_of_turn_id, probe)

    @cached_property
    def unsayable(self) -> frozenset[int]:
        """Ids that begin or end something, stand for an image, or have no token."""
        return frozenset(index for index, text in enumerate(self.table.text) if text is None and (
            index in self.controls or index not in self.table.special))

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
    def _closing(self) -> str:  # type: ignore[override]
        """The special token behind an answer that is not the last, else the EOS."""
        assert self.form is not None
        question, answer = Message("user", PROBE_WORDS[:1]), Message("assistant", PROBE_WORDS[:1])
        two = Record("probe", (question, answer, question, answer))
        with contextlib.suppress(SampleDropped, AlignmentError):
            rendered = self._after_template(
                render(self.processor, two, self.form, kwargs=self.kwargs))
            row = self.encode([rendered], [[]]).rows[0]
            end = row.answers[0].end_of_turn
            if end is not None:
                return row.text.encode()[slice(*row.byte_spans[end - row.offset])].decode()
        return self.tokenizer.eos_token or ""

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

        None if the tokenizer cannot spell it. Without a template nothing but the data stands
        before an answer, so nothing may be glued to it here.
        """
        question = answer if self.form is not None else ""
        messages = (Message("user", (question,)), Message("assistant", (answer,)))
        record = Record("probe", messages)
        try:
            return self.encode([self.render(record)], [[]]).rows[0]
        except (AlignmentError, SampleDropped):
            return None


class TextAdapter(ModelAdapter):
    """Any causal language model with its tokenizer."""

    def _positions(self, inputs: Mapping[str, Tensor], padding_side: Side) -> dict[str, Tensor]:
        """Left padding must not move learned positions (GPT-2 counts it in)."""
        if padding_side == "right":
            return {}
        return {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}

    def _process(self, rendered, images, padding_side, add_special):  # type: ignore[no-untyped-def]
        encoded = self.tokenizer(
            [item.text for item in rendered], padding=True, padding_side=padding_side,
            return_tensors="pt", add_special_tokens=add_special,
        )
        return dict(encoded), [[] for _ in rendered]


class ImageTextAdapter(ModelAdapter):
    """Any model with a processor that expands image placeholders."""

    prefer: ContentForm = "parts"
    sees_images = True
    return_tensors: str | None = "pt"

    def __init__(
        self, processor: Processor, role: str, max_length: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(processor, role, max_length, chat_template_kwargs)
        if self.form is None:
            raise TaidError(f"{role}: the processor has no chat template; set "
                            f"{role}.chat_template to a jinja file.", code="no_chat_template")
        if self.form == "string":
            raise TaidError(f"{role}: the chat template prints no typed parts, so images cannot be "
                            f"placed; set {role}.chat_template to one that does.",
                            code="no_typed_parts")

    @cached_property
    def takes_videos(self) -> bool:  # type: ignore[override]
        """Whether processor and template both have a place for videos."""
        token = getattr(self.processor, "video_token", None)
        if not token or not hasattr(self.processor, "video_processor"):
            return False
        return video_token_printed(self.processor, token)

    def _after_template(self, rendered: Rendered) -> Rendered:
        """As ProcessorMixin.apply_chat_template: a BOS unless the template wrote one."""
        bos = self.tokenizer.bos_token
        return rendered if bos and rendered.text.startswith(bos) else self._with_special(rendered)

    def _process(self, rendered, images, padding_side, add_special):  # type: ignore[no-untyped-def]
        with _recorded_expansions(self.processor) as expansions:
            encoded = self.processor(
                text=[item.text for item in rendered], padding=True, padding_side=padding_side,
                add_special_tokens=add_special, return_tensors=self.return_tensors,
                return_mm_token_type_ids=True, **arguments(images, self.processor),
            )
        return self._tensors(encoded), expansions or [[] for _ in rendered]

    def _tensors(self, encoded: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the processor gave, without what is no tensor."""
        return {key: value for key, value in encoded.items() if isinstance(value, Tensor)}


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


def check_spelled(adapter: ModelAdapter, text: str) -> list[tuple[int, int]]:
    """Byte spans of a bare text in this model's tokens; raises AlignmentError."""
    ids = adapter.tokenizer(text, add_special_tokens=False)["input_ids"]
    return [span for span in tile(adapter.table, ids, text) if span[1] > span[0]]
