"""The families whose processors need more than the generic adapter, and why they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.samples import adapter, answers, built, encode, pictures, record, talk
from transformers import (
    AutoProcessor,
    BartConfig,
    Florence2Config,
    PreTrainedConfig,
    T5Config,
)
from zoo import VLM_FAMILIES, build, save
from zoo.images import image, noise
from zoo.specs import SPECS

from taid_vlm.adapters import EncodedBatch, check_image_token, make_adapter
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import SampleDropped, TaidError
from taid_vlm.models.loading import load_config
from taid_vlm.records import Record, parse_record


def ask(question: str, answer: str, *sizes: tuple[int, int]) -> Record:
    content = [*({"type": "image", "image": noise(*size, seed=i)} for i, size in enumerate(sizes)),
               {"type": "text", "text": question}]
    return parse_record({"messages": [{"role": "user", "content": content},
                                      {"role": "assistant", "content": answer}]}, "x")


def image_tokens(batch: EncodedBatch) -> list[list[int]]:
    """Bytes of every expanded image, per row."""
    return [[end - start for start, end in row.images] for row in batch.rows]


# ----- PaliGemma ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "two images"])
def test_paligemma_gets_what_its_processor_gives(kind: str) -> None:
    processor, (answer,) = built("paligemma").processor, answers(kind)
    ours = encode(adapter("paligemma"), [record(kind)], "left").inputs
    question = record(kind).messages[0].text
    own = processor(text="<image>" * len(pictures(kind)) + question, images=[pictures(kind)],
                    suffix=answer, return_tensors="pt")
    assert set(own) - set(ours) == {"labels"}
    assert all(torch.equal(ours[key], own[key]) for key in ours)
    assert own["token_type_ids"].tolist() == (own["labels"] != -100).long().tolist()


def test_paligemmas_prompts_are_its_processors() -> None:
    processor, item = built("paligemma").processor, record("image")
    ours = adapter("paligemma").encode_prompts([(item, 0)], [pictures("image")])
    own = processor(text="<image>" + item.messages[0].text, images=[pictures("image")],
                    return_tensors="pt")
    assert all(torch.equal(ours[key], own[key]) for key in ours)
    assert not ours["token_type_ids"].any()


def test_paligemmas_processor_misplaces_the_bos_of_texts_without_images() -> None:
    """Why its text is written by the adapter; once this fails, it need not be."""
    processor, question = built("paligemma").processor, "How many objects?"
    batch = processor(text=["<image>What?", question], images=[[image("square")], []],
                      padding=True, return_tensors="pt")
    text = processor.tokenizer.decode(batch["input_ids"][1])
    assert "How ma<bos>ny objects?" in text
    with pytest.raises(ValueError, match="images"):
        processor(text=[question], return_tensors="pt")


def test_paligemma_reads_texts_without_images() -> None:
    model, tokenizer = adapter("paligemma"), built("paligemma").tokenizer
    for items in ([record("text")], [record("image"), record("text")]):
        batch = encode(model, items)
        row, kinds = batch.rows[-1], batch.inputs["token_type_ids"][-1]
        assert tokenizer.decode(row.ids) == "<bos>How many objects?\nThere are 21  of them.<eos>"
        first = row.answers[0].tokens[0].position
        assert kinds[: len(row.ids)].tolist() == [0] * first + [1] * (len(row.ids) - first)
        assert ("pixel_values" in batch.inputs) == (len(items) > 1)


def test_paligemma_reads_documents() -> None:
    tokenizer = built("paligemma").tokenizer
    model = make_adapter(built("paligemma").processor, "student", max_length=6)
    item = parse_record({"text": "The picture shows a red square on the left."}, "x")
    (row,) = encode(model, [item]).rows
    assert tokenizer.decode(row.ids) == f"<bos>{item.text}<eos>"
    (batch,) = [DistillationCollator(model)([item])]
    ids = batch["student_inputs"]["input_ids"][0]
    assert tokenizer.decode(ids) == f"<bos>{item.text}"[: len(tokenizer.decode(ids))]
    assert len(ids) == 6 and batch["counts"]["cut"] == 1
    with pytest.raises(SampleDropped, match="empty text"):
        model.render(Record("x", text=" "))


def test_a_batch_of_nothing_is_still_a_batch_for_paligemma() -> None:
    batch = DistillationCollator(adapter("paligemma"))([talk("Is it?", " ")])
    assert batch["counts"]["dropped"] == {"empty answer": 1}
    assert not batch["student_mask"].any()


@pytest.mark.parametrize("texts", [("a", "b", "c", "d"), ("a",)])
def test_paligemma_answers_once(texts: tuple[str, ...]) -> None:
    with pytest.raises(SampleDropped, match=r"which answers one question; give records of one"):
        adapter("paligemma").render(talk(*texts))


def test_paligemma_takes_no_chat_template() -> None:
    processor = build("paligemma").processor
    processor.chat_template = SPECS["gemma3"].template
    with pytest.raises(TaidError, match=r"Remove teacher\.chat_template"):
        make_adapter(processor, "teacher")


# ----- image tokens ---------------------------------------------------------------------------


def test_perception_lm_takes_images_of_unequal_tiles() -> None:
    model, built_ = adapter("perception_lm"), built("perception_lm")
    items = [ask("What?", "It is", (96, 32), (32, 32)), ask("What?", "It is", (32, 64))]
    together = encode(model, items)
    tiles = [len(built_.processor.image_processor(noise(*size))["pixel_values"][0])
             for size in ((96, 32), (32, 32), (32, 64))]
    assert len(set(tiles)) > 1
    assert together.inputs["pixel_values"].shape == (1, sum(tiles), 3, 32, 32)
    expected = [16 * len("<|image|>") * count for count in tiles]
    assert image_tokens(together) == [expected[:2], expected[2:]]


@torch.no_grad()
def test_perception_lms_tiles_are_seen_as_its_processor_stacks_them() -> None:
    model = built("perception_lm")
    item = ask("What?", "It is", (32, 64), (32, 64))
    inputs = encode(adapter("perception_lm"), [item]).inputs
    own = model.processor(text=[adapter("perception_lm").render(item).text],
                          images=[[ref.load() for ref in item.images]], add_special_tokens=False,
                          return_tensors="pt")
    assert own["pixel_values"].shape[0] == 2 and inputs["pixel_values"].shape[0] == 1
    assert torch.equal(inputs["input_ids"], own["input_ids"])
    ids = {key: own[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    assert torch.equal(model.model(**ids).logits, model.model(**ids | {
        "pixel_values": inputs["pixel_values"]}).logits)


def test_onevision_cuts_an_image_only_where_it_stands_alone() -> None:
    one, two = ask("What?", "It is", (64, 64)), ask("What?", "It is", (64, 64), (64, 64))
    alone, beside = (encode(adapter("llava_onevision"), items) for items in ([one], [one, two]))
    length = len("<image>")
    assert image_tokens(beside) == [image_tokens(alone)[0], [17 * length] * 2]
    assert image_tokens(alone)[0][0] > 17 * length


@pytest.mark.parametrize("family", ["gemma4", "mistral3", "qwen2_vl", "qwen3_5", "lfm2_vl"])
def test_soft_tokens_follow_the_image(family: str) -> None:
    items = [ask("What?", "It is", size) for size in ((64, 64), (96, 48), (128, 32))]
    counts = [sizes[0] for sizes in image_tokens(encode(adapter(family), items))]
    assert len(set(counts)) > 1


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_qwens_inputs_say_where_images_are(family: str) -> None:
    inputs: dict[str, Any] = encode(adapter(family), [record("image")]).inputs
    image_id = built(family).model.config.image_token_id
    assert torch.equal(inputs["mm_token_type_ids"] == 1, inputs["input_ids"] == image_id)
    without = {k: v for k, v in inputs.items() if k != "mm_token_type_ids"}
    if family != "qwen2_5_vl":  # this one takes plain positions then, without a word
        with pytest.raises(ValueError, match="mm_token_type_ids"):
            built(family).model(**without)
        return
    with torch.no_grad():
        change = built(family).model(**without).logits - built(family).model(**inputs).logits
    assert change.abs().max() > 0.1


# ----- prompts --------------------------------------------------------------------------------

def test_a_template_that_leaves_answers_open_is_closed() -> None:
    """GLM-4 prints no end; in a conversation the next role's token stands there, and that is what
    its models are trained to say."""
    model = adapter("glm4")
    assert model.added_end == "<|user|>"
    rendered = model.render(talk("Is it?", "Yes", "And?", "It is"))
    assert rendered.text.endswith("It is<|user|>") and rendered.text.count("<|user|>") == 3
    (row,) = encode(model, [talk("Is it?", "Yes")]).rows
    assert row.ids[row.answers[0].end_of_turn - row.offset] == model.end_of_turn_id
    assert model.tokenizer.convert_ids_to_tokens(model.end_of_turn_id) == "<|user|>"
    assert adapter("llama").added_end == ""


OPENINGS = {
    "qwen3": ("", "<think>\n\n</think>\n\n"),
    "qwen3_5": ("", "\n</think>\n\n"),
    "qwen3_moe": ("", "<think>\n\n</think>\n\n"),
    "smollm3": ("", "<think>\n\n</think>\n\n"),
    "gemma4": ("<|channel>thought\n<channel|>", ""),
    "gemma4_text": ("<|channel>thought\n<channel|>", ""),
    "gpt_oss": ("", "<|channel|>final<|message|>"),
    "llava_onevision": ("\n", " \n"),
}


@pytest.mark.parametrize(
    "family", [f for f in SPECS if SPECS[f].template is not None])
def test_prompts_end_as_what_answers_are_learned_after(family: str) -> None:
    model, item = adapter(family), talk("Is it?", "The red square", "And?", "It is")
    prompt = model.prompt(item, 1).text
    assert model._opening(thinks=False) == OPENINGS.get(family, ("", ""))
    rendered = model.render(item)
    before = rendered.text[: rendered.spans[1].start]
    assert before.startswith(prompt) and not before[len(prompt) :].strip(" ")


THOUGHT = "<think>\nA hat?\n</think>\n\nNo."


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5", "qwen3_vl", "llama"])
def test_thoughts_are_learned(family: str) -> None:
    """Qwen3's template takes the answer apart, the others print it as it is."""
    model, item = adapter(family), talk("Is it?", "Yes", "And?", THOUGHT)
    (row,) = encode(model, [item]).rows
    data, answer = row.text.encode(), row.answers[1]
    spans = [row.byte_spans[token.position] for token in answer.tokens]
    assert b"".join(data[a:b] for a, b in spans) == THOUGHT.encode()
    assert answer.end_of_turn == answer.tokens[-1].position + 1
    prompt = model.prompt(item, 1).text  # it is to think: no thought, empty or begun, stands here
    assert row.text.startswith(prompt + THOUGHT)


def test_thoughts_of_earlier_answers_are_context_that_is_gone() -> None:
    """Qwen3's template takes them out; what it prints of the answer is learned."""
    rendered = adapter("qwen3").render(talk("Is it?", THOUGHT, "And?", "Yes"))
    assert [rendered.text[s.start : s.end] for s in rendered.spans] == ["No.", "Yes"]
    assert "A hat?" not in rendered.text
    assert rendered.notes == (
        "a thought that the student's chat template takes out of an earlier turn",)


# ----- left padding ----------------------------------------------------------------------------


@torch.no_grad()
def test_left_padding_does_not_move_learned_positions() -> None:
    """GPT-2 numbers its positions from the first column on, padding or not."""
    model, item = built("gpt2").model, talk("Is it?", " The red square")
    longer = talk("Is it? There are two small cats and three large dogs", " Yes")
    (row,), alone = encode(adapter("gpt2"), [item]).rows, encode(adapter("gpt2"), [item]).inputs
    batch = encode(adapter("gpt2"), [item, longer], "left")
    assert batch.rows[0].offset > 0
    found = model(**batch.inputs).logits[0, -len(row.ids) :]
    torch.testing.assert_close(found, model(**alone).logits[0], rtol=1e-4, atol=1e-4)
    without = {k: v for k, v in batch.inputs.items() if k != "position_ids"}
    assert (model(**without).logits[0, -len(row.ids) :] - found).abs().max() > 0.1


# ----- refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [T5Config(), BartConfig(), Florence2Config()], ids=type)
def test_encoder_decoders_are_refused(config: PreTrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(TaidError, match=rf"student: .*{config.model_type}.* encoder-decoder"):
        load_config(ModelSpec(str(tmp_path)), "student")


# ----- a tokenizer that has lost its image token -----------------------------------------------

LAST = ("llava", "fast_vlm", "gemma3", "llava_next")  # it comes back with the same number


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_the_image_token_must_be_where_the_model_looks(family: str, tmp_path: Path) -> None:
    model = build(family)
    folder, config = save(model, tmp_path / family), model.model.config
    check_image_token(make_adapter(AutoProcessor.from_pretrained(folder), "student"), config)
    token = model.processor.tokenizer.convert_ids_to_tokens(config.image_token_id)
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree["added_tokens"] = [x for x in tree["added_tokens"] if x["content"] != token]
    file.write_text(json.dumps(tree))
    moved = make_adapter(AutoProcessor.from_pretrained(folder), "student")
    if family in LAST:
        check_image_token(moved, config)
        return
    with pytest.raises(TaidError, match=f"image_token_id is {config.image_token_id}") as error:
        check_image_token(moved, config)
    assert "tokenizer.json" in str(error.value) and str(folder) in str(error.value)
