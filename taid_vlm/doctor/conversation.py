"""What a chat template prints around questions and answers, found out with probes."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass

from taid_vlm.adapters import PROBE_WORDS, ModelAdapter, Processor, Rendered
from taid_vlm.adapters.template import has_chat_template
from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import SampleDropped, TaidError
from taid_vlm.records import Message, Record

QUESTION, ANSWER, SYSTEM = "probe question", "probe answer", "probe system"
FORMS = {"parts": "typed parts", "string": "plain strings", None: ""}
_THOUGHT_BEGINS = re.compile(r"<think>|<\|channel>|\[THINK\]")
_THOUGHT_ENDS = re.compile(r"</think>|<channel\|>|\[/THINK\]")


@dataclass(frozen=True)
class TemplateFacts:
    """What a chat template does; all but `source` is "" where it could not be found out.

    content: the form of `content` that it prints faithfully.
    before_question, before_answer, after_answer: the text around them.
    glued: text before an answer that is one token with its beginning.
    system: the default system prompt, None where there is none.
    thought, asked_thought: thoughts that nobody wrote, before the answers of the data and in the
        generation prompt ("none", "empty", or "open" for the model to go on with).
    """

    source: str
    content: str = ""
    before_question: str = ""
    system: str | None = None
    before_answer: str = ""
    glued: str = ""
    after_answer: str = ""
    thought: str = ""
    asked_thought: str = ""


def template_facts(
    spec: ModelSpec, processor: Processor, adapter: ModelAdapter | None
) -> TemplateFacts:
    """Describe the template of one side; without an adapter only where it comes from."""
    source = _source(spec, processor)
    if adapter is None or (rendered := _render(adapter)) is None:
        return TemplateFacts(source)
    text, span = rendered.text, rendered.spans[0]
    start = max(text.find(QUESTION), 0)
    opening = text[start + len(QUESTION) : span.start]
    row = next(filter(None, map(adapter.probe, PROBE_WORDS)), None)
    glued = row.answers[0].tokens[0].prefix if row and row.answers[0].tokens else b""
    return TemplateFacts(
        source, FORMS[adapter.form], text[:start], _default_system(adapter, text[:start]), opening,
        glued.decode(errors="backslashreplace"), text[span.end :],
        _thought(opening), _thought(_asked(adapter)),
    )


def _source(spec: ModelSpec, processor: Processor) -> str:
    if spec.chat_template is not None:
        return "the recipe" + ("" if "{" in spec.chat_template else f" ({spec.chat_template})")
    if has_chat_template(processor):
        return "the checkpoint"
    return "none (question and answer are simply joined)"


def _conversation(*before: Message) -> Record:
    turns = (*before, Message("user", (QUESTION,)), Message("assistant", (ANSWER,)))
    return Record("probe", turns)


def _render(adapter: ModelAdapter, *before: Message) -> Rendered | None:
    with suppress(TaidError, SampleDropped):
        return adapter.render(_conversation(*before))
    return None


def _default_system(adapter: ModelAdapter, without: str) -> str | None:
    """The system prompt that stands where a conversation brings none of its own."""
    rendered = None if adapter.form is None else _render(adapter, Message("system", (SYSTEM,)))
    if rendered is None or rendered.text.count(SYSTEM) != 1:
        return None
    before, after = rendered.text.split(SYSTEM)
    after = after[: after.find(QUESTION)]
    inner = without.removeprefix(before).removesuffix(after)
    framed = without.startswith(before) and without.endswith(after)
    return inner.strip() if framed and len(without) > len(before + after) else None


def _asked(adapter: ModelAdapter) -> str:
    """What stands between a question and the answer that a model is asked for."""
    with suppress(SampleDropped):
        if adapter.form is not None:
            prompt = adapter.render_prompt(_conversation(), 0)
            return prompt[prompt.find(QUESTION) :]
    return ""


def _thought(text: str) -> str:
    if not _THOUGHT_BEGINS.search(text):
        return "none"
    return "empty" if _THOUGHT_ENDS.search(text) else "open"
