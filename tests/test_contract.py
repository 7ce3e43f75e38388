"""What every family must hold, and every ordered pair of families: one file, so that a new family
is one builder in the zoo and nothing here."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from zoo import TEXT_FAMILIES, VLM_FAMILIES, Built, build, save
from zoo.images import image
from zoo.tokenizers import VARIANTS

from taid_vlm.adapters import (
    Continuation,
    EncodedBatch,
    EncodedRow,
    ModelAdapter,
    Side,
    continued_record,
    make_adapter,
)
from taid_vlm.alignment import (
    AlignedToken,
    Pairing,
    pair_models,
    student_positions,
    supervised_positions,
    teacher_positions,
)
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.batch.forward import student_forward, teacher_forward
from taid_vlm.batch.losses import token_losses
from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import SampleDropped
from taid_vlm.models.forward import answer_logits, head_rows
from taid_vlm.models.generation import generate_answers
from taid_vlm.models.loading import load_model, load_processor
from taid_vlm.objectives import parse_objective
from taid_vlm.records import Record, parse_record

torch.set_num_threads(1)

FAMILIES = VLM_FAMILIES + TEXT_FAMILIES
SIDES: tuple[Side, Side] = ("left", "right")
# Every answer begins with a word that is a token with and without a space in front of it.
TALKS: dict[str, tuple[str, ...]] = {
    "image": ("<image>What is in this picture?", "The picture shows a red square."),
    "images": ("Compare <image> with <image>.", "The second is larger:\n\n1. 3.14 > 2\n2. it's so"),
    "turns": ("<image>What?", "A blue circle.", "And 颜色?", "It is green.", "Sure?", "It is"),
    "text": ("How many objects?", "The 21  of them."),
    "multibyte": ("Décrivez 图片 🐈", "The réponse naïve : 图片里有 3 只猫 🐈‍⬛, déjà — Ångström!"),
    "talk": ("What?", "A circle.", "And the cats?", "It is green."),
}
# (family, what it cannot take): why
REFUSED: dict[tuple[str, str], str] = {
    ("paligemma", "turns"): "its prefix is seen both ways: it answers one question",
    ("paligemma", "talk"): "its prefix is seen both ways: it answers one question",
    ("gpt2", "talk"): "a base model without a chat template",
}


# Linear attention works in float32 over chunks of 64 tokens, which padding moves: what is left of
# logits of size 6 is rounding (in float64 it is 0).
ROUNDING: dict[str, float] = {"qwen3_5": 4e-3}


# What closes an answer in the middle of a conversation is never generated there: gpt-oss ends with
# <|return|>, its template writes <|end|> into the past.
OTHER_END_INSIDE = ("gpt_oss",)


def kinds(*families: str) -> list[str]:
    """What all of these families can be shown."""
    blind = any(family in TEXT_FAMILIES for family in families)
    return [kind for kind, texts in TALKS.items()
            if not (blind and "<image>" in "".join(texts))
            and not any((family, kind) in REFUSED for family in families)]


@cache
def record(kind: str) -> Record:
    texts, count = TALKS[kind], "".join(TALKS[kind]).count("<image>")
    messages = [{"role": ("user", "assistant")[i % 2], "content": text}
                for i, text in enumerate(texts)]
    own = 10 * list(TALKS).index(kind)  # no two records share an image
    pictures = [image(name, seed=own + i) for i, name in enumerate(("wide", "odd")[:count])]
    return parse_record({"messages": messages} | ({"images": pictures} if count else {}), kind)


@cache
def built(family: str, tokenizer: str = "plain") -> Built:
    return build(family, tokenizer=tokenizer, seed=int(tokenizer == "permuted"))


@cache
def adapter(family: str, role: str) -> ModelAdapter:
    """Teachers have the plain tokenizer, students the permuted one with other ids."""
    return make_adapter(built(family, tokenizer_of(role)).processor, role)


def tokenizer_of(role: str) -> str:
    return "plain" if role == "teacher" else "permuted"


def encode(model: ModelAdapter, names: list[str], side: Side) -> EncodedBatch:
    items = [record(kind) for kind in names]
    images = [[ref.load() for ref in item.images] for item in items]
    return model.encode([model.render(item) for item in items], images, side)


@cache
def encoded(family: str, role: str, side: Side) -> EncodedBatch:
    """All records of a family in one batch: with one image, two, none, and of many turns."""
    return encode(adapter(family, role), kinds(family), side)


def row_of(family: str, role: str, side: Side, kind: str) -> EncodedRow:
    return encoded(family, role, side).rows[kinds(family).index(kind)]


@cache
def paired(teacher: str, student: str) -> Pairing:
    rows = [head_rows(built(family, tokenizer_of(role)).model)
            for family, role in ((teacher, "teacher"), (student, "student"))]
    return pair_models(adapter(teacher, "teacher"), adapter(student, "student"), *rows)


def mask_of(batch: EncodedBatch) -> Tensor:
    """The positions that predict what is supervised."""
    mask = torch.zeros_like(batch.inputs["input_ids"], dtype=torch.bool)
    for index, row in enumerate(batch.rows):
        mask[index, [position - 1 for position, _ in supervised_positions(row)]] = True
    return mask


@torch.no_grad()
def logits(model: Any, batch: EncodedBatch) -> list[Tensor]:
    """Per row of the batch, the logits at its predicting positions."""
    mask = mask_of(batch)
    return list(answer_logits(model, batch.inputs, mask).split(mask.sum(-1).tolist()))


# ----- every pair -------------------------------------------------------------------------------


PAIRS = [*itertools.product(VLM_FAMILIES, repeat=2), *itertools.product(TEXT_FAMILIES, repeat=2)]


def covered(row: EncodedRow, position: int) -> bytes:
    start, end = row.byte_spans[position - row.offset]
    return row.text.encode()[start:end]


def inner_ends(row: EncodedRow) -> set[int | None]:
    """Ends of all answers but the last."""
    return {answer.end_of_turn for answer in row.answers[:-1]}


def no_ends(row: EncodedRow) -> set[int | None]:
    return set()


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_every_token_of_every_answer_is_aligned(teacher: str, student: str) -> None:
    pairing = paired(teacher, student)
    assert pairing.case == "b"
    for side, kind in itertools.product(SIDES, kinds(teacher, student)):
        t, s = row_of(teacher, "teacher", side, kind), row_of(student, "student", side, kind)
        found = pairing.align(t, s)
        inside = inner_ends if (teacher in OTHER_END_INSIDE) != (student in OTHER_END_INSIDE) \
                else no_ends
        for role, row in ((teacher_positions, t), (student_positions, s)):
            assert [p for pair in found for p in role(pair)] == [
                p for p, _ in supervised_positions(row) if p not in inside(row)]
        tokens = [pair for pair in found if isinstance(pair, AlignedToken)]
        # a space before an answer that one template prints and no token of its first word holds
        assert len(found) == len(tokens) or pairing.glue is not None
        ends = [answer.end_of_turn for answer in s.answers]
        inner = [pair for pair in tokens if pair.student not in ends]
        assert [covered(t, pair.teacher).lstrip() for pair in inner] == [
            covered(s, pair.student).lstrip() for pair in inner]


# ----- every family -----------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_is_learned_is_the_answer(family: str, tokenizer: str) -> None:
    model = make_adapter(built(family, tokenizer).processor, "student")
    for kind, row in zip(kinds(family), encode(model, kinds(family), "right").rows, strict=True):
        assert len(row.images) == len(record(kind).images)
        for text, answer in zip(record(kind).answers, row.answers, strict=True):
            said = b"".join(covered(row, token.position)[len(token.prefix) :]
                            for token in answer.tokens)
            assert said == text.encode()
            assert answer.end_of_turn is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_mates_and_padding_do_not_matter(family: str) -> None:
    model = built(family, "permuted").model
    batches = [encoded(family, "student", side) for side in SIDES]
    together = [logits(model, batch) for batch in batches]
    for index, kind in enumerate(kinds(family)):
        alone = encode(adapter(family, "student"), [kind], "right")
        expected = logits(model, alone)[0]
        for batch, found in zip(batches, together, strict=True):
            assert batch.rows[index].ids == alone.rows[0].ids
            torch.testing.assert_close(
                found[index], expected, rtol=1e-3, atol=ROUNDING.get(family, 2e-4))


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_answers_depend_on_their_own_images_only(family: str) -> None:
    model, students = built(family, "permuted").model, adapter(family, "student")
    batch = encoded(family, "student", "right")
    flip = Image.Transpose.FLIP_LEFT_RIGHT
    other = [[ref.load().transpose(flip) for ref in record(kind).images] for kind in kinds(family)]
    items = [students.render(record(kind)) for kind in kinds(family)]
    mirrored = students.encode(items, other, "right")
    for kind, a, b in zip(kinds(family), logits(model, batch), logits(model, mirrored),
                          strict=True):
        change = (a - b).abs().max()
        assert change > 1e-2 if record(kind).images else change < ROUNDING.get(family, 2e-4), kind


@pytest.mark.parametrize("family", FAMILIES)
def test_the_future_is_not_seen(family: str) -> None:
    """The logits in front of an answer's last token do not depend on it."""
    students = adapter(family, "student")
    whole, cut = (students.render(parse_record({"messages": [
        {"role": "user", "content": "How many?"}, {"role": "assistant", "content": text}]}, "x"))
        for text in ("The red square is", "The red square"))
    one, two = (logits(built(family, "permuted").model, students.encode([item], [[]]))[0]
                for item in (whole, cut))
    shared = len(two) - 1  # all but the one in front of the end of the turn
    torch.testing.assert_close(
        one[:shared], two[:shared], rtol=1e-3, atol=ROUNDING.get(family, 2e-4))


TEACHERS = {**dict.fromkeys(VLM_FAMILIES, "qwen3_vl"), **dict.fromkeys(TEXT_FAMILIES, "qwen2")}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_reaches_the_student(family: str) -> None:
    teacher, model = built(TEACHERS[family]).model, build(family, tokenizer="permuted").model
    pairing = paired(TEACHERS[family], family)
    collate = DistillationCollator(adapter(family, "student"), adapter(TEACHERS[family], "teacher"),
                                   pairing, padding_side="left")
    batch = collate([record(kind) for kind in kinds(TEACHERS[family], family)])
    row_kinds = kinds(TEACHERS[family], family)
    unaligned = sum(len(record(kind).answers) - 1 for kind in row_kinds) \
        if family in OTHER_END_INSIDE else 0
    counts = batch["counts"]
    assert counts["aligned_tokens"] == counts["supervised_tokens"] - unaligned > 0
    assert not counts["dropped"]
    objective = parse_objective({"terms": [{"name": "taid"}, {"name": "ce"}]})
    losses = token_losses(objective, batch, student_forward(model.train(), batch),
                          teacher_forward(teacher, batch), pairing, t=0.5)
    torch.stack(list(losses.values())).sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    frozen = {name for name, p in model.named_parameters()} - moved
    # what picks keys for sparse attention is not reached by any loss on its output
    apart = ("vision", "visual", "self_attn.indexer")
    assert all(any(part in name for part in apart) for name in frozen), frozen
    if family in VLM_FAMILIES:
        assert any("vision" in name or "visual" in name for name in moved)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_is_the_same(family: str, tmp_path: Path) -> None:
    ours = built(family, "permuted")
    spec = ModelSpec(str(save(ours, tmp_path)))
    model, again = load_model(spec, "student").eval(), make_adapter(
        load_processor(spec, "student"), "student")
    old, new = encoded(family, "student", "left"), encode(again, kinds(family), "left")
    assert [row.ids for row in new.rows] == [row.ids for row in old.rows]
    assert all(torch.equal(new.inputs[key], value) for key, value in old.inputs.items())
    assert all(map(torch.equal, logits(model, new), logits(ours.model, old)))
    questions = [(record(kind), len(record(kind).answers) - 1) for kind in kinds(family)]
    said = generate_answers(ours.model, adapter(family, "student"), questions, max_new_tokens=3)
    assert generate_answers(model, again, questions, max_new_tokens=3) == said
    assert generate_answers(model, again, questions, max_new_tokens=3, batch_size=1) == said


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_begun_where_they_were_learned(family: str) -> None:
    """Generation's first token is the one that training's logits would say."""
    model, students = built(family, "permuted").model, adapter(family, "student")
    batch = encoded(family, "student", "left")
    questions = [(record(kind), len(record(kind).answers) - 1) for kind in kinds(family)]
    said = generate_answers(model, students, questions, max_new_tokens=1)
    for row, found, first in zip(batch.rows, logits(model, batch), said, strict=True):
        positions = [position for position, _ in supervised_positions(row)]
        at = positions.index(row.answers[-1].tokens[0].position)
        expected = students.tokenizer.decode([found[at].argmax()], skip_special_tokens=True)
        assert first == expected.strip()


def continuation(row: EncodedRow, kind: str) -> Continuation:
    """A row's last answer as if the model had sampled it: its own tokens."""
    answer = row.answers[-1]
    first, last = answer.tokens[0].position, answer.end_of_turn
    assert last is not None
    return Continuation(record(kind), answer.turn,
                        tuple(row.ids[first - row.offset : last - row.offset]),
                        row.ids[last - row.offset])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_was_sampled_is_learned_as_the_same_reference(
    family: str, side: Side
) -> None:
    """The reference's own tokens behind the prompt: the same inputs, the same tokens learned."""
    students, names = adapter(family, "student"), kinds(family)
    reference = encoded(family, "student", side)
    sampled = [continued_record(students, continuation(row, kind))
               for row, kind in zip(reference.rows, names, strict=True)]
    images = [[ref.load() for ref in item.images] for item, _ in sampled]
    again = students.encode([rendered for _, rendered in sampled], images, side)
    for index, (old, new) in enumerate(zip(reference.rows, again.rows, strict=True)):
        (answer,), before = new.answers, old.answers[-1]
        kept = len(new.ids)  # a template prints more behind the end of a turn
        assert (new.ids, new.byte_spans) == (old.ids[:kept], old.byte_spans[:kept])
        assert old.text.startswith(new.text)
        assert answer.end_of_turn == new.offset + kept - 1
        assert [token[1:] for token in answer.tokens] == [token[1:] for token in before.tokens]
        assert [p - new.offset for p in answer.positions] == [
            p - old.offset for p in before.positions]
        for key, value in reference.inputs.items():
            if value.shape[:2] == reference.inputs["input_ids"].shape:
                assert torch.equal(again.inputs[key][index, new.offset : new.offset + kept],
                                   value[index, old.offset : old.offset + kept]), key
    for key, value in reference.inputs.items():
        if value.shape[:2] != reference.inputs["input_ids"].shape:
            assert torch.equal(again.inputs[key], value), key


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sampled_answer_is_aligned_with_every_kind_of_teacher(family: str) -> None:
    """The text in the teacher's template, the tokens as drawn: each is compared, the end, too."""
    teacher = TEACHERS[family]
    pairing = paired(teacher, family)
    collate = DistillationCollator(adapter(family, "student"), adapter(teacher, "teacher"), pairing)
    for kind in kinds(teacher, family):
        row = row_of(family, "student", "right", kind)
        whole = continuation(row, kind)
        cut = replace(whole, ids=whole.ids[:2], end=None)
        for sampled, number in ((whole, len(row.answers[-1].positions)), (cut, 2)):
            batch = collate([sampled])
            assert not batch["counts"]["dropped"], kind
            words = len(cut.ids) if sampled is cut else number
            assert batch["counts"]["aligned_tokens"] == words, kind
            mask = batch["student_mask"][0].nonzero()[:, 0] + 1
            ids = batch["student_inputs"]["input_ids"][0]
            assert ids[mask].tolist() == batch["labels"].tolist()
            end = () if sampled.end is None else (sampled.end,)
            assert tuple(batch["labels"].tolist()) == (*sampled.ids, *end)[-len(mask):]


@pytest.mark.parametrize(("family", "kind"), REFUSED)
def test_what_a_family_cannot_take_is_refused(family: str, kind: str) -> None:
    with pytest.raises(SampleDropped,
                       match=r"is a conversation \(user, assistant, user, assistant"):
        adapter(family, "student").render(record(kind))
