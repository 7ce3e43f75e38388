"""Choosing by likelihood, against one row at a time in float64 without padding or adapters."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from benchmarks.quiz import questions, shuffled
from zoo import VLM_FAMILIES, Built, build

from taid_vlm.adapters import ModelAdapter, make_adapter
from taid_vlm.benchmarks import likelihood as module
from taid_vlm.benchmarks.answering import Answer
from taid_vlm.benchmarks.likelihood import Choosing, log_likelihoods
from taid_vlm.benchmarks.question import Question
from taid_vlm.models.forward import answer_logits
from taid_vlm.records import ImageRef

FAMILIES = ("llava", "qwen2_5_vl", "internvl", "idefics3", "gemma3", "llama", "gemma2")


@cache
def built(family: str) -> Built:
    return build(family)


@cache
def adapter(family: str) -> ModelAdapter:
    return make_adapter(built(family).processor, "model")


def tokens_of(family: str, messages: list[dict[str, Any]], images: list[Any], **options: Any
              ) -> Any:
    processor = built(family).processor
    text = processor.apply_chat_template(messages, tokenize=False, **options)
    if family in VLM_FAMILIES:
        return processor(text=[text], images=[images] if images else None, return_tensors="pt",
                         add_special_tokens=False)
    return processor([text], return_tensors="pt", add_special_tokens=False)


def reference(family: str, question: Question, said: str) -> tuple[float, int]:
    """Log-likelihood of an answer: what the conversation's ids have more than the prompt's, up to
    the token that ends a turn."""
    def message(role: str, parts: tuple[str | None, ...]) -> dict[str, Any]:
        if family not in VLM_FAMILIES:
            return {"role": role, "content": "".join(filter(None, parts))}
        return {"role": role, "content": [{"type": "image"} if part is None else
                                          {"type": "text", "text": part} for part in parts]}

    asked, answer = message("user", question.prompt), message("assistant", (said,))
    images = [image.load() for image in question.images]
    prompt = tokens_of(family, [asked], images, add_generation_prompt=True)["input_ids"][0]
    inputs = tokens_of(family, [asked, answer], images)
    ids = inputs["input_ids"][0]
    assert torch.equal(ids[: len(prompt)], prompt)
    end = len(prompt) + ids[len(prompt):].tolist().index(adapter(family).end_of_turn_id)
    with torch.inference_mode():
        logits = built(family).model(**inputs).logits[0].double()
    chances = logits[len(prompt) - 1 : end - 1].log_softmax(-1)
    return float(chances.gather(-1, ids[len(prompt) : end, None]).sum()), end - len(prompt)


def chosen(family: str, asked: list[Question], batch_size: int = 4, **how: Any
           ) -> dict[str, Answer]:
    answerer = Choosing(built(family).model, adapter(family), batch_size, **how)
    return {question.id: answer for given in answerer.answers(asked, (), 0)
            for question, answer in given}


@pytest.mark.parametrize("choose_by", ["letter", "text"])
@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_are_those_of_single_rows(family: str, choose_by: str) -> None:
    asked = questions(6, seen=family in VLM_FAMILIES)
    found = chosen(family, asked, choose_by=choose_by)
    for question in asked:
        texts = question.choices if choose_by == "text" else "ABCD"[: len(question.choices)]
        expected = [reference(family, question, text) for text in texts]
        assert [tokens for _, tokens in found[question.id].likelihoods] == [n for _, n in expected]
        for (ours, _), (theirs, _) in zip(found[question.id].likelihoods, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=6e-4)  # three decimals are kept


@pytest.mark.parametrize("end", ["", " ", "\n"])
def test_a_base_model_continues_the_question_after_a_space(end: str) -> None:
    ours, tokenizer = built("gpt2").model, built("gpt2").tokenizer
    asked = [Question(q.id, (q.prompt[0] + "?" + end,), (), q.answers, q.choices)
             for q in questions(4, seen=False)]
    found = chosen("gpt2", asked, choose_by="text")
    for question in asked:
        for choice, (total, tokens) in zip(question.choices, found[question.id].likelihoods,
                                           strict=True):
            text = question.prompt[0] + ("" if end else " ") + choice
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            start = len(tokenizer(text.removesuffix(choice).removesuffix("" if end else " "))[
                "input_ids"])
            if end == " ":  # the last space of the question is the first token's
                start -= 1
            with torch.inference_mode():
                chances = ours(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
            expected = float(chances.gather(-1, ids[0, start:, None]).sum())
            assert tokens == ids.shape[1] - start
            assert total == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("normalise", ["sum", "bytes", "tokens"])
def test_the_most_likely_choice_is_taken(normalise: str) -> None:
    asked = questions(12)
    found = chosen("qwen2_5_vl", asked, choose_by="text", normalise=normalise)
    letters = set()
    for question in asked:
        scores = []
        for text in question.choices:
            total, tokens = reference("qwen2_5_vl", question, text)
            scores.append(total / {"sum": 1, "bytes": len(text.encode()), "tokens": tokens}[
                normalise])
        assert found[question.id].text == "ABCD"[scores.index(max(scores))]
        letters.add(found[question.id].text)
    assert len(letters) > 1


def test_normalising_matters() -> None:
    """Sums favour short choices, so the ways must part somewhere, or they are one."""
    asked = questions(30, seen=False)
    found = [tuple(answer.text for answer in chosen("llama", asked, 8, choose_by="text",
                                                    normalise=by).values())
             for by in ("sum", "bytes", "tokens")]
    assert len(set(found)) == 3


@pytest.mark.parametrize("family", [*FAMILIES, "llava_next", "paligemma", "gpt2"])
def test_choices_are_the_same_in_any_batch_and_order(family: str) -> None:
    asked = questions(8, seen=family in VLM_FAMILIES)
    alone = chosen(family, asked, 1, choose_by="text", normalise="tokens")
    assert not any(answer.problem for answer in alone.values())
    for size, seed in ((3, 1), (8, 2)):
        found = chosen(family, shuffled(asked, seed), size, choose_by="text", normalise="tokens")
        for name, answer in found.items():
            assert answer.text == alone[name].text
            for ours, theirs in zip(answer.likelihoods, alone[name].likelihoods, strict=True):
                assert ours == pytest.approx(theirs, abs=1.5e-3)


def test_the_images_are_looked_at() -> None:
    """A question with other images has other likelihoods; a text cannot tell them apart."""
    asked = [question for question in questions(9) if question.images]
    blank = [Question(q.id, q.prompt, tuple(
        ImageRef(image.load().point(lambda _: 0), "blank") for image in q.images), q.answers,
        q.choices) for q in asked]
    seen, unseen = (chosen("llava", each, choose_by="text") for each in (asked, blank))
    assert all(seen[q.id].likelihoods != unseen[q.id].likelihoods for q in asked)


def test_equal_choices_fall_to_the_first() -> None:
    same = Question("same", ("what is this",), (), ("A",), ("red", "red", "red"))
    assert chosen("llama", [same], 2, choose_by="text")["same"].text == "A"


def test_a_broken_question_costs_only_itself() -> None:
    asked = questions(5)
    broken = [Question("image", (None, "what"), (ImageRef(b"x", "row"),), ("A",), ("a", "b")),
              Question("empty", ("what",), (), ("A",), ("a", " ")),
              Question("long", ("square " * 3000,), (), ("A",), ("a", "b"))]
    found = chosen("llava", [*asked, *broken], 4, choose_by="text")
    assert {q.id: found[q.id].problem for q in broken} == {
        "image": "unreadable image", "empty": "empty choice",
        "long": "longer than the model's context"}
    assert all(not found[q.id].text for q in broken)
    kept = chosen("llava", asked, 4, choose_by="text")
    assert {name: found[name].text for name in kept} == {n: a.text for n, a in kept.items()}


def test_the_end_of_the_turn_is_not_counted() -> None:
    ours, question = adapter("llama"), questions(1, seen=False)[0]
    rendered = ours.render(question.record("a dark green"))
    (found,) = log_likelihoods(built("llama").model, ours, [rendered], [[]])
    batch = ours.encode([rendered], [[]])
    answer = batch.rows[0].answers[0]
    assert found.tokens == len(answer.tokens) < answer.end_of_turn
    mask = torch.zeros(batch.inputs["input_ids"].shape, dtype=torch.bool)
    mask[0, answer.end_of_turn - 1] = True
    with torch.inference_mode():
        logits = answer_logits(built("llama").model, batch.inputs, mask)
    end = float(logits.double().log_softmax(-1)[0, ours.end_of_turn_id])
    total, _ = reference("llama", question, "a dark green")
    assert found.total == pytest.approx(total, abs=1e-4)
    assert abs(end) > 1e-2


# ----- what choices share -------------------------------------------------------------------

SHARING = ("llama", "gpt2", "qwen3", "llava", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3",
           "paligemma")


def row_by_row(monkeypatch: pytest.MonkeyPatch, family: str, asked: list[Question], how: str
               ) -> dict[str, Answer]:
    with monkeypatch.context() as patch:
        patch.setattr(module, "_endings", lambda *args: None)
        return chosen(family, asked, choose_by=how)


@pytest.mark.parametrize("how", ["text", "letter"])
@pytest.mark.parametrize("family", SHARING)
def test_what_is_computed_once_is_what_whole_rows_give(
    monkeypatch: pytest.MonkeyPatch, family: str, how: str
) -> None:
    monkeypatch.setattr(module, "SHARED_FROM", 1)
    asked = questions(4, seen=family in VLM_FAMILIES)
    answerer = Choosing(built(family).model, adapter(family), 4, choose_by=how)
    calls = []
    hook = built(family).model.register_forward_hook(lambda *args: calls.append(1))
    found = {q.id: answer for given in answerer.answers(asked, (), 0) for q, answer in given}
    hook.remove()
    expected = row_by_row(monkeypatch, family, asked, how)
    for name, answer in found.items():
        assert answer.text == expected[name].text
        assert [n for _, n in answer.likelihoods] == [n for _, n in expected[name].likelihoods]
        assert [x for x, _ in answer.likelihoods] == pytest.approx(
            [x for x, _ in expected[name].likelihoods], abs=1e-3)
    if how == "letter":
        assert len(calls) == 1  # one row a question, whatever the number of choices
    else:
        assert answerer.shared >= 3 and answerer.missed <= 1
        assert len(calls) <= 2 * len(asked) + 1


def test_a_prompt_that_gives_something_else_is_not_believed(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen's models keep an image's positions for a question without one that comes after it."""
    monkeypatch.setattr(module, "SHARED_FROM", 1)
    plain = module.ending_logits

    def wrong(*args: Any) -> Any:
        first, ended = plain(*args)
        return first, ended.roll(1, -1)

    asked = questions(4, seen=False)
    expected = row_by_row(monkeypatch, "llama", asked, "text")
    monkeypatch.setattr(module, "ending_logits", wrong)
    answerer = Choosing(built("llama").model, adapter("llama"), 4, choose_by="text")
    found = {q.id: answer for given in answerer.answers(asked, (), 0) for q, answer in given}
    assert found == expected
    assert (answerer.shared, answerer.missed, answerer.shares) == (0, 1, False)


def test_a_picture_is_processed_once_for_all_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [question for question in questions(6) if len(question.images) == 1]
    ours, pictures = adapter("llava"), []
    plain = type(ours)._process

    def counted(self: Any, rendered: Any, images: Any, *args: Any) -> Any:
        pictures.extend(image for each in images for image in each)
        return plain(self, rendered, images, *args)

    chosen("llava", asked, choose_by="letter")
    monkeypatch.setattr(type(ours), "_process", counted)
    chosen("llava", asked, choose_by="letter")
    assert len(pictures) == len(asked)
    assert len(asked) < sum(len(question.choices) for question in asked)
