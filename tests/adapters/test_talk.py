"""Conversations as users have them: tools, thoughts, weights, variables, special tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from adapters.samples import adapter
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase
from zoo import make_tokenizer, templates
from zoo.images import image

from taid_vlm.adapters import ModelAdapter, make_adapter
from taid_vlm.alignment import pair_models
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.errors import AlignmentError, SampleDropped, TaidError
from taid_vlm.records import Record, parse_record

WEATHER = {"type": "function", "function": {
    "name": "weather", "description": "Of a town.",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}}}
CALL = {"type": "function", "id": "call00001",
        "function": {"name": "weather", "arguments": {"town": "Köln"}}}
AGENT: list[dict[str, Any]] = [
    {"role": "user", "content": "Is it warm in Köln?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": '{"t": 21}'},
    {"role": "assistant", "content": "It is 21 degrees."},
]
SILENT = [AGENT[0], {**AGENT[1], "content": None}, *AGENT[2:]]


def chat(messages: list[dict[str, Any]], **row: Any) -> Record:
    return parse_record({"messages": messages, **row}, "talk.jsonl:1")


def turns(*texts: str, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def model(template: str, family: str = "qwen3", role: str = "student", **kwargs: Any
          ) -> ModelAdapter:
    tokenizer = make_tokenizer(family)
    tokenizer.chat_template = template
    return make_adapter(tokenizer, role, chat_template_kwargs=kwargs)


def spans(rendered: Any) -> list[str]:
    return [rendered.text[span.start : span.end] for span in rendered.spans]


def printed(one: ModelAdapter, messages: list[dict[str, Any]], **options: Any) -> str:
    return one.processor.apply_chat_template(messages, tokenize=False, **options)


# ----- tools ----------------------------------------------------------------------------------

HERMES = '<tool_call>\n{"name": "weather", "arguments": {"town": "Köln"}}\n</tool_call>'
LLAMA = '{"name": "weather", "parameters": {"town": "Köln"}}'
MISTRAL = '[TOOL_CALLS][{"name": "weather", "arguments": {"town": "Köln"}}]'


@pytest.mark.parametrize(("template", "family", "messages", "call"), [
    (templates.hermes(), "qwen3", AGENT, f"I look.\n{HERMES}"),
    (templates.hermes(), "qwen3", SILENT, HERMES),
    (templates.hermes(thoughts=False), "qwen2", AGENT, f"I look.\n{HERMES}"),
    (templates.llama31(), "llama", SILENT, LLAMA),
    (templates.mistral_tools(), "mistral", SILENT, MISTRAL),
])
def test_calls_are_learned_as_the_template_prints_them(
    template: str, family: str, messages: list[dict[str, Any]], call: str
) -> None:
    one = model(template, family)
    rendered = one.render(chat(messages, tools=[WEATHER]))
    plain = [{**m, "content": m["content"] or ""} for m in messages]
    assert rendered.text == printed(one, plain, tools=[WEATHER])
    assert "Of a town." in rendered.text
    assert spans(rendered) == [call, "It is 21 degrees."]
    prompt = one.prompt(chat(messages, tools=[WEATHER]), 1).text
    assert rendered.text[: rendered.spans[1].start].startswith(prompt)
    row = one.encode([rendered], [[]]).rows[0]
    assert all(answer.end_of_turn is not None for answer in row.answers)


def test_text_beside_a_call_may_not_be_printed() -> None:
    """Llama 3.1's template prints the call alone; that is counted, and the call is learned."""
    rendered = model(templates.llama31(), "llama").render(chat(AGENT, tools=[WEATHER]))
    assert spans(rendered) == [LLAMA, "It is 21 degrees."]
    assert rendered.notes == (
        "text beside a tool call that the student's chat template does not print",)


def test_a_call_may_end_its_turn_with_a_token_of_its_own() -> None:
    one = model(templates.llama31(ends="<|eom_id|>"), "llama")
    one.tokenizer.add_special_tokens({"additional_special_tokens": ["<|eom_id|>"]})
    one = make_adapter(one.tokenizer, "student")
    rendered = one.render(chat(SILENT, tools=[WEATHER]))
    assert spans(rendered) == [LLAMA + "<|eom_id|>", "It is 21 degrees."]
    row = one.encode([rendered], [[]]).rows[0]
    assert one.tokenizer.convert_ids_to_tokens(
        row.ids[row.answers[0].tokens[-1].position]) == "<|eom_id|>"


@pytest.mark.parametrize("change", [
    lambda call: [call], lambda call: json.dumps([call]),
    lambda call: [{**call, "function": {"name": "weather", "arguments": '{"town": "Köln"}'}}],
    lambda call: [{"name": "weather", "arguments": {"town": "Köln", "radius": None}}],
    lambda call: [{"name": "weather", "parameters": {"town": "Köln"}}],
])
def test_calls_in_every_shape(change: Any) -> None:
    messages = [AGENT[0], {"role": "assistant", "tool_calls": change(CALL)}, *AGENT[2:]]
    for tools in ([WEATHER], json.dumps([WEATHER]), [json.dumps(WEATHER)],
                  [WEATHER["function"]], WEATHER):
        rendered = model(templates.hermes()).render(chat(messages, tools=tools))
        assert spans(rendered) == [HERMES, "It is 21 degrees."]


def test_sharegpts_calls_and_observations() -> None:
    talk = [{"from": "human", "value": "Warm?"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": {"t": 21}}, {"from": "gpt", "value": "Yes."}]
    record = parse_record({"conversations": talk, "tools": json.dumps([WEATHER])}, "x")
    rendered = model(templates.hermes()).render(record)
    assert spans(rendered) == [HERMES, "Yes."]
    assert '<tool_response>\n{"t": 21}\n</tool_response>' in rendered.text


def test_tools_for_a_template_without_are_refused_by_name() -> None:
    with pytest.raises(SampleDropped, match="student's chat template prints none") as caught:
        adapter("qwen2").render(chat(AGENT, tools=[WEATHER]))
    assert caught.value.reason == "tools for a chat template without"
    with pytest.raises(SampleDropped, match="not printed by the chat template") as caught:
        adapter("qwen2").render(chat(AGENT))
    with pytest.raises(SampleDropped, match="no chat template for"):
        adapter("gpt2").render(chat(AGENT[:1] + SILENT[1:2], tools=[WEATHER]))


@pytest.mark.parametrize("result", ["e", '{"t": 21}'])
@pytest.mark.parametrize("inside", [True, False])
def test_results_are_context_wherever_they_are_printed(result: str, inside: bool) -> None:
    """Gemma 4 prints them into the turn that called; a short one may stand in the call, too."""
    template = (
        "{% for m in messages %}{% if m.role != 'tool' %}{{ '<' + m.role + '>' + (m.content or '')"
        " }}{% for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson)"
        " }}{% endfor %}{% if inside and m.tool_calls and not loop.last %}"
        "{{ '|' + loop.nextitem.content }}{% endif %}{{ '<|im_end|>' }}{% elif not inside %}"
        "{{ '<tool>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}{{ tools and '' }}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}")
    one = model(template, inside=inside)
    messages = [*SILENT[:2], {"role": "tool", "content": result}, SILENT[3]]
    rendered = one.render(chat(messages, tools=[WEATHER]))
    assert spans(rendered) == ['weather{"town": "Köln"}', "It is 21 degrees."]


def test_a_result_that_is_not_printed_is_refused() -> None:
    template = templates.hermes().replace("'\n<tool_response>\n' + content", "'\n'")
    with pytest.raises(SampleDropped, match="text of a tool message, by the student's"):
        model(template).render(chat(AGENT, tools=[WEATHER]))


@pytest.mark.parametrize("knows", [True, False])
def test_developers_are_the_system_where_a_template_does_not_know_them(knows: bool) -> None:
    template = templates.hermes()
    if knows:
        template = template.replace("message.role == 'user' or", "message.role in ('user', "
                                    "'developer') or")
    messages = [{"role": "developer", "content": "Be kind."}, *turns("Is it?", "Yes")]
    text = model(template).render(chat(messages)).text
    assert text.startswith(f"<|im_start|>{'developer' if knows else 'system'}\nBe kind.<|im_end|>")


def collate(teacher: ModelAdapter, student: ModelAdapter, *records: Record) -> tuple[Any, Any]:
    rows = [len(m.tokenizer) for m in (teacher, student)]
    pairing = pair_models(teacher, student, *rows)
    collator = DistillationCollator(student, teacher, pairing)
    return collator(list(records)), collator


def labels(batch: Any, student: ModelAdapter) -> str:
    return student.tokenizer.decode(batch["labels"])


def test_calls_that_two_templates_print_alike_are_compared_whole() -> None:
    teacher = model(templates.hermes(), role="teacher")
    student = model(templates.hermes(thoughts=False))
    batch, _ = collate(teacher, student, chat(SILENT, tools=[WEATHER]))
    assert batch["notes"] == {}
    assert labels(batch, student) == f"{HERMES}<|im_end|>It is 21 degrees.<|im_end|>"


def test_of_calls_that_are_printed_differently_the_common_pieces_are_compared() -> None:
    teacher = model(templates.llama31(), "llama", "teacher")
    student = model(templates.hermes(), "qwen3")
    batch, _ = collate(teacher, student, chat(SILENT, tools=[WEATHER]))
    assert list(batch["notes"].values()) == [1]
    assert "print differently" in next(iter(batch["notes"]))
    for call in ('weather', '{"town": "Köln"}', "It is 21 degrees."):
        assert call in labels(batch, student)
    assert "tool_call" not in labels(batch, student)
    assert batch["counts"]["aligned_tokens"] == len(batch["labels"])


# ----- thoughts -------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [
    "<think>A hat?</think>No.", "<think>\nA hat?\n</think>\n\nNo.", "<think>A hat?</think>\nNo."])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5", "llama"])
def test_thoughts_in_an_answer_are_learned_as_they_are_printed(answer: str, family: str) -> None:
    one = adapter(family)
    rendered = one.render(chat(turns("Is it?", answer)))
    assert rendered.text == printed(one, turns("Is it?", answer) if one.form == "string" else [
        {**m, "content": [{"type": "text", "text": m["content"]}]}
        for m in turns("Is it?", answer)])
    wanted = answer if family == "llama" else "<think>\nA hat?\n</think>\n\nNo."
    assert spans(rendered) == [wanted]
    prompt = one.prompt(chat(turns("Is it?", answer)), 0).text
    assert rendered.text.startswith(prompt + wanted)


def test_an_empty_thought_that_is_written_is_learned() -> None:
    (shown,) = spans(adapter("qwen3").render(chat(turns("Is it?", "<think>\n\n</think>\n\nNo."))))
    assert shown == "<think>\n\n</think>\n\nNo."
    assert spans(adapter("qwen3").render(chat(turns("Is it?", "No.")))) == ["No."]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("one", [model(templates.hermes()), adapter("llama"), adapter("qwen3")],
                         ids=["read", "printed", "taken apart"])
def test_thoughts_under_a_key(key: str, one: ModelAdapter) -> None:
    messages = turns("Is it?", "No.")
    messages[1][key] = "A hat?"
    assert spans(one.render(chat(messages))) == ["<think>\nA hat?\n</think>\n\nNo."]


def test_thoughts_before_calls() -> None:
    messages = [SILENT[0], {**SILENT[1], "reasoning_content": "I must look."}, *SILENT[2:]]
    rendered = model(templates.hermes()).render(chat(messages, tools=[WEATHER]))
    assert spans(rendered) == [f"<think>\nI must look.\n</think>\n\n{HERMES}", "It is 21 degrees."]


def test_thoughts_of_earlier_turns_are_counted_and_not_refused() -> None:
    talk = turns("Is it?", "<think>A hat?</think>No.", "And?", "<think>A cat!</think>Yes.")
    teacher, student = adapter("qwen3", "teacher"), adapter("qwen3")
    batch, collator = collate(teacher, student, chat(talk))
    assert labels(batch, student) == "No.<|im_end|><think>\nA cat!\n</think>\n\nYes.<|im_end|>"
    assert batch["counts"]["dropped"] == {}
    assert batch["notes"] == {
        f"a thought that the {role}'s chat template takes out of an earlier turn": 1
        for role in ("teacher", "student")}
    assert any("talk.jsonl:1" in text for text in collator.reported.values())


def test_where_one_template_takes_a_thought_out_the_answer_is_compared() -> None:
    talk = turns("Is it?", "<think>A hat?</think>No.", "And?", "Yes.")
    plain = model(templates.chatml(), "qwen3")
    batch, _ = collate(adapter("qwen3", "teacher"), plain, chat(talk))
    assert labels(batch, plain) == "No.<|im_end|>Yes.<|im_end|>"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_thoughts_beside_a_model_that_prints_them_as_text(family: str) -> None:
    student = adapter(family)
    for answer in ("<think>b</think>c", "<think>b</think>\n\n  c\n"):
        batch, _ = collate(adapter("qwen3", "teacher"), student, chat(turns("Is it?", answer)))
        assert batch["counts"]["dropped"] == {}
        assert {"b", "c"} <= set(labels(batch, student))


def test_of_equal_thoughts_the_earlier_one_is_gone() -> None:
    messages = [SILENT[0], {**SILENT[1], "reasoning_content": "I look."}, SILENT[2],
                {**SILENT[3], "reasoning_content": "I look."}]
    rendered = model(templates.llama31(), "llama").render(chat(messages, tools=[WEATHER]))
    assert spans(rendered) == [LLAMA, "<think>\nI look.\n</think>\n\nIt is 21 degrees."]


def test_of_equal_texts_the_one_beside_a_call_is_gone() -> None:
    first, *call = AGENT
    talk = [first, {"role": "assistant", "content": "I look."}, *AGENT]
    rendered = model(templates.llama31(), "llama").render(chat(talk, tools=[WEATHER]))
    assert spans(rendered) == ["I look.", LLAMA, "It is 21 degrees."]
    assert len(rendered.notes) == len(call[:1])


def test_space_in_a_thought_changes_nothing() -> None:
    messages = turns("Is it?", "No.")
    messages[1]["reasoning_content"] = "  A hat?\n"
    rendered = model(templates.hermes()).render(chat(messages))
    assert rendered.text == printed(model(templates.hermes()), messages)
    assert spans(rendered) == ["<think>\n  A hat?\n</think>\n\nNo."]


def test_a_thought_that_is_lost_names_the_model_and_the_mend() -> None:
    one = model("{% for m in messages %}{{ m['content'].split('</think>')[-1] }}{% endfor %}")
    with pytest.raises(AlignmentError, match=r"talk.jsonl:1: the student's chat template .* "
                                             r"Set student\.chat_template"):
        one.render(chat(turns("Is it?", "<think>A hat?</think>No.")))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5", "llama", "qwen2"])
def test_every_turn_is_asked_as_it_is_learned(family: str) -> None:
    one = adapter(family)
    for talk in (turns("a", "It is", "b", "Yes"), turns("a", "<think>x</think>y", "b", "Yes"),
                 turns("a", "It is", "b", "<think>x</think>y")):
        rendered = one.render(chat(talk))
        for span in rendered.spans:
            assert one.prompt(chat(talk), span.turn).text == rendered.text[: span.start]
        alone = chat(talk[:3])  # an answer that is not there yet
        assert one.prompt(alone, 1).text.startswith(one.render_prompt(alone, 1)[:-20])


# ----- variables of the template --------------------------------------------------------------


@pytest.mark.parametrize("thinks", [True, False])
def test_variables_hold_in_training_and_in_answering(thinks: bool) -> None:
    template = templates.chatml() .replace(
        "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n' }}{% if not think %}"
        "{{ '<think></think>' }}{% endif %}").replace(
        "{{ '' + message['content'] }}", "{% if message['role'] == 'assistant' and not think %}"
        "{{ '<think></think>' }}{% endif %}{{ '' + message['content'] }}")
    one = model(template, think=thinks)
    item = chat(turns("Is it?", "Yes"))
    rendered = one.render(item)
    assert ("<think></think>" in rendered.text) is not thinks
    assert one.prompt(item, 0).text == rendered.text[: rendered.spans[0].start]


def test_a_variable_that_nothing_reads_is_refused() -> None:
    with pytest.raises(TaidError, match=r"student\.chat_template_kwargs: the chat template reads "
                                        r"no 'enable_thinkin'\. Did you mean 'enable_thinking'\?"):
        model(templates.hermes(), enable_thinkin=False)
    with pytest.raises(TaidError, match="reads no 'messages'"):
        model(templates.hermes(), messages=[])
    with pytest.raises(TaidError, match="It reads none"):
        model(templates.chatml(), enable_thinking=False)
    assert "1 May" in model(templates.llama31(), "llama", date_string="1 May").render(
        chat(turns("Is it?", "Yes"))).text


# ----- what is learned ------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "weight"), [
    ({"train": False}, 0), ({"weight": 0}, 0), ({"loss": False}, 0), ({"masked": True}, 0),
    ({"trainable": False}, 0), ({"weight": 0.5}, 0.5), ({"loss_weight": 2}, 2), ({"loss": 1}, 1),
    ({"train": True, "weight": None}, 1), ({"weight": 0.5, "train": True}, 0.5)])
def test_what_a_turn_counts(keys: dict[str, Any], weight: float) -> None:
    talk = turns("a", "It is", "b", "Yes")
    talk[1] |= keys
    student = adapter("qwen2")
    batch = DistillationCollator(student)([chat(talk)])
    first = batch["turn"] == 0
    if weight == 0:
        assert labels(batch, student) == "Yes<|im_end|>"
        assert "weights" not in batch and batch["turn"].unique().tolist() == [1]
    elif weight == 1:
        assert "weights" not in batch
    else:
        assert set(batch["weights"][first].tolist()) == {weight}
        assert set(batch["weights"][~first].tolist()) == {1.0}


def test_no_turn_that_counts_is_counted() -> None:
    talk = turns("a", "It is")
    talk[1]["train"] = False
    assert DistillationCollator(adapter("qwen2"))([chat(talk)])["counts"]["dropped"] == {
        "no answer is learned": 1}


def test_answers_in_a_prompt_are_context() -> None:
    row = {"prompt": turns("a", "It is", "b"), "completion": "Yes"}
    for one in (adapter("qwen2"), adapter("qwen3"), adapter("llama")):
        rendered = one.render(parse_record(row, "x"))
        assert spans(rendered) == ["Yes"] and "It is" in rendered.text
        assert rendered.spans[0].turn == 1


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "qwen3", "mistral", "llama"])
def test_the_first_indent_of_code_is_learned(family: str) -> None:
    code = "    if x:\n        return 1\n    return 2"
    rendered = adapter(family).render(parse_record({"prompt": "def f(x):\n", "completion": code},
                                                   "x"))
    assert spans(rendered) == [code.strip() if family in ("llama", "mistral") else code]


def test_space_that_only_one_template_prints_is_not_compared() -> None:
    student = adapter("qwen2")
    batch, _ = collate(adapter("llama", "teacher"), student, chat(turns("a", "  It is\n")))
    assert labels(batch, student).strip() == labels(batch, student)
    assert "t is" in labels(batch, student)  # the first token may hold the space, too
    batch, _ = collate(adapter("qwen3", "teacher"), student, chat(turns("a", "  It is\n")))
    assert labels(batch, student) == "  It is\n<|im_end|>"


def test_keys_that_nothing_reads_are_named_with_a_count() -> None:
    talk = turns("a", "It is")
    talk[0]["lang"], talk[1]["score"] = "en", 3
    batch = DistillationCollator(adapter("qwen2"))([chat(talk), chat(turns("a", "b")), chat(talk)])
    assert batch["notes"] == {"messages[].lang: nothing reads it": 2,
                                        "messages[].score: nothing reads it": 2}


# ----- special tokens -------------------------------------------------------------------------

BOX = "<|box_start|>(1,2)<|box_end|>"


def with_boxes(family: str, special: bool = True) -> PreTrainedTokenizerBase:
    tokenizer = make_tokenizer(family)
    names = [AddedToken(name, special=special) for name in ("<|box_start|>", "<|box_end|>")]
    tokenizer.add_tokens(names, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize(("teacher", "student"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("families", [("qwen3", "qwen2"), ("llama", "qwen2")])
def test_tokens_that_both_models_have_are_learned(
    teacher: bool, student: bool, families: tuple[str, str]
) -> None:
    one = make_adapter(with_boxes(families[0], teacher), "teacher")
    other = make_adapter(with_boxes(families[1], student), "student")
    batch, _ = collate(one, other, chat(turns("Where?", f"At {BOX}.")))
    assert batch["counts"]["dropped"] == {}
    assert labels(batch, other) == f"At {BOX}.<|im_end|>"


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_token_that_only_one_model_has_is_refused_by_name(role: str) -> None:
    one = make_adapter(with_boxes("qwen3") if role == "teacher" else make_tokenizer("qwen3"),
                       "teacher")
    other = make_adapter(with_boxes("qwen2") if role == "student" else make_tokenizer("qwen2"),
                         "student")
    batch, collator = collate(one, other, chat(turns("Where?", f"At {BOX}.")))
    assert batch["counts"]["dropped"] == {
        "special token that only one model has inside an answer": 1}
    assert any(f"'<|box_start|>' of the {role}" in text for text in collator.reported.values())


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_tokens_that_steer_a_conversation_stay_refused(token: str) -> None:
    batch = DistillationCollator(adapter("qwen2"))([chat(turns("a", f"It {token} is"))])
    assert batch["counts"]["dropped"] == {"special token inside an answer": 1}


# ----- marks of images in texts ---------------------------------------------------------------


def test_image_tags_are_text_where_there_is_no_image() -> None:
    talk = turns("What is <image> in HTML?", "Write <image> as <img>.")
    assert spans(adapter("qwen2").render(chat(talk))) == ["Write <image> as <img>."]
    assert chat(talk).without_effect == ("<image>: text, for the row has no image",)
    with pytest.raises(SampleDropped, match="stands for an image in the student") as caught:
        adapter("llava").render(chat(talk))
    assert caught.value.reason == "image token in a text"


def test_an_answers_tag_is_text_where_the_question_has_the_images() -> None:
    record = chat(turns("<image>What tag is this?", "It is <image>."), images=[image("wide")])
    assert record.messages[1].parts == ("It is <image>.",) and len(record.images) == 1


def test_the_system_column_is_the_first_turn() -> None:
    text = adapter("qwen2").render(chat(turns("a", "b"), system="Be kind.")).text
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>")
