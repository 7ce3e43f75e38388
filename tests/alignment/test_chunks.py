"""Different tokenizers, batch by batch: all of an answer takes part, and everything fits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from adapters.samples import adapter, encode, head_rows, record, row, talk
from alignment.chunked import Name, Pair, kinds, pair
from tokenizers import normalizers
from torch import Tensor
from zoo import make_tokenizer
from zoo.tokenizers import VARIANTS

from taid_vlm.adapters import AnswerSpan, EncodedRow, Side, make_adapter
from taid_vlm.alignment import AlignedToken, pair_models, supervised_positions
from taid_vlm.alignment.pairing import student_positions, teacher_positions
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.records import Record, parse_record

VARIANT_PAIRS = list(itertools.product(VARIANTS, repeat=2))
FAMILY_PAIRS = [
    (Name("internvl"), Name("llava", "metaspace")),
    (Name("smolvlm"), Name("internvl", "other")),
    (Name("llava", "unigram"), Name("idefics3")),
    (Name("gemma3", "metaspace"), Name("smolvlm", "unigram")),
    (Name("qwen3_vl"), Name("gemma3", "unigram")),
    (Name("idefics3", "other"), Name("qwen2_5_vl", "metaspace")),
    (Name("llama"), Name("qwen2", "metaspace")),
    (Name("gemma2", "unigram"), Name("llama", "other")),
    (Name("qwen2"), Name("gpt2", "metaspace")),
]
SIDES: tuple[Side, Side] = ("left", "right")
EVERY = pytest.mark.parametrize(("teacher", "student"), FAMILY_PAIRS, ids=str)
DOCUMENT = parse_record({"text": "The picture: 图片 🐈, 3.14"}, "document")
LONG = "The picture shows a red square and 3 small cats; naïve 图片 on the left. " * 4
QUESTION = {"prompt": "Is it?\n", "completion": "Ça: a red square, 图片 🐈!"}

Rows = list[tuple[EncodedRow, EncodedRow, list[Any]]]


def samples(teacher: Name, student: Name) -> list[Record]:
    if student.family == "gpt2":
        return [parse_record(QUESTION, "question")]
    return [record(kind) for kind in kinds(teacher, student)]


def aligned(found: Pair, records: list[Record], side: Side = "right") -> Rows:
    rows = zip(encode(found.teacher, records, side).rows, encode(found.student, records, side).rows,
               strict=True)
    return [(t, s, found.pairing.align(t, s)) for t, s in rows]


def taking_part(found: list[Any], positions: Any) -> list[int]:
    return [position for one in found for position in positions(one)]


# ----- coverage ----------------------------------------------------------------------------------


def check_complete(rows: Rows) -> None:
    """Every token of either answer takes part, once, in order."""
    for t, s, found in rows:
        for row_, positions in ((t, teacher_positions), (s, student_positions)):
            expected = [position for position, _ in supervised_positions(row_)]
            assert taking_part(found, positions) == sorted(expected)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("teacher", "student"), VARIANT_PAIRS)
def test_every_token_takes_part_for_every_tokenizer(
    teacher: str, student: str, side: Side
) -> None:
    names = Name("internvl", teacher), Name("internvl", student)
    rows = aligned(pair(*names), samples(*names), side)
    assert len(rows) == 5
    check_complete(rows)


@pytest.mark.parametrize("side", SIDES)
@EVERY
def test_every_token_takes_part_for_every_family(teacher: Name, student: Name, side: Side) -> None:
    """Glued spaces, several turns and images, and texts alone."""
    check_complete(aligned(pair(teacher, student), samples(teacher, student), side))


@pytest.mark.parametrize("family", ["llama", "smolvlm"])  # the second glues a space
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_tokenizers_make_no_chunks(variant: str, family: str) -> None:
    name = Name(family, variant)
    rows = aligned(pair(name, name), samples(name, name))
    assert all(isinstance(one, AlignedToken) for _, _, found in rows for one in found)


def reason_to_leave_out(
    position: int, t: EncodedRow, s: EncodedRow, theirs: AnswerSpan, ours: AnswerSpan
) -> str | None:
    """Why a student's token has no comparison, told from the two answers alone."""
    if position == ours.end_of_turn:
        return "other ends" if theirs.tail != ours.tail or theirs.end_of_turn is None else None
    (token,) = [x for x in ours.tokens if x.position == position]
    common = sorted({x.end for x in theirs.tokens} & {x.end for x in ours.tokens})
    if not common or token.end > common[-1]:
        return "no common end"
    if token.end <= common[0] and t.offset == theirs.tokens[0].position:
        return "nothing stands before the teacher's"
    if token.end <= common[0] and s.offset == ours.tokens[0].position:
        return "nothing stands before the student's"
    last = {x.end: x.suffix for x in theirs.tokens}
    return "glued text" if last.get(token.end) != token.suffix else None


@pytest.mark.parametrize(("teacher", "student"), [
    (Name("qwen2"), Name("llama", "metaspace")), (Name("llama"), Name("qwen2", "other")),
    (Name("qwen2", "unigram"), Name("qwen2")), (Name("gemma2"), Name("llama", "unigram"))], ids=str)
def test_what_is_left_out_of_documents_has_a_reason(teacher: Name, student: Name) -> None:
    (t, s, found), = aligned(pair(teacher, student), [DOCUMENT])
    (theirs,), (ours,) = t.answers, s.answers
    lost = [p for p, _ in supervised_positions(s) if p not in taking_part(found, student_positions)]
    told = [reason_to_leave_out(p, t, s, theirs, ours) for p in lost if p != ours.end_of_turn]
    assert None not in told
    assert bool(told) == (teacher.family == "qwen2" != student.family)  # has no BOS
    ends = pair(teacher, student).pairing.maps[0].same_entry(
        t.ids[theirs.end_of_turn - t.offset], s.ids[ours.end_of_turn - s.offset])
    assert (ours.end_of_turn in lost) == (not ends)


@pytest.mark.parametrize("limits", [(None, 30), (30, None), (30, 20)])
def test_texts_cut_in_different_places_are_compared_as_far_as_both_go(
    limits: tuple[int | None, int | None]
) -> None:
    teacher = make_adapter(make_tokenizer("llama"), "teacher", limits[0])
    student = make_adapter(make_tokenizer("llama", "metaspace"), "student", limits[1])
    pairing = pair_models(teacher, student, head_rows("llama"), head_rows("llama", "metaspace"))
    found = Pair(teacher, student, pairing)
    batch = found.collator()([{"text": LONG}])
    assert (batch["counts"]["cut"], batch["counts"]["rows"]) == (1, 1)
    check_chunks(found, batch)
    compared = said(found, "student", batch["labels"])
    assert compared.removeprefix(b" ") == said(found, "teacher", batch["teacher_labels"])
    assert LONG.encode().startswith(compared.removeprefix(b" "))
    ids = [len(batch[f"{role}_inputs"]["input_ids"][0]) for role in ("teacher", "student")]
    assert all(limit is None or length <= limit for length, limit in zip(ids, limits, strict=True))
    assert len(batch["labels"]) > 0.8 * min(limit for limit in limits if limit) / 2


def test_text_of_the_template_is_no_part_of_a_chunk() -> None:
    """ ".\n" is one token there: neither the last piece nor the end of the turn is compared."""
    tokenizer = make_tokenizer("llama")
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|eot_id|>'", "'\n<|eot_id|>'")
    teacher = adapter("llama", "teacher", "metaspace")
    student = make_adapter(tokenizer, "student")
    rows = head_rows("llama", "metaspace"), len(student.table)
    pairing = pair_models(teacher, student, *rows)
    (t, s, found), = aligned(Pair(teacher, student, pairing), [talk("Is it?", "It is blue.")])
    lost = {p for p, _ in supervised_positions(s)} - set(taking_part(found, student_positions))
    told = {reason_to_leave_out(p, t, s, t.answers[0], s.answers[0]) for p in lost}
    assert told == {"glued text", "other ends"}


@pytest.mark.parametrize(("teacher", "student"), FAMILY_PAIRS[:6], ids=str)
def test_questions_take_part_too(teacher: Name, student: Name) -> None:
    found = pair(teacher, student)
    items = [record(kind) for kind in ("two images", "talk")]
    t_rows, s_rows = (encode(m, items, "right", "all").rows
                      for m in (found.teacher, found.student))
    for t, s in zip(t_rows, s_rows, strict=True):
        one = found.pairing.align(t, s)
        for row_, positions in ((t, teacher_positions), (s, student_positions)):
            taken, expected = taking_part(one, positions), supervised_positions(row_)
            assert taken == sorted(set(taken))
            assert set(taken) <= {p for p, _ in expected}
            assert len(taken) > 0.8 * len(expected)


# ----- a batch -----------------------------------------------------------------------------------


def said(found: Pair, role: str, ids: Tensor) -> bytes:
    table = getattr(found, role).table
    return b"".join(table.text[i] or b"" for i in ids.tolist())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("teacher", "student"), FAMILY_PAIRS[:-1], ids=str)
def test_a_batch_fits_together(teacher: Name, student: Name, side: Side) -> None:
    found = pair(teacher, student)
    batch = found.collator(side)([row(kind) for kind in kinds(teacher, student)])
    for role, name in (("student", "labels"), ("teacher", "teacher_labels")):
        ids, mask = batch[f"{role}_inputs"]["input_ids"], batch[f"{role}_mask"]
        assert torch.equal(ids.roll(-1, 1)[mask], batch[name])
        assert batch[f"chunk_{role}"].shape == batch[name].shape
    assert torch.equal(batch["student_mask"].nonzero()[:, 0], batch["row"])
    assert len(batch["turn"]) == len(batch["categories"]) == len(batch["row"])
    assert len(batch["map_index"]) == len(batch["pair_student"]) == len(batch["pair_teacher"])
    check_pairs(found, batch)
    check_chunks(found, batch)
    counts = batch["counts"]
    assert counts["aligned_tokens"] == counts["supervised_tokens"] == len(batch["labels"])
    assert counts["chunk_tokens"] == int((batch["chunk_student"] >= 0).sum()) > 0
    assert counts["dropped"] == {}


def check_pairs(found: Pair, batch: dict[str, Any]) -> None:
    """Labels are one entry; a pair outside chunks is one and the same token alone."""
    s, t = batch["pair_student"], batch["pair_teacher"]
    assert torch.equal(s, s.unique())
    assert torch.equal(t, t.unique())
    inside = batch["chunk_student"][s] >= 0
    assert torch.equal(batch["chunk_student"][s], batch["chunk_teacher"][t])
    for index, theirs, ours, chunked in zip(
            batch["map_index"].tolist(), batch["teacher_labels"][t].tolist(),
            batch["labels"][s].tolist(), inside.tolist(), strict=True):
        vocabulary = found.pairing.maps[index]
        assert vocabulary.same_entry(theirs, ours)
        assert chunked or vocabulary.same_token(theirs, ours)
    alone = (batch["chunk_student"] < 0).nonzero()[:, 0]
    assert torch.equal(alone, s[~inside])
    assert torch.equal((batch["chunk_teacher"] < 0).nonzero()[:, 0], t[~inside])


def check_chunks(found: Pair, batch: dict[str, Any]) -> None:
    """The same bytes on both sides, virtual and glued spaces apart; the last token is the last."""
    s, t = batch["chunk_student"], batch["chunk_teacher"]
    number = len(batch["chunk_last"])
    assert sorted(s[s >= 0].unique().tolist()) == list(range(number))
    assert sorted(t[t >= 0].unique().tolist()) == list(range(number))
    for index, last in enumerate(batch["chunk_last"].tolist()):
        own = (s == index).nonzero()[:, 0]
        assert int(own[-1]) == last
        assert own.tolist() == list(range(last - len(own) + 1, last + 1))
        assert len(set(batch["row"][own].tolist())) == len(set(batch["turn"][own].tolist())) == 1
        ours, theirs = (said(found, role, batch[name][chunk == index]) for role, name, chunk in (
            ("student", "labels", s), ("teacher", "teacher_labels", t)))
        assert ours.removeprefix(b" ") == theirs.removeprefix(b" ")
        if len(found.pairing.maps) == 1:  # where the first tokens are in one cell, that counts too
            first = int((t == index).nonzero()[0])
            assert (int(own[0]) in batch["pair_student"].tolist()) == found.pairing.maps[
                0].same_entry(int(batch["teacher_labels"][first]), int(batch["labels"][own[0]]))


def test_a_batch_without_a_usable_row_is_empty() -> None:
    batch = pair(*FAMILY_PAIRS[0]).collator()([{"prompt": "hello", "completion": " "}])
    for name in ("labels", "teacher_labels", "map_index", "pair_student", "pair_teacher",
                 "chunk_student", "chunk_teacher", "chunk_last"):
        assert batch[name].shape == (0,)
        assert batch[name].dtype == torch.long
    assert batch["counts"]["chunk_tokens"] == batch["counts"]["rows"] == 0


def test_another_normal_form_leaves_out_the_record_alone() -> None:
    """The student spells "e" + accent, the teacher composes them."""
    tokenizer = make_tokenizer("llama", "other")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
    teacher, student = adapter("llama", "teacher"), make_adapter(tokenizer, "student")
    data = [{"prompt": "what", "completion": text} for text in
            ("a red one", "un cafe\u0301 noir", "un caf\u00e9 noir")]
    pairing = pair_models(teacher, student, head_rows("llama"), head_rows("llama", "other"),
                          samples=[item["completion"] for item in data])
    assert pairing.case == "c"
    (warning,) = pairing.warnings
    assert "1 of 3 probed answers" in warning
    batch = DistillationCollator(student, teacher, pairing)(data)
    assert batch["counts"]["dropped"] == {"cannot be aligned": 1}
    assert batch["counts"]["rows"] == 2
    assert batch["counts"]["aligned_tokens"] == batch["counts"]["supervised_tokens"]


def test_a_pair_says_how_it_is_compared() -> None:
    pairing = pair(*FAMILY_PAIRS[0], alignment="auto").pairing
    assert pairing.case == "c"
    assert "different splits (Teacher: '" in pairing.reason
    assert "groups of tokens" in pairing.reason
    same = Name("llama"), Name("llama")
    assert pair(*same, alignment="auto").pairing.case == "a"
    assert pair(*same).pairing.reason.startswith("asked for")
