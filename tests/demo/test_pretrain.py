"""Training from scratch: what is learnt from, and that it is learnt."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from worlds import models, pretrain

MODELS = Path(__file__).resolve().parents[2] / "data" / "models"


def test_the_answer_mask_covers_answers_and_their_ends():
    start, end = 8, 9
    ids = torch.tensor([[1, 2, 8, 3, 4, 9, 1, 8, 5, 9, 0], [1, 8, 9, 1, 2, 8, 3, 9, 0, 0, 0]])
    expected = torch.tensor(
        [[0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0]], dtype=torch.bool
    )
    assert torch.equal(pretrain.answer_mask(ids, start, end), expected)


@pytest.mark.parametrize("name", models.NAMES)
def test_labels_spell_the_answers(name):
    processor, _ = models.build(name)
    tokenizer = getattr(processor, "tokenizer", processor)
    rng = random.Random(0)
    drawn = [pretrain.example(name.split("-")[0], rng, 3) for _ in range(4)]
    labels = pretrain.encode(name, processor, drawn)["labels"]
    for row, each in zip(labels, drawn, strict=True):
        said = tokenizer.decode(row[row != pretrain.IGNORED])
        assert said == "".join(turn.answer + tokenizer.eos_token for turn in each.turns)


@pytest.mark.parametrize("name", ["scenes-student", "words-student"])
def test_a_few_steps_lower_the_loss_and_repeat_exactly(name):
    recipe = replace(pretrain.RECIPES[name], steps=6, batch=4)
    processor, trained = pretrain.train(name, recipe)
    again = pretrain.train(name, recipe)[1]
    fresh = models.build(name)[1].eval()
    rng = random.Random(99)
    drawn = [pretrain.example(name.split("-")[0], rng, 3) for _ in range(8)]
    batch = pretrain.encode(name, processor, drawn)
    with torch.no_grad():
        before, after, repeated = (model(**batch).loss for model in (fresh, trained, again))
    assert after < before - 0.2
    assert after == repeated


def shipped(name):
    """The processor (in the world of words: the tokenizer) and the trained model of `name`."""
    if name.startswith("scenes"):
        auto, loader = AutoModelForImageTextToText, AutoProcessor
    else:
        auto, loader = AutoModelForCausalLM, AutoTokenizer
    return loader.from_pretrained(MODELS / name), auto.from_pretrained(MODELS / name).eval()


@pytest.mark.parametrize("world", ["scenes", "words"])
def test_shipped_teachers_know_more_than_shipped_students(world):
    scores = {}
    for role in ("teacher", "student"):
        name = f"{world}-{role}"
        scores[role] = pretrain.accuracy(name, *shipped(name), n_scenes=64)["all"][0]
    assert scores["teacher"] > 0.85
    assert scores["student"] < scores["teacher"] - 0.1


def test_accuracy_agrees_with_greedy_generation():
    name = "words-student"
    tokenizer, model = shipped(name)
    rng = random.Random(pretrain.EVAL_SEED)
    asked = [one for _ in range(32) for one in pretrain.asked_alone("words", rng)]
    right = sum(greedy(tokenizer, model, each) == each.turns[0].answer for each in asked)
    scores = pretrain.accuracy(name, tokenizer, model, n_scenes=32)
    assert scores["all"] == (right / len(asked), len(asked))
    assert 0 < right < len(asked)


def greedy(tokenizer, model, asked):
    """What the model answers when it generates."""
    prompt = tokenizer.apply_chat_template(
        asked.messages()[:1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :]).split(tokenizer.eos_token)[0]
