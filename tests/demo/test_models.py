"""The four small models: tokenizers, templates, and checkpoints that load with Auto classes."""

import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from worlds import models, pretrain, scenes, words

ODD = "naïve 数 1 23  x\n\n it's DON'T  ?"
CHAT = [
    {"role": "system", "content": "ignored"},
    {"role": "user", "content": "what does it say?"},
    {"role": "assistant", "content": "cat"},
    {"role": "user", "content": "describe it."},
]


def texts(n: int = 100) -> list[str]:
    """Questions and answers of both worlds, and one text of neither."""
    rng, told = random.Random(9), [ODD]
    for _ in range(n):
        telling, scene = words.tell(rng)
        told += [text for turn in words.turns(telling, scene, rng) for text in turn[1:]]
    return told


@pytest.fixture(scope="module", params=models.NAMES)
def saved(request, tmp_path_factory):
    """The name, the processor and model as built, and the folder they are saved in."""
    processor, model = models.build(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    models.save(folder, processor, model)
    return request.param, processor, model.eval(), folder


def test_a_checkpoint_loads_with_auto_classes(saved):
    name, processor, model, folder = saved
    auto = AutoModelForImageTextToText if "scenes" in name else AutoModelForCausalLM
    again = auto.from_pretrained(folder).eval()
    assert again.dtype == torch.float32
    batch = pretrain.encode(
        name, processor, [pretrain.example(name.split("-")[0], random.Random(0), 2)]
    )
    with torch.no_grad():
        difference = (again(**batch).logits - model(**batch).logits).abs().max()
    assert difference < 0.05  # the weights are stored in float16


def test_the_saved_tokenizer_gives_the_same_ids(saved):
    name, processor, _, folder = saved
    before = getattr(processor, "tokenizer", processor)
    loader = AutoProcessor if "scenes" in name else AutoTokenizer
    loaded = loader.from_pretrained(folder)
    after = getattr(loaded, "tokenizer", loaded)
    for text in texts():
        assert after(text).input_ids == before(text).input_ids
        assert after.decode(after(text).input_ids) == text
    assert loaded.apply_chat_template(CHAT, tokenize=False) == processor.apply_chat_template(
        CHAT, tokenize=False
    )


def test_every_word_of_the_worlds_is_one_token(saved):
    tokenizer = getattr(saved[1], "tokenizer", saved[1])
    for text in texts(500)[1:]:
        assert len(tokenizer(text).input_ids) <= len(text.split()) + sum(map(text.count, "?,."))


def test_the_chat_template(saved):
    name, processor, _, _ = saved
    dialect = models.DIALECTS[name]
    expected = (
        f"{dialect.user}what does it say?{dialect.assistant}cat{dialect.end}"
        f"{dialect.user}describe it."
    )
    assert processor.apply_chat_template(CHAT, tokenize=False) == expected
    prompted = processor.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert prompted == expected + dialect.assistant
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
    assert processor.apply_chat_template(parts, tokenize=False) == expected
    assert getattr(processor, "tokenizer", processor).eos_token == dialect.end


@pytest.mark.parametrize("world", ["scenes", "words"])
def test_teacher_and_student_share_merges_but_no_ids(world):
    teacher = models.build_tokenizer(f"{world}-teacher")
    student = models.build_tokenizer(f"{world}-student")
    for text in texts(20):
        ids, other = teacher(text).input_ids, student(text).input_ids
        assert teacher.convert_ids_to_tokens(ids) == student.convert_ids_to_tokens(other)
        assert all(a != b for a, b in zip(ids, other, strict=True))
    assert not set(teacher.all_special_tokens) & set(student.all_special_tokens)


@pytest.mark.parametrize(("name", "tokens"), [("scenes-teacher", 64), ("scenes-student", 16)])
def test_an_image_takes_a_fixed_number_of_tokens(name, tokens):
    processor, _ = models.build(name)
    batch = pretrain.encode(name, processor, [pretrain.example("scenes", random.Random(0), 1)])
    image = processor.tokenizer.convert_tokens_to_ids(models.DIALECTS[name].image)
    assert (batch["input_ids"] == image).sum() == tokens
    assert batch["pixel_values"].shape == (1, 3, scenes.SIDE, scenes.SIDE)


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="there are scenes-teacher"):
        models.build("scenes-tutor")
