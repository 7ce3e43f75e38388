"""One model's texts: a record rendered through its chat template, a prompt to be continued."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from taid_vlm.adapters.encoded import EncodedRow
from taid_vlm.adapters.pictures import check_pictures
from taid_vlm.adapters.specials import media_tokens, refuse_media_tokens
from taid_vlm.adapters.template import (
    Rendered,
    TextSpan,
    content_form,
    has_chat_template,
    render,
    render_prompt,
)
from taid_vlm.adapters.tokens import TokenTable, token_table
from taid_vlm.adapters.turns import (
    ContentForm,
    Processor,
    Supervise,
    check_kwargs,
    has_thought,
    places_in,
)
from taid_vlm.errors import AlignmentError, SampleDropped
from taid_vlm.records import Message, Record

NO_VISION, ONE_QUESTION = "image for a text model", "conversation for a model of one question"
NO_TEMPLATE = "tools or thoughts for a model without a chat template"
# whether a template's space is glued to an answer depends on the word having such a token
PROBE_WORDS = ("yes", "The", "the", "a", "is", "in", "It", "A")


class Texts:
    """Records as one model's texts: rendered for learning, cut for asking.

    Args:
        processor: a tokenizer or a processor; its pad token is set where it has none.
        role: "teacher" or "student", for messages.
        max_length: tokens a row may have after image expansion; longer conversations are
            dropped and counted, longer plain texts are cut at the end and counted.
        chat_template_kwargs: variables for the chat template.

    Raises:
        TaidError: a chat template that does not print answers faithfully, or a variable that it
            does not read.
    """

    prefer: ContentForm = "string"
    sees_images = takes_videos = False
    one_question = "has no chat template; set {}.chat_template."

    def __init__(
        self, processor: Processor, role: str, max_length: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.processor, self.role, self.max_length = processor, role, max_length
        self.kwargs = dict(chat_template_kwargs or {})
        check_kwargs(processor, self.kwargs, role)
        self.tokenizer: PreTrainedTokenizerBase = getattr(processor, "tokenizer", processor)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or "<pad>"
        self.table: TokenTable = token_table(self.tokenizer)
        self.form: ContentForm | None = None
        self._openings: dict[bool, tuple[str, str]] = {}
        if has_chat_template(processor):
            self.form = content_form(processor, self.prefer, role)

    # ----- rendering ------------------------------------------------------------------------

    def render(self, record: Record, supervise: Supervise = "answers") -> Rendered:
        """The record as this model's text; raises SampleDropped where it cannot be used."""
        if record.images and not self.sees_images:
            raise SampleDropped(
                NO_VISION, f"{record.source} holds an image, but the {self.role} is a text model "
                f"and cannot see it; choose a {self.role} with vision, or text records.")
        refuse_media_tokens(record, self.media_tokens, self.role)
        check_pictures(record, self.processor, self.role, self.takes_videos)
        if record.text is not None:
            if not record.text.strip():
                raise SampleDropped("empty text", record.source)
            if record.context == len(record.text):
                raise SampleDropped("no answer is learned", f"{record.source}: it says so")
            if record.context or record.goes_on:
                return self._render_window(record.text, record.context, record.goes_on)
            return self._render_text(record.text)
        if self.form is None:
            return self._render_question(record)
        return self._after_template(
            self._closed(
                render(self.processor, record, self.form, supervise, self.kwargs, self.role)))

    def render_prompt(self, record: Record, turn: int) -> str:
        """The conversation up to its `turn`-th answer as the chat template asks for that."""
        assert self.form is not None
        return render_prompt(self.processor, record, turn, self.form, self.kwargs)

    def _closed(self, rendered: Rendered) -> Rendered:
        """Some templates (GLM-4) leave the last answer open, and nobody would learn to stop: there
        it ends as answers in the middle of a conversation do."""
        last = rendered.spans[-1]
        if not last.is_answer or rendered.text[last.end :].strip():
            return rendered
        return replace(rendered, text=rendered.text + self._closing)

    @property
    def _closing(self) -> str:
        """The special token behind an answer that is not the last, else the EOS."""
        raise NotImplementedError

    @cached_property
    def added_end(self) -> str:
        """The end that an answer is given because this model's template prints none; else ""."""
        if self.form is None:
            return ""
        messages = (Message("user", PROBE_WORDS[:1]), Message("assistant", PROBE_WORDS[:1]))
        rendered = render(self.processor, Record("probe", messages), self.form,
                          kwargs=self.kwargs)
        return self._closed(rendered).text.removeprefix(rendered.text)

    def _after_template(self, rendered: Rendered) -> Rendered:
        """For tokenizers the template is all there is; processors may add a BOS."""
        return rendered

    def _render_text(self, text: str) -> Rendered:
        """A plain document: everything is learned, and then that it ends."""
        return self._with_special(Rendered(text, (TextSpan(0, len(text), 0, True),)), ends=True)

    def _render_window(self, text: str, context: int, goes_on: bool) -> Rendered:
        """A part of a document: what stands before it is seen, and it ends where that ends."""
        bos, eos = self._added_bos, "" if goes_on else self.tokenizer.eos_token or ""
        span = TextSpan(len(bos) + context, len(bos) + len(text), 0, True)
        return Rendered(bos + text + eos, (span,))

    def _render_question(self, record: Record) -> Rendered:
        """A model without a template takes one question and its answer."""
        roles = [message.role for message in record.messages]
        if roles != ["user", "assistant"]:
            raise SampleDropped(
                ONE_QUESTION, f"{record.source} is a conversation ({', '.join(roles)}), but the "
                f"{self.role} {self.one_question.format(self.role)}")
        question, answer = record.messages
        if record.tools or question.calls or answer.calls or answer.thought:
            raise SampleDropped(NO_TEMPLATE, f"{record.source} has tools or a thought of its own, "
                                f"which the {self.role} has no chat template for; set "
                                f"{self.role}.chat_template")
        if not record.answers[0]:
            raise SampleDropped("empty answer", record.source)
        if not answer.weight:
            raise SampleDropped("no answer is learned", f"{record.source}: it weighs 0")
        return self._join(record)

    def _join(self, record: Record) -> Rendered:
        """A base model: question and answer one behind the other, as they are."""
        prompt, message = record.messages[0].text, record.messages[1]
        answer = message.text
        span = TextSpan(0, len(answer), 0, True, message.weight, tuple(places_in(answer, message)))
        spans = (span.shifted(len(prompt)),)
        return self._with_special(Rendered(prompt + answer, spans), ends=True)

    def seam(self, record: Record) -> str:
        """Where a model without a template reads question and answer as one word; "" elsewhere."""
        if self.form is not None or record.text is not None:
            return ""
        try:
            rendered = self.render(record)
        except SampleDropped:
            return ""
        start = rendered.spans[0].start
        before, after = rendered.text[:start], rendered.text[start:]
        joined = before and not before[-1].isspace() and not after[:1].isspace()
        return before[-20:] + after[:20] if joined else ""

    def cut(self, rendered: Rendered, row: EncodedRow) -> Rendered:
        """A plain text shortened to `max_length` tokens (without the end that it now lacks)."""
        assert self.max_length is not None
        (span,), (answer,) = rendered.spans, row.answers
        kept = (t.end for t in answer.tokens if t.position - row.offset < self.max_length)
        whole = rendered.text[span.start : span.end].encode()
        text = whole[: max(kept, default=0)].decode(errors="ignore")
        bos = self._added_bos
        return Rendered(bos + text, (TextSpan(len(bos), len(bos) + len(text), 0, True),))

    # ----- prompts --------------------------------------------------------------------------

    def prompt(self, record: Record, turn: int) -> Rendered:
        if self.form is not None:
            text = self._asked(record, turn)
            prompt = self._after_template(Rendered(text, ()))
        else:
            text = record.messages[0].text if record.messages else ""
            prompt = Rendered(text, (), add_special=self._adds_bos)
        if not (prompt.add_special and self._adds_eos):
            return prompt
        return Rendered(self._added_bos + text, ())  # an EOS would end what is to be continued

    def _asked(self, record: Record, turn: int) -> str:
        """What is printed before an answer: where the record has it, what it is learned after (a
        template may print earlier answers otherwise than the last)."""
        asked, learned = self.render_prompt(record, turn), None
        with contextlib.suppress(AlignmentError, SampleDropped):
            assert self.form is not None
            whole = render(self.processor, record, self.form, "answers", self.kwargs, self.role)
            learned = next((whole.text[: s.start] for s in whole.spans if s.turn == turn), None)
        if learned is None:
            spoken = [message for message in record.messages if message.role == "assistant"]
            return self._as_learned(asked, any(map(has_thought, spoken[turn : turn + 1])))
        head_only = learned.startswith(asked) and not learned[len(asked) :].strip()
        return asked if head_only else learned  # the space is part of the answer's first token

    def _as_learned(self, prompt: str, thinks: bool) -> str:
        """The prompt ending as the text does that answers are learned after."""
        if thinks not in self._openings:
            self._openings[thinks] = self._opening(thinks)
        prompt_end, trained_end = self._openings[thinks]
        ends = prompt.endswith(prompt_end)
        return prompt.removesuffix(prompt_end) + trained_end if ends else prompt

    def _opening(self, thinks: bool) -> tuple[str, str]:
        """Where the generation prompt is not what stands before an answer in a conversation: the
        two endings that differ.

        Qwen3 prints an empty thought before an answer without one and none in its prompt, Gemma 4
        does the reverse, LLaVA-OneVision has a space more. Whitespace that only the answer's first
        token can hold ("Assistant:", " The") stays with the answer.
        """
        word = PROBE_WORDS[0]
        prompt_end, trained_end = self._before(
            f"<think>\n{word}\n</think>\n\n{word}" if thinks else word)
        if trained_end.startswith(prompt_end) and not trained_end[len(prompt_end) :].strip():
            return "", ""
        pairs = enumerate(zip(prompt_end, trained_end, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(prompt_end), len(trained_end)))
        return prompt_end[shared:], trained_end[shared:]

    def _before(self, answer: str) -> tuple[str, str]:
        """The prompt that asks for an answer, and what stands before it in the conversation."""
        assert self.form is not None
        messages = (Message("user", PROBE_WORDS[:1]), Message("assistant", (answer,)))
        record = Record("probe", messages)
        rendered = render(self.processor, record, self.form, "answers", self.kwargs, self.role)
        return (self.render_prompt(record, 0),
                rendered.text[: rendered.spans[0].start])

    # ----- special tokens -------------------------------------------------------------------

    def _with_special(self, rendered: Rendered, ends: bool = False) -> Rendered:
        """Let the tokenizer add its BOS; where a document `ends`, make sure that an EOS follows."""
        eos = self.tokenizer.eos_token or ""
        text = rendered.text + (eos if ends and not self._adds_eos else "")
        return replace(rendered, text=text, add_special=self._adds_bos or self._adds_eos)

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
        spans = tuple(span.shifted(len(bos)) for span in rendered.spans)
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

    @cached_property
    def media_tokens(self) -> frozenset[str]:
        return media_tokens(self.processor) if self.sees_images else frozenset()
