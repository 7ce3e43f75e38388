"""The sentinel render: the answers' places in any template, or an error, never a guess."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from adapters.samples import KINDS, TEXT_KINDS, answers, built, chat, record, talk
from transformers import PreTrainedTokenizerBase
from zoo import CORE_FAMILIES, CORE_TEXT_FAMILIES, make_tokenizer

from taid_vlm.adapters import make_adapter
from taid_vlm.adapters.template import content_form, render, render_prompt
from taid_vlm.adapters.turns import CLOSE, OPEN
from taid_vlm.errors import AlignmentError, SampleDropped, TaidError
from taid_vlm.records import Record, parse_record

TRIMMING = ("gemma2", "gemma3", "llama")
TEMPLATED = tuple(f for f in CORE_TEXT_FAMILIES if f != "gpt2")
CASES = [(f, kind) for f in CORE_FAMILIES for kind in (*KINDS, "talk")]
CASES += [(f, kind) for f in TEMPLATED for kind in TEXT_KINDS]


def form_of(family: str) -> Any:
    return "parts" if family in CORE_FAMILIES else "string"


def with_template(content: str, between: str = "|") -> PreTrainedTokenizerBase:
    tokenizer = make_tokenizer("llama")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:" + content + between + "{% endfor %}")
    return tokenizer


@cache
def processor(family: str) -> Any:
    return built(family).processor


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_spans_hold_the_answers_and_nothing_else_changes(family: str, kind: str) -> None:
    form = form_of(family)
    rendered = render(processor(family), record(kind), form)
    plain = processor(family).apply_chat_template(chat(kind, form == "parts"), tokenize=False)
    assert rendered.text == plain
    assert [rendered.text[s.start : s.end] for s in rendered.spans] == answers(kind)
    assert [s.turn for s in rendered.spans] == list(range(len(answers(kind))))
    assert all(s.is_answer for s in rendered.spans)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_prompts_are_how_training_texts_begin(family: str, kind: str) -> None:
    form = form_of(family)
    whole = render(processor(family), record(kind), form)
    for turn, span in enumerate(whole.spans):
        prompt = render_prompt(processor(family), record(kind), turn, form)
        assert whole.text[: span.start].rstrip() == prompt.rstrip()
        assert whole.text.startswith(prompt)
        before = chat(kind, form == "parts", turns=2 * turn + 1)
        assert prompt == processor(family).apply_chat_template(
            before, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("family", [*CORE_FAMILIES, *TEMPLATED])
def test_space_around_answers_is_learned_as_the_template_prints_it(family: str) -> None:
    form, spaced = form_of(family), ("\n  so it is \n", "   no ")
    rendered = render(processor(family), talk("a", spaced[0], "b", spaced[1]), form)
    messages = [{"role": role, "content": [{"type": "text", "text": text}] if form == "parts"
                 else text} for role, text in zip(("user", "assistant") * 2,
                                                  ("a", spaced[0], "b", spaced[1]), strict=True)]
    assert rendered.text == processor(family).apply_chat_template(messages, tokenize=False)
    shown = tuple(rendered.text[s.start : s.end] for s in rendered.spans)
    assert shown == (("so it is", "no") if family in TRIMMING else spaced)
    clean = render(processor(family), talk("a", "so it is", "b", "no"), form)
    assert rendered.text[: rendered.spans[0].start] == clean.text[: clean.spans[0].start]
    assert rendered.text[rendered.spans[1].end :] == clean.text[clean.spans[1].end :]


@pytest.mark.parametrize("family", [*CORE_FAMILIES, *TEMPLATED])
def test_prompts_hold_earlier_answers_as_training_does(family: str) -> None:
    spaced = talk("a", " so it is\n", "b", "no")
    whole = render(processor(family), spaced, form_of(family))
    assert whole.text.startswith(render_prompt(processor(family), spaced, 1, form_of(family)))


@pytest.mark.parametrize("family", [*CORE_FAMILIES, *TEMPLATED])
def test_supervise_all_marks_every_text(family: str) -> None:
    rendered = render(processor(family), record("talk"), form_of(family), "all")
    texts = [m["content"] for m in chat("talk", typed=False)]
    assert [rendered.text[s.start : s.end] for s in rendered.spans] == texts
    assert [s.is_answer for s in rendered.spans] == [False, True] * 3
    assert [s.turn for s in rendered.spans if s.is_answer] == [0, 1, 2]
    assert rendered.text == render(processor(family), record("talk"), form_of(family)).text


@pytest.mark.parametrize("family", CORE_FAMILIES)
def test_supervise_all_leaves_images_alone(family: str) -> None:
    rendered = render(processor(family), record("two images"), "parts", "all")
    shown = [rendered.text[s.start : s.end] for s in rendered.spans]
    assert shown == ["Compare", "with", ".", answers("two images")[0]]  # without outer space
    assert rendered.text == render(processor(family), record("two images"), "parts").text


@pytest.mark.parametrize("family", [*CORE_FAMILIES, *TEMPLATED])
def test_supervise_all_renders_the_same_text(family: str) -> None:
    spaced = talk("  Is it? \n", "Yes")
    texts = {render(processor(family), spaced, form_of(family), s).text
             for s in ("answers", "all")}
    assert len(texts) == 1


# ----- which form of content -----------------------------------------------------------------


@pytest.mark.parametrize(("content", "prefer", "form"), [
    ("{{ m['content'] }}", "parts", "string"),  # a list comes out as Python's repr
    ("{{ m['content'] }}", "string", "string"),
    ("{{ '' + m['content'] }}", "parts", "string"),  # a list raises
    ("{% if m['content'] is string %}{{ m['content'] }}{% endif %}", "parts", "string"),
    ("{% for p in m['content'] %}{{ p['text'] }}{% endfor %}", "string", "parts"),
    ("{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0].text }}"
     "{% endif %}", "string", "string"),
    ("{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0].text }}"
     "{% endif %}", "parts", "parts"),
    ("{{ m['content'] }}{{ m['content'] if m['content'] is string }}"  # a string twice
     , "string", None),
    ("{{ m['content'] | upper }}", "string", None),
    ("", "parts", None),
    ("{{ raise_exception('no') }}", "string", None),
])
def test_content_form_is_the_one_that_is_printed(
    content: str, prefer: Any, form: str | None
) -> None:
    tokenizer = with_template(content)
    if form is not None:
        assert content_form(tokenizer, prefer, "student") == form
        return
    with pytest.raises(TaidError, match="student: the chat template"):
        content_form(tokenizer, prefer, "student")


@pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
def test_families_that_drop_strings_get_parts(family: str) -> None:
    assert content_form(processor(family), "string", "student") == "parts"


def test_unfaithful_template_is_refused_at_once() -> None:
    with pytest.raises(TaidError, match=r"teacher\.chat_template"):
        make_adapter(with_template("{{ m['role'] }}"), "teacher")


# ----- what cannot be used -------------------------------------------------------------------


@pytest.mark.parametrize("content", [
    "{{ m['content'][:20] }}",  # cuts
    "{{ m['content'].split('</think>')[-1] }}",  # as templates of reasoning models do
    "{{ m['content'] | replace('red', 'blue') }}",
    "{% if 'red' not in m['content'] %}{{ m['content'] }}{% endif %}",
    "{{ m['content'] }}{% if 'red' in m['content'] %}{{ m['content'] }}{% endif %}",
    "{{ m['content'].split(' red ') | reverse | join(' red ') }}",
])
def test_changed_answer_is_an_error(content: str) -> None:
    tokenizer = with_template(content)
    assert content_form(tokenizer, "string", "student") == "string"
    answer = "<think>is it a red one, or not</think>a red one"
    with pytest.raises(AlignmentError, match="changes or drops"):
        render(tokenizer, talk("What?", answer), "string")


@pytest.mark.parametrize("texts", [
    (f"What{OPEN}", "Yes"), ("What?", f"Yes{CLOSE}"), ("What?", f"{OPEN}Yes{CLOSE}")])
def test_marking_characters_in_the_data(texts: tuple[str, str]) -> None:
    with pytest.raises(SampleDropped) as caught:
        render(processor("llama"), talk(*texts), "string")
    assert caught.value.reason == "marking characters in the text"


@pytest.mark.parametrize(("item", "reason"), [
    (talk("What?", ""), "empty answer"),
    (talk("What?", " \n "), "empty answer"),
    (talk("What?", "Yes", "Sure?", ""), "empty answer"),
    (talk("What?"), "no answer"),
    (Record("none"), "no answer"),
])
def test_nothing_to_learn(item: Record, reason: str) -> None:
    with pytest.raises(SampleDropped) as caught:
        render(processor("qwen2"), item, "string")
    assert caught.value.reason == reason


def test_template_that_refuses_drops_the_record() -> None:
    two_users = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"},
                              {"role": "assistant", "content": "c"}]}
    with pytest.raises(SampleDropped, match="must alternate") as caught:
        render(processor("gemma2"), parse_record(two_users, "row 3"), "string")
    assert caught.value.reason == "chat template refused"


@pytest.mark.parametrize("texts", [("a\0b", "Yes"), ("What?", "Y\0es")])
def test_nul_characters_stay(texts: tuple[str, str]) -> None:
    rendered = render(processor("llama"), talk(*texts), "string")
    messages = [{"role": r, "content": t} for r, t in zip(("user", "assistant"), texts,
                                                          strict=True)]
    assert rendered.text == processor("llama").apply_chat_template(messages, tokenize=False)
