"""Answers depend on the question alone: not on batches, padding, order, or what else is drawn."""

from __future__ import annotations

import math
import random
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.quiz import questions, shuffled
from PIL import Image
from zoo import VLM_FAMILIES, Built, build

from taid_vlm.adapters import ModelAdapter, make_adapter
from taid_vlm.benchmarks.answering import Answer, Generating, plan_batches
from taid_vlm.benchmarks.question import Question
from taid_vlm.benchmarks.store import AnswerStore
from taid_vlm.errors import TaidError
from taid_vlm.models.generation import Sampling, generate_answers, generate_batch
from taid_vlm.records import ImageRef, Message, Record

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "idefics3", "internvl", "gemma3", "llava_next",
            "perception_lm", "paligemma", "llama", "gemma2", "gpt2")


@cache
def built(family: str) -> Built:
    return build(family)


@cache
def adapter(family: str) -> ModelAdapter:
    return make_adapter(built(family).processor, "model")


def answered(
    family: str, asked: list[Question], batch_size: int, seed: int = 0, temperature: float = 0.0,
    new: int = 6, process: tuple[int, int] = (0, 1), done: tuple[str, ...] = (),
) -> dict[str, Answer]:
    answerer = Generating(built(family).model, adapter(family), batch_size, process,
                          max_new_tokens=new, temperature=temperature, top_p=0.9)
    return {question.id: answer for given in answerer.answers(asked, done, seed)
            for question, answer in given}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_same_in_any_batch_and_order(family: str, temperature: float) -> None:
    asked = questions(7, seen=family in VLM_FAMILIES)
    alone = answered(family, asked, 1, temperature=temperature)
    assert len({answer.text for answer in alone.values()}) > 1  # the model does not babble one word
    assert not any(answer.problem for answer in alone.values())
    for size, seed in ((3, 1), (8, 2)):
        found = answered(family, shuffled(asked, seed), size, temperature=temperature)
        assert found == alone


def test_answers_are_those_of_transformers_itself() -> None:
    """Against a loop of single forward passes without cache or padding."""
    ours, asked = built("qwen2_5_vl"), questions(4)
    found = answered("qwen2_5_vl", asked, 4)
    for question in asked:
        inputs = adapter("qwen2_5_vl").encode_prompts(
            [(question.record(), 0)], [[image.load() for image in question.images]])
        stops, said = {ours.tokenizer.eos_token_id}, []
        ids, kinds = inputs.pop("input_ids"), inputs.pop("mm_token_type_ids")
        while len(said) < 6 and not stops & set(said):
            with torch.inference_mode():
                logits = ours.model(**{**inputs, "input_ids": ids, "mm_token_type_ids": kinds,
                                       "attention_mask": torch.ones_like(ids)}).logits
            said.append(int(logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([said[-1:]])], 1)
            kinds = torch.cat([kinds, torch.zeros(1, 1, dtype=kinds.dtype)], 1)
        text = ours.tokenizer.decode(said, skip_special_tokens=True).strip()
        assert found[question.id] == Answer(text, cut=not stops & set(said))


def test_seeds_draw_differently_and_the_same_again() -> None:
    asked = questions(8, seen=False)
    first, again, other = (answered("llama", asked, 4, seed, 1.0) for seed in (1, 1, 2))
    assert first == again
    assert sum(first[name] != other[name] for name in first) > 4


def test_draws_follow_the_probabilities() -> None:
    """The share of every first token against softmax(logits / T) cut at top_p; chi-squared."""
    ours, number = built("llama"), 4000
    record = Record("x", (Message("user", ("what is this",)),))
    inputs = adapter("llama").encode_prompts([(record, 0)], [[]])
    with torch.inference_mode():
        logits = ours.model(**inputs).logits[0, -1].double() / 0.5
    chances, order = logits.softmax(-1).sort(descending=True)
    kept = int((chances.cumsum(0) < 0.8).sum()) + 1
    expected = {int(order[i]): float(chances[i] / chances[:kept].sum()) for i in range(kept)}
    assert kept >= 3
    drawn: Counter[str] = Counter()
    for start in range(0, number, 1000):
        records = [(Record(f"q{start + i}", record.messages), 0) for i in range(1000)]
        drawn.update(said.text for said in generate_batch(
            ours.model, adapter("llama"), records, max_new_tokens=1,
            sampling=Sampling(0.5, 0.8, seed=3)))
    texts: Counter[str] = Counter()
    for token, chance in expected.items():
        texts[ours.tokenizer.decode([token], skip_special_tokens=True).strip()] += chance
    assert set(drawn) <= set(texts)
    chi = sum((drawn[t] - number * p) ** 2 / (number * p) for t, p in texts.items())
    freedom = len(texts) - 1
    assert chi < freedom + 4 * math.sqrt(2 * freedom) + 4


def test_processes_share_the_questions() -> None:
    asked = questions(11, seen=False)
    whole = answered("llama", asked, 2)
    parts = [answered("llama", asked, 2, process=(rank, 3)) for rank in range(3)]
    assert sum(map(len, parts)) == len(asked)
    assert parts[0] | parts[1] | parts[2] == whole


def test_batches_that_are_done_are_left_out() -> None:
    asked = questions(9, seen=False)
    batches = plan_batches(asked, 3)
    assert plan_batches(shuffled(asked, 5), 3) == batches
    lengths = [len(str(question.prompt)) for batch in batches for question in batch]
    assert lengths == sorted(lengths, reverse=True)
    done = [question.id for question in batches[0]] + [batches[1][0].id]
    found = answered("llama", asked, 3, done=tuple(done))
    assert set(found) == {question.id for batch in batches[1:] for question in batch}


def test_a_question_that_cannot_be_asked_costs_only_itself() -> None:
    asked = questions(6)
    broken = Question("broken", (None, "what is this"), (ImageRef(b"no image", "row 3"),))
    long = Question("long", (" ".join(["square"] * 3000),))
    found = answered("llava", [*asked, broken, long], 4)
    assert found.pop("broken") == Answer(problem="unreadable image")
    assert found.pop("long") == Answer(problem="longer than the model's context")
    assert found == answered("llava", asked, 4)


def test_a_broken_question_leaves_the_others_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    plain = Generating.batch

    def batch(self: Generating, asked: Any, seed: int) -> list[Answer]:
        answers = plain(self, asked, seed)
        sizes.append(len(asked))
        return answers

    monkeypatch.setattr(Generating, "batch", batch)
    broken = Question("broken", (None, "what is this"), (ImageRef(b"no image", "row 3"),))
    answered("llava", [*questions(7), broken], 8)
    assert sorted(sizes) == [1, 2, 4]


def test_an_answer_that_the_limit_ends_is_marked() -> None:
    asked = questions(8, seen=False)
    short, long = (answered("llama", asked, 4, new=new) for new in (2, 200))
    assert all(answer.cut for answer in short.values())
    assert not all(answer.cut for answer in long.values())
    assert all(long[name].text.startswith(short[name].text) for name in long)


def test_greedy_is_greedy_whatever_the_checkpoint_asks_for(recwarn: pytest.WarningsRecorder
                                                           ) -> None:
    ours, asked = build("qwen2"), questions(5, seen=False)
    records = [(question.record(), 0) for question in asked]
    plain = generate_answers(ours.model, make_adapter(ours.processor, "model"), records,
                             max_new_tokens=12)
    ours.model.generation_config.update(
        do_sample=True, temperature=0.7, top_k=5, top_p=0.8, repetition_penalty=1.3,
        no_repeat_ngram_size=2, num_beams=3, min_length=50)
    assert generate_answers(ours.model, make_adapter(ours.processor, "model"), records,
                            max_new_tokens=12) == plain
    assert not [warning for warning in recwarn if "generation" in str(warning.message)]


def test_neither_random_state_nor_mode_is_moved() -> None:
    model = built("llava").model
    model.train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first = answered("llava", questions(3), 2, temperature=1.0)
    torch.manual_seed(99)
    torch.set_rng_state(states[0])
    assert first == answered("llava", questions(3), 2, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert [module.training for module in model.modules()] == modes
    model.eval()


def test_a_full_memory_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(built("llama").model, "generate", full)
    with pytest.raises(TaidError, match=r"--batch-size = 4: .* run again with a smaller one"):
        answered("llama", questions(4, seen=False), 4)


def test_a_processor_that_fails_costs_its_question_and_one_that_always_does_everything(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2-VL's refuses a picture that is 200 times as wide as high."""
    stripe = Question("stripe", (None, "what"), (
        ImageRef(Image.new("RGB", (4000, 4)), "wide"),))
    asked = [question for question in questions(6) if question.images]
    found = answered("qwen2_5_vl", [stripe, *asked], 4)
    assert found.pop("stripe") == Answer(problem="the processor failed")
    assert found == answered("qwen2_5_vl", asked, 4)
    with pytest.raises(TaidError, match=r"processor takes no question: .*aspect ratio"):
        answered("qwen2_5_vl", [stripe], 4)
    monkeypatch.setattr(adapter("llama"), "encode_prompts", lambda *args: 1 / 0)
    with pytest.raises(TaidError, match=r"processor takes no question: .*ZeroDivisionError"):
        answered("llama", questions(60, seen=False), 4)


def test_an_error_of_the_model_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(built("llama").model, "generate", broken)
    with pytest.raises(ValueError, match="a bug"):
        answered("llama", questions(2, seen=False), 2)


@pytest.mark.parametrize(("key", "value"), [
    ("seconds", "1.0"), ("cut", "no"), ("problem", 3), ("answer", None), ("likelihoods", [[1]]),
    ("likelihoods", [["a", 2]]), ("likelihoods", 4)])
def test_stored_answers_of_another_shape_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, "quiz", {}, {"1": "x"})
    line = {"id": "1", "asked": "x", "answer": "yes", "seed": 0, "seconds": 0.5}
    store._take(line)
    assert store.answers["1", 0].seconds == 0.5
    with pytest.raises(TaidError, match=key):
        store._take({**line, key: value})
