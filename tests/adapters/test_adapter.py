"""Every family of the zoo: the right tokens, at the right places, as its own processor gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from adapters.samples import (
    KINDS,
    TEXT_KINDS,
    adapter,
    answers,
    built,
    chat,
    encode,
    metaspace,
    record,
    talk,
    with_eos,
)
from torch import Tensor
from zoo import CORE_FAMILIES, CORE_TEXT_FAMILIES, build
from zoo.specs import END_OF_TURN, SPECS

from taid_vlm.adapters import (
    AnswerSpan,
    EncodedBatch,
    ImageTextAdapter,
    Side,
    TextAdapter,
    make_adapter,
)
from taid_vlm.errors import SampleDropped, TaidError
from taid_vlm.records import Record, parse_record

TEMPLATED = tuple(f for f in CORE_TEXT_FAMILIES if f != "gpt2")
FAMILIES = CORE_FAMILIES + TEMPLATED
SIDES: tuple[Side, ...] = ("left", "right")
BOTH = pytest.mark.parametrize("side", SIDES)
EVERY = pytest.mark.parametrize("family", FAMILIES)
Inputs = dict[str, Tensor]
GLUE = {"smolvlm": b" ", "idefics3": b" "}  # "Assistant: X"


def kinds(family: str) -> tuple[str, ...]:
    return (*KINDS, "talk") if family in CORE_FAMILIES else TEXT_KINDS


@cache
def mixed(family: str, side: Side) -> EncodedBatch:
    return encode(adapter(family), [record(kind) for kind in kinds(family)], side)


def end_of_turn(family: str) -> str:
    return END_OF_TURN.get(family, SPECS[family].eos)


def decoded(family: str, ids: Tensor, answer: AnswerSpan) -> str:
    """The supervised tokens of one answer, by the tokenizer's own decoder."""
    positions = [token.position for token in answer.tokens]
    assert positions == list(range(positions[0], positions[0] + len(positions)))
    text = built(family).tokenizer.decode(ids[positions], clean_up_tokenization_spaces=False)
    first, last = answer.tokens[0], answer.tokens[-1]
    assert text.startswith(first.prefix.decode())
    assert text.endswith(last.suffix.decode())
    return text[len(first.prefix) : len(text) - len(last.suffix)]


@BOTH
@EVERY
def test_supervised_tokens_decode_to_the_answers(family: str, side: Side) -> None:
    batch = mixed(family, side)
    for index, kind in enumerate(kinds(family)):
        ids = batch.inputs["input_ids"][index]
        found = [decoded(family, ids, answer) for answer in batch.rows[index].answers]
        assert found == answers(kind)


@BOTH
@EVERY
def test_every_answer_ends_with_the_familys_token(family: str, side: Side) -> None:
    batch = mixed(family, side)
    expected = built(family).tokenizer.convert_tokens_to_ids(end_of_turn(family))
    assert adapter(family).end_of_turn_id == expected
    for ids, row in zip(batch.inputs["input_ids"], batch.rows, strict=True):
        assert [ids[answer.end_of_turn].item() for answer in row.answers] == (
            [expected] * len(row.answers))
        assert all(a.end_of_turn == a.tokens[-1].position + 1 for a in row.answers)


@EVERY
def test_only_the_first_token_is_glued_and_only_where_the_template_says(family: str) -> None:
    found = [answer.tokens for row in mixed(family, "right").rows for answer in row.answers]
    assert all(t.prefix == b"" for tokens in found for t in tokens[1:])
    assert all(t.suffix == b"" for tokens in found for t in tokens)
    # "Assistant: Une": where no token " U" exists, the space is a token of its own
    assert {tokens[0].prefix for tokens in found} - {b""} == {GLUE[family]} if family in GLUE else (
        not any(tokens[0].prefix for tokens in found))


@pytest.mark.parametrize("family", [*FAMILIES])
@pytest.mark.parametrize("answer", ["The square", pytest.param("21 cats", id="number")])
def test_all_that_must_be_generated_is_learned(family: str, answer: str) -> None:
    model, item = adapter(family), talk("How many?", answer)
    prompt = model.encode_prompts([(item, 0)], [[]])["input_ids"][0].tolist()
    (row,) = encode(model, [item]).rows
    (span,) = row.answers
    assert row.ids[: len(prompt)] == prompt
    learned = [*(t.position for t in span.tokens), span.end_of_turn]
    assert learned == list(range(len(prompt), span.end_of_turn + 1))


@EVERY
def test_bytes_of_the_answer_are_covered_once(family: str) -> None:
    for kind, row in zip(kinds(family), mixed(family, "left").rows, strict=True):
        for text, answer in zip(answers(kind), row.answers, strict=True):
            edges = [0, *(t.end for t in answer.tokens)]
            assert [t.start for t in answer.tokens] == edges[:-1]
            assert edges[-1] == len(text.encode())


@BOTH
@EVERY
def test_rows_are_padded_on_the_asked_side(family: str, side: Side) -> None:
    batch = mixed(family, side)
    width = batch.inputs["input_ids"].shape[1]
    for index, row in enumerate(batch.rows):
        expected = width - len(row.ids) if side == "left" else 0
        assert row.offset == expected
        kept = batch.inputs["input_ids"][index, expected : expected + len(row.ids)]
        assert kept.tolist() == row.ids
        assert batch.inputs["attention_mask"][index].sum() == len(row.ids)


def moved(answer: AnswerSpan, offset: int) -> Any:
    tokens = [(t.position - offset, t.start, t.end, t.prefix, t.suffix) for t in answer.tokens]
    return answer.turn, answer.is_answer, tokens, answer.end_of_turn - offset


@BOTH
@EVERY
def test_batch_mates_do_not_matter(family: str, side: Side) -> None:
    for kind, row in zip(kinds(family), mixed(family, side).rows, strict=True):
        alone = encode(adapter(family), [record(kind)], side).rows[0]
        assert (alone.ids, alone.text, alone.images) == (row.ids, row.text, row.images)
        assert alone.byte_spans == row.byte_spans
        assert [moved(a, 0) for a in alone.answers] == [moved(a, row.offset) for a in row.answers]


# ----- images --------------------------------------------------------------------------------


def _grid(inputs: Inputs) -> int:
    return int(inputs["image_grid_thw"].prod(-1).sum()) // 4


def _tiles(inputs: Inputs, each: int) -> int:
    return each * int(inputs["pixel_attention_mask"].flatten(2).any(-1).sum())


IMAGE_TOKENS: dict[str, Callable[[Inputs], int]] = {
    "llava": lambda inputs: 16 * inputs["pixel_values"].shape[0],
    "gemma3": lambda inputs: 9 * inputs["pixel_values"].shape[0],
    "internvl": lambda inputs: 4 * inputs["pixel_values"].shape[0],
    "qwen2_5_vl": _grid,
    "qwen3_vl": _grid,
    "smolvlm": lambda inputs: _tiles(inputs, 4),
    "idefics3": lambda inputs: _tiles(inputs, 1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CORE_FAMILIES)
def test_image_spans_hold_the_image_tokens(family: str, kind: str) -> None:
    config = built(family).model.config
    image = getattr(config, "image_token_id", None) or config.image_token_index
    batch = encode(adapter(family), [record(kind)])
    (row,) = batch.rows
    assert len(row.images) == len(record(kind).images)
    inside = [sum(index == image for index, (a, b) in zip(row.ids, row.byte_spans, strict=True)
                  if start <= a < b <= end) for start, end in row.images]
    assert all(inside)
    assert sum(inside) == row.ids.count(image)
    assert sum(inside) == (IMAGE_TOKENS[family](batch.inputs) if row.images else 0)


# ----- as the family's own code gives them ----------------------------------------------------


def own_ids(family: str, kind: str, turns: int | None = None) -> list[int]:
    processor, vision = built(family).processor, family in CORE_FAMILIES
    encoded = processor.apply_chat_template(
        chat(kind, vision, turns), tokenize=True, return_dict=True,
        add_generation_prompt=turns is not None)
    ids = encoded["input_ids"]
    return list(ids[0] if vision else ids)


@EVERY
def test_ids_are_those_of_the_processor(family: str) -> None:
    bos = built(family).tokenizer.bos_token_id
    for kind, row in zip(kinds(family), mixed(family, "right").rows, strict=True):
        assert row.ids == own_ids(family, kind)
        if SPECS[family].adds_bos:
            assert row.ids[0] == bos
            assert row.ids.count(bos) == 1


@pytest.mark.parametrize("family", CORE_FAMILIES)
def test_image_tensors_are_those_of_the_processor(family: str) -> None:
    own = built(family).processor.apply_chat_template(
        chat("two images", True), tokenize=True, return_dict=True, return_tensors="pt")
    inputs = encode(adapter(family), [record("two images")]).inputs
    assert torch.equal(inputs["pixel_values"], own["pixel_values"])


@EVERY
def test_prompts_are_left_padded_and_the_processors(family: str) -> None:
    wanted = [(kind, turn) for kind in kinds(family) for turn in range(len(answers(kind)))]
    records = [(record(kind), turn) for kind, turn in wanted]
    images = [[ref.load() for ref in r.images] for r, _ in records]
    inputs = adapter(family).encode_prompts(records, images)
    masks = inputs["attention_mask"].bool()
    assert masks[:, -1].all()
    for (kind, turn), ids, mask in zip(wanted, inputs["input_ids"], masks, strict=True):
        assert ids[mask].tolist() == own_ids(family, kind, turns=2 * turn + 1)


# ----- plain texts ---------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("family", [*CORE_FAMILIES, *CORE_TEXT_FAMILIES])
def test_plain_texts_are_learned_whole_and_end(family: str, side: Side) -> None:
    tokenizer, text = built(family).tokenizer, "The picture: 图片 🐈"
    row, longer = encode(adapter(family), [parse_record({"text": text}, "a"),
                                           parse_record({"text": text * 2}, "b")], side).rows
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = [tokenizer.bos_token_id] if SPECS[family].adds_bos else []
    assert row.ids == [*start, *bare, tokenizer.eos_token_id]
    assert len(longer.ids) > len(row.ids)
    (answer,) = row.answers
    assert [t.position - row.offset for t in answer.tokens] == list(
        range(len(start), len(start) + len(bare)))
    assert answer.end_of_turn == row.offset + len(row.ids) - 1


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_empty_text_is_dropped(text: str) -> None:
    with pytest.raises(SampleDropped, match="empty text"):
        adapter("llama").render(Record("x", text=text))


def test_plain_text_ends_where_the_tokenizer_adds_the_end() -> None:
    model = make_adapter(with_eos(), "student")
    (row,) = encode(model, [parse_record({"text": "The picture"}, "x")]).rows
    assert row.ids == with_eos()("The picture")["input_ids"]


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_bos_changes_no_other_token(scheme: str) -> None:
    tokenizer = metaspace(scheme)
    (row,) = encode(make_adapter(tokenizer, "student"), [parse_record({"text": "The"}, "x")]).rows
    assert row.ids == [*tokenizer("The")["input_ids"], tokenizer.eos_token_id]


def test_virtual_space_that_is_a_token_is_learned() -> None:
    """No merge with the prepended space: it is a token without bytes, but must be generated."""
    model = make_adapter(metaspace("always"), "student")
    (row,) = encode(model, [parse_record({"text": "picture"}, "x")]).rows
    assert model.tokenizer.convert_ids_to_tokens(row.ids)[:3] == ["<s>", "▁", "p"]
    assert row.answers[0].tokens[0].position == 1


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_beside_conversations_are_as_alone(family: str, side: Side) -> None:
    """Some want special tokens added and some have them written; the ids must not show it."""
    items = [record("text"), parse_record({"text": "The picture: 图片"}, "x"), record("talk")]
    rows = encode(adapter(family), items, side).rows
    for item, row in zip(items, rows, strict=True):
        (alone,) = encode(adapter(family), [item], side).rows
        assert alone.ids == row.ids
        assert [moved(a, 0) for a in alone.answers] == [moved(a, row.offset) for a in row.answers]


def test_added_ends_are_written_out_beside_conversations() -> None:
    model, item = make_adapter(with_eos(), "student"), parse_record({"text": "The picture"}, "x")
    chat_row, row = encode(model, [talk("Is it?", "Yes"), item]).rows
    assert row.ids == with_eos()("The picture")["input_ids"]
    assert row.answers[0].end_of_turn == len(row.ids) - 1
    assert chat_row.ids == encode(model, [talk("Is it?", "Yes")]).rows[0].ids


def test_rendered_leaves_special_tokens_to_the_tokenizer() -> None:
    text = parse_record({"text": "a"}, "x")
    found = adapter("llama").render(text)
    assert (found.text, found.add_special) == ("a<|eot_id|>", True)
    found = make_adapter(with_eos(), "student").render(text)
    assert (found.text, found.add_special) == ("a", True)
    assert not adapter("qwen2").render(text).add_special
    assert not adapter("llama").render(record("text")).add_special  # the template wrote it


def test_base_models_prompts_stay_open_where_the_tokenizer_adds_the_end() -> None:
    tokenizer = with_eos()
    tokenizer.chat_template = None
    item = parse_record({"prompt": "It shows:", "completion": " A"}, "x")
    ids = make_adapter(tokenizer, "student").encode_prompts([(item, 0)], [[]])["input_ids"]
    assert ids[0].tolist() == tokenizer("It shows:")["input_ids"][:-1]


def test_conversations_do_not_end_twice_where_the_tokenizer_adds_the_end() -> None:
    model = make_adapter(with_eos(), "student")
    (row,) = encode(model, [talk("Is it?", "Yes")]).rows
    assert row.ids == encode(adapter("llama"), [talk("Is it?", "Yes")]).rows[0].ids


# ----- models without a template ---------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("completion", ["A red square.", " A red square.", "\n\nA red square.\n"])
def test_base_model_joins_prompt_and_completion(completion: str, side: Side) -> None:
    tokenizer = built("gpt2").tokenizer
    rows = [{"prompt": "It shows:", "completion": completion},
            {"prompt": "There:", "completion": "x"}]
    row = encode(adapter("gpt2"), [parse_record(r, "x") for r in rows], side).rows[0]
    assert tokenizer.decode(row.ids) == "It shows:" + completion + tokenizer.eos_token
    (answer,) = row.answers
    inner = [t for t in answer.tokens if not t.prefix]
    assert answer.tokens[0].start == 0
    assert answer.tokens[-1].end == len(completion)  # nothing is trimmed but by a template
    assert len(inner) >= len(answer.tokens) - 1
    assert row.ids[answer.end_of_turn - row.offset] == tokenizer.eos_token_id


def test_base_models_prompts_are_plain_text() -> None:
    item = parse_record({"prompt": "It shows:", "completion": " A"}, "x")
    inputs = adapter("gpt2").encode_prompts([(item, 0)], [[]])
    assert inputs["input_ids"][0].tolist() == built("gpt2").tokenizer("It shows:")["input_ids"]


def test_base_model_gets_a_padding_token() -> None:
    assert adapter("gpt2").tokenizer.pad_token == "<|endoftext|>"


def test_end_of_text_is_learned_though_it_is_the_padding() -> None:
    rows = encode(adapter("gpt2"), [parse_record({"text": t}, "x") for t in ("a", "a b c")]).rows
    assert [len(row.ids) for row in rows] == [2, 4]
    assert [row.answers[0].end_of_turn for row in rows] == [1, 3]


@pytest.mark.parametrize("texts", [("a", "b", "c", "d"), ("a",)])
def test_base_model_refuses_conversations(texts: tuple[str, ...]) -> None:
    with pytest.raises(SampleDropped, match=r"no chat template; set student\.chat_template"):
        adapter("gpt2").render(talk(*texts))


def test_base_model_drops_empty_answers() -> None:
    with pytest.raises(SampleDropped, match="empty answer"):
        adapter("gpt2").render(talk("a", "  "))


# ----- what an adapter refuses -------------------------------------------------------------------


@pytest.mark.parametrize("family", CORE_TEXT_FAMILIES)
def test_text_models_refuse_images(family: str) -> None:
    with pytest.raises(SampleDropped, match="cannot see it"):
        adapter(family).render(record("image"))


@pytest.mark.parametrize("where", ["answer", "both"])
def test_special_token_in_an_answer_drops_the_record(where: str) -> None:
    question = "Is<|im_end|>it?" if where == "both" else "Is it?"
    with pytest.raises(SampleDropped, match="special token inside"):
        encode(adapter("qwen2"), [talk(question, "Yes<|im_end|>no")])


@pytest.mark.parametrize(("template", "message"), [
    (None, r"has no chat template; set teacher\.chat_template"),
    ("{% for m in messages %}{{ '' + m['content'] }}{% endfor %}",  # a list raises
     r"prints no typed parts.*teacher\.chat_template"),
])
def test_processor_that_cannot_place_images_is_refused(
    template: str | None, message: str
) -> None:
    processor = build("llava").processor
    processor.chat_template = template
    with pytest.raises(TaidError, match=message):
        make_adapter(processor, "teacher")


@pytest.mark.parametrize(("family", "kind"), [("llava", ImageTextAdapter), ("llama", TextAdapter)])
def test_adapter_follows_the_processor(family: str, kind: type) -> None:
    assert type(adapter(family)) is kind


def test_other_objects_are_no_processors() -> None:
    with pytest.raises(TaidError, match="neither a tokenizer"):
        make_adapter(object(), "student")


def test_encoding_leaves_the_processor_as_it_was() -> None:
    before = set(vars(built("internvl").processor))
    encode(adapter("internvl"), [record("image")])
    assert set(vars(built("internvl").processor)) == before
