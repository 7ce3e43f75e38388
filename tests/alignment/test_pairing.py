"""Aligned means: the same next token, after the same text; and all that can be is aligned."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
from adapters.samples import (
    KINDS,
    TEXT_KINDS,
    adapter,
    answers,
    built,
    encode,
    head_rows,
    metaspace,
    paired,
    record,
    talk,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from zoo import CORE_FAMILIES, CORE_TEXT_FAMILIES, make_tokenizer

from taid_vlm.adapters import EncodedBatch, EncodedRow, ModelAdapter, Side, make_adapter
from taid_vlm.alignment import (
    Aligned,
    AlignedChunk,
    AlignedToken,
    Pairing,
    VocabularyMap,
    align_alone,
    check_modalities,
    pair_models,
    student_positions,
    supervised_positions,
    teacher_positions,
)
from taid_vlm.errors import AlignmentError, TaidError
from taid_vlm.records import Record, parse_record

TEMPLATED = tuple(f for f in CORE_TEXT_FAMILIES if f != "gpt2")
GLUED = {"smolvlm", "idefics3"}  # "Assistant: X": the space belongs to the first token
VLM_PAIRS = list(itertools.permutations(CORE_FAMILIES, 2)) + [(f, f) for f in CORE_FAMILIES]
TEXT_PAIRS = list(itertools.product(TEMPLATED, repeat=2))
PAIRS = VLM_PAIRS + TEXT_PAIRS
EVERY = pytest.mark.parametrize(("teacher", "student"), PAIRS)
SIDES: tuple[Side, Side] = ("left", "right")
DOCUMENT = "The picture: 图片 🐈, 3.14"


def kinds(family: str) -> tuple[str, ...]:
    return (*KINDS, "talk") if family in CORE_FAMILIES else TEXT_KINDS


def records(family: str) -> list[Record]:
    return [*(record(kind) for kind in kinds(family)), parse_record({"text": DOCUMENT}, "document")]


@cache
def encoded(family: str, role: str, tokenizer: str, side: Side) -> EncodedBatch:
    return encode(adapter(family, role, tokenizer), records(family), side)


@cache
def aligned(
    teacher: str, student: str, side: Side = "right"
) -> list[tuple[EncodedRow, EncodedRow, list[Aligned]]]:
    _, _, pairing = paired(teacher, student)
    rows = zip(encoded(teacher, "teacher", "plain", side).rows,
               encoded(student, "student", "permuted", side).rows, strict=True)
    return [(t, s, pairing.align(t, s)) for t, s in rows]


def student_tokens(found: list[Aligned]) -> list[int]:
    return [position for a in found for position in student_positions(a)]


def teacher_tokens(found: list[Aligned]) -> list[int]:
    return [position for a in found for position in teacher_positions(a)]


def glued(teacher: str, student: str) -> bool:
    return (teacher in GLUED) != (student in GLUED)


def token(row: EncodedRow, position: int) -> int:
    return row.ids[position - row.offset]


def covered(row: EncodedRow, position: int) -> bytes:
    start, end = row.byte_spans[position - row.offset]
    return row.text.encode()[start:end]


def ends(row: EncodedRow) -> set[int | None]:
    return {answer.end_of_turn for answer in row.answers}


def before(row: EncodedRow, position: int, turn: int) -> bytes:
    """The answer's bytes that stand in front of a token, glue left aside."""
    start = row.byte_spans[position - row.offset][0]
    first = next(a for a in row.answers if a.turn == turn).tokens[0]
    opening = row.byte_spans[first.position - row.offset][0] + len(first.prefix)
    return row.text.encode()[opening : max(start, opening)]


@pytest.mark.parametrize("side", SIDES)
@EVERY
def test_aligned_tokens_are_the_same_text(teacher: str, student: str, side: Side) -> None:
    _, _, pairing = paired(teacher, student)
    t_glue, s_glue = pairing.glue or (b"", b"")
    for t, s, found in aligned(teacher, student, side):
        assert found
        for a in found:
            if isinstance(a, AlignedChunk):  # a space that only one template puts in front
                ours, theirs = (b"".join(covered(row, p) for p in positions)
                                for row, positions in ((s, a.student), (t, a.teacher)))
                assert ours.lstrip() == theirs.lstrip() != b""
                assert (ours == theirs) is False
                continue
            t_ends, s_ends = a.teacher in ends(t), a.student in ends(s)
            assert t_ends == s_ends
            if t_ends:
                continue
            ours, theirs = covered(s, a.student), covered(t, a.teacher)
            if a.map_index:
                assert ours.startswith(s_glue)
                assert theirs.startswith(t_glue)
                ours, theirs = ours[len(s_glue) :], theirs[len(t_glue) :]
            assert ours == theirs
            assert ours
            assert before(t, a.teacher, a.turn) == before(s, a.student, a.turn)


@EVERY
def test_nothing_is_left_out(teacher: str, student: str) -> None:
    for _, s, found in aligned(teacher, student)[:-1]:
        assert student_tokens(found) == [position for position, _ in supervised_positions(s)]
        chunks = [a for a in found if isinstance(a, AlignedChunk)]
        assert not chunks or glued(teacher, student)
        # with glue only an answer's first token can be split in another place ("A" | " " + "A")
        firsts = {answer.tokens[0].position for answer in s.answers}
        assert all(a.student[0] in firsts for a in chunks)


@EVERY
def test_documents_are_aligned_but_for_ends_that_share_no_entry(
    teacher: str, student: str
) -> None:
    t, s, found = aligned(teacher, student)[-1]
    expected = {p.position for p in s.answers[0].tokens}
    if t.answers[0].tokens[0].position == t.offset or s.answers[0].tokens[0].position == s.offset:
        expected.remove(s.answers[0].tokens[0].position)  # no BOS: nothing predicts the first
    if not one_ends_both(teacher, student):
        expected |= ends(s)
    assert [a.student for a in found] == sorted(expected)


@EVERY
def test_ends_share_an_entry_in_every_map(teacher: str, student: str) -> None:
    t, s, pairing = paired(teacher, student)
    ends = {(t.end_of_turn_id, s.end_of_turn_id)}
    if not one_ends_both(teacher, student):
        ends.add((t.tokenizer.eos_token_id, s.tokenizer.eos_token_id))
    for vocabulary in pairing.maps:
        for a, b in ends:
            assert vocabulary.same_entry(a, b)
            assert entry(vocabulary, vocabulary.teacher, a) is not None
            assert entry(vocabulary, vocabulary.teacher, a) == entry(
                vocabulary, vocabulary.student, b)


@EVERY
def test_every_answer_is_aligned(teacher: str, student: str) -> None:
    for kind, (_, s, found) in zip(kinds(student), aligned(teacher, student), strict=False):
        turns = {a.turn for a in found}
        assert turns == set(range(len(answers(kind))))
        assert set(student_tokens(found)) >= ends(s)


@pytest.mark.parametrize(("teacher", "student"), [p for p in VLM_PAIRS if glued(*p)])
def test_glued_first_tokens_go_through_their_own_map(teacher: str, student: str) -> None:
    _, _, pairing = paired(teacher, student)
    assert pairing.glue == ((b" ", b"") if teacher in GLUED else (b"", b" "))
    assert len(pairing.maps) == 2
    (_t, s, found), *_ = aligned(teacher, student)  # the word "The" has both tokens
    assert [a.map_index for a in found] == [1] + [0] * (len(found) - 1)
    assert len(found) == len(supervised_positions(s))


@pytest.mark.parametrize(("teacher", "student"), [p for p in PAIRS if not glued(*p)])
def test_no_second_map_without_need(teacher: str, student: str) -> None:
    _, _, pairing = paired(teacher, student)
    assert pairing.glue is None
    assert len(pairing.maps) == 1
    assert pairing.case == "b"
    assert pairing.warnings == ()


def image_tokens(family: str, tokenizer: str) -> set[int]:
    if family not in CORE_FAMILIES:
        return set()
    config = built(family, tokenizer).model.config
    return {getattr(config, "image_token_id", None) or config.image_token_index}


@pytest.mark.parametrize("side", SIDES)
@EVERY
def test_positions_are_real_answer_tokens(teacher: str, student: str, side: Side) -> None:
    for role, family, tokens in (("teacher", teacher, "plain"), ("student", student, "permuted")):
        batch, image = encoded(family, role, tokens, side), image_tokens(family, tokens)
        for index, (_, _, found) in enumerate(aligned(teacher, student, side)):
            row = batch.rows[index]
            positions = student_tokens(found) if role == "student" else teacher_tokens(found)
            mask = batch.inputs["attention_mask"][index]
            assert positions == sorted(set(positions))
            assert mask[positions].all()
            assert mask[[p - 1 for p in positions]].all()  # the predicting position
            assert not {token(row, p) for p in positions} & image
            assert min(positions) > row.offset


@EVERY
def test_padding_side_changes_positions_only(teacher: str, student: str) -> None:
    def plain(side: Side) -> list[list[tuple[Any, ...]]]:
        return [[([p - t.offset for p in teacher_positions(a)],
                  [p - s.offset for p in student_positions(a)], a.turn, a.map_index)
                 for a in found] for t, s, found in aligned(teacher, student, side)]

    assert plain("left") == plain("right")


def entry(vocabulary: VocabularyMap, side: Any, index: int) -> int | None:
    """Where a token stands among the mapped entries; None: in the rest."""
    found = (side.shared == index).nonzero()[:, 0].tolist()
    return found[0] if found else None


EOS_IS_NOT_THE_END_OF_TURN = {"idefics3", "gemma3", "gemma2"}


def one_ends_both(teacher: str, student: str) -> bool:
    return (teacher in EOS_IS_NOT_THE_END_OF_TURN) != (student in EOS_IS_NOT_THE_END_OF_TURN)


def check_labels(pairing: Pairing, t: EncodedRow, s: EncodedRow, found: list[Aligned]) -> None:
    for a in found:
        if isinstance(a, AlignedChunk):
            continue
        m = pairing.maps[a.map_index]
        if m.identity:
            assert token(t, a.teacher) == token(s, a.student)
            continue
        ours = entry(m, m.teacher, token(t, a.teacher))
        assert ours is not None
        assert ours == entry(m, m.student, token(s, a.student))


@EVERY
def test_labels_of_both_sides_are_one_shared_entry(teacher: str, student: str) -> None:
    _, _, pairing = paired(teacher, student)
    for t, s, found in aligned(teacher, student):
        check_labels(pairing, t, s, found)


def with_added(token: str, role: str) -> ModelAdapter:
    tokenizer = make_tokenizer("llama")
    tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return make_adapter(tokenizer, role)


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_labels_that_are_twins_are_not_on_different_entries(side: str) -> None:
    """One model says " square" with a merge, the other with an added token of the same bytes."""
    teacher, student = (with_added(" square" if side == role else "<spare>", role)
                        for role in ("teacher", "student"))
    pairing = pair_models(teacher, student, len(teacher.table), len(student.table))
    t, s = (encode(m, [talk("Is it?", "a red square is")]).rows[0] for m in (teacher, student))
    check_labels(pairing, t, s, pairing.align(t, s))


@pytest.mark.parametrize("schemes", [("first", "always"), ("always", "first")])
def test_labels_with_a_virtual_space_are_not_on_different_entries(
    schemes: tuple[str, str]
) -> None:
    """Llama's legacy=False and legacy=True: "The" and "▁The" after a special token."""
    models = []
    for role, scheme in zip(("teacher", "student"), schemes, strict=True):
        tokenizer = metaspace(scheme)
        tokenizer.chat_template = (
            "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}")
        models.append(make_adapter(tokenizer, role))
    pairing = pair_models(*models, *(len(m.table) for m in models))
    t, s = (encode(m, [talk("The", "The")]).rows[0] for m in models)
    check_labels(pairing, t, s, pairing.align(t, s))


def test_position_zero_is_never_predicted() -> None:
    """A document without BOS: nothing stands before its first token."""
    teacher, student, pairing = paired("qwen2", "qwen2")
    item = parse_record({"text": "The picture"}, "x")
    t, s = (encode(m, [item, record("talk")], "left").rows[0] for m in (teacher, student))
    assert s.answers[0].tokens[0].position == s.offset
    found = pairing.align(t, s)
    assert len(found) == len(s.ids) - 1 == len(supervised_positions(s))
    assert min(a.student for a in found) == s.offset + 1
    assert align_alone(s) == [AlignedToken(a.student, a.student, 0, 0) for a in found]


# ----- every text, not only the answers ---------------------------------------------------------


@pytest.mark.parametrize(("teacher", "student"), [p for p in VLM_PAIRS if not glued(*p)])
def test_questions_align_too(teacher: str, student: str) -> None:
    t_model, s_model, pairing = paired(teacher, student)
    items = [record(kind) for kind in ("image", "two images", "talk")]
    t_rows, s_rows = (encode(m, items, "right", "all").rows for m in (t_model, s_model))
    for t, s in zip(t_rows, s_rows, strict=True):
        answers_only = {p.position for a in s.answers if a.is_answer for p in a.tokens}
        positions = set(student_tokens(pairing.align(t, s)))
        assert answers_only < positions


def over_two_parts() -> tuple[Pairing, EncodedRow, EncodedRow]:
    """One token ("ture") belongs to two supervised texts."""
    parts = [{"type": "text", "text": text} for text in ("What is in this pict", "ure?")]
    item = parse_record({"messages": [{"role": "user", "content": parts},
                                      {"role": "assistant", "content": "Yes"}]}, "x")
    teacher, student, pairing = paired("internvl", "qwen3_vl")
    t, s = (encode(m, [item], "right", "all").rows[0] for m in (teacher, student))
    first, second, _ = s.answers
    assert first.tokens[-1].position == second.tokens[0].position
    return pairing, t, s


def test_token_of_two_texts_is_aligned_once() -> None:
    pairing, t, s = over_two_parts()
    positions = [a.student for a in pairing.align(t, s)]
    assert positions == sorted(set(positions))
    assert set(positions) == {a.student for a in align_alone(s)}


def test_token_of_two_texts_counts_once_alone() -> None:
    pairing, t, s = over_two_parts()
    positions = [a.student for a in align_alone(s)]
    assert len(supervised_positions(s)) == len(set(positions)) == len(pairing.align(t, s))
    assert len(positions) == len(set(positions))


# ----- what cannot be compared ------------------------------------------------------------------


@pytest.mark.parametrize(("teacher", "student"), [
    ("llava", "smolvlm"), ("smolvlm", "idefics3"), ("gemma3", "internvl"), ("llama", "gemma2"),
    ("gpt2", "gpt2"), ("qwen2", "qwen2")])
def test_other_tokenizers_are_refused_where_tokens_must_be_shared(
    teacher: str, student: str
) -> None:
    models = adapter(teacher, "teacher"), adapter(student, "student", "other")
    with pytest.raises(AlignmentError, match=r"Teacher: '.*'; student: '.*'") as caught:
        pair_models(*models, head_rows(teacher), head_rows(student, "other"), alignment="shared")
    shown = str(caught.value).split("Teacher: '")[1]
    ours, theirs = shown.split("'; student: '")
    assert ours.replace("|", "") != ""
    assert ours != theirs
    assert ours.split("|")[0] in "The quick brown fox"


def test_exact_alignment_wants_the_same_rows() -> None:
    teacher, student = adapter("qwen2", "teacher"), adapter("qwen2")
    rows = head_rows("qwen2")
    assert pair_models(teacher, student, rows, rows, alignment="exact").case == "a"
    with pytest.raises(AlignmentError, match=r"alignment: exact.*padding rows"):
        pair_models(teacher, student, rows, rows + 64, alignment="exact")


def test_texts_that_one_side_cannot_spell_do_not_change_the_case() -> None:
    """Another normal form of one text: its record is left out, the pair stays what it is."""
    teacher, student = adapter("qwen2", "teacher"), unnormalised("qwen2")
    rows = head_rows("qwen2")
    plain = pair_models(teacher, student, rows, rows)
    pairing = pair_models(teacher, student, rows, rows, samples=["fine", "un cafe\u0301"])
    assert pairing.case == plain.case == "a"
    assert plain.warnings == ()
    (warning,) = pairing.warnings
    assert "1 of 2 probed answers cannot be spelled by both" in warning


def test_two_tokenizers_without_a_common_text_are_refused() -> None:
    student = make_tokenizer("qwen2")
    student.backend_tokenizer.normalizer = normalizers.Replace("e", "E")
    models = adapter("qwen2", "teacher"), make_adapter(student, "student")
    with pytest.raises(AlignmentError, match="2 of 2 probed answers cannot be spelled by both"):
        pair_models(*models, 576, 576, samples=["The red one.", "Yes"])


def unnormalised(family: str) -> ModelAdapter:
    tokenizer = make_tokenizer(family)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
    return make_adapter(tokenizer, "student")


def test_same_models_are_case_a() -> None:
    pairing = pair_models(adapter("internvl", "teacher"), adapter("internvl"), 576, 576)
    assert pairing.case == "a"
    assert pairing.maps[0].identity
    assert pairing.glue is None


def test_same_tokenizer_with_more_rows_is_case_b() -> None:
    pairing = pair_models(adapter("internvl", "teacher"), adapter("internvl"), 576, 640)
    assert pairing.case == "b"
    assert len(pairing.maps[0].student.padding) == len(pairing.maps[0].teacher.padding) + 64


def test_rows_of_different_records_are_an_error() -> None:
    teacher, student, pairing = paired("llava", "qwen3_vl")
    t, s = encode(teacher, [record("turns")]).rows[0], encode(student, [record("text")]).rows[0]
    with pytest.raises(AlignmentError, match="different numbers of texts"):
        pairing.align(t, s)


def test_model_without_end_of_turn_is_told() -> None:
    tokenizer = make_tokenizer("llama")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n" \
        "{% endfor %}"
    model = make_adapter(tokenizer, "student")
    assert model.end_of_turn_id == tokenizer.eos_token_id
    pairing = pair_models(adapter("llama", "teacher"), model, 576, 576)
    assert pairing.warnings == (
        "student: the chat template leaves the last answer open; <|eot_id|> is put behind it, so "
        "that where to stop is learned",)
    tokenizer.chat_template = tokenizer.chat_template.replace("{% endfor %}", "{% endfor %}end")
    model = make_adapter(tokenizer, "student")
    assert model.end_of_turn_id is None
    assert pair_models(adapter("llama", "teacher"), model, 576, 576).warnings == (
        "student: no special token ends an answer, so where to stop is not distilled",)


def test_last_token_that_holds_template_text_is_left_out() -> None:
    """ ".\n" on one side is not "." on the other, though both cover the answer's last byte."""
    tokenizer = make_tokenizer("llama")
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|eot_id|>'", "'\n<|eot_id|>'")
    model, teacher = make_adapter(tokenizer, "student"), adapter("llama", "teacher")
    pairing = pair_models(teacher, model, 576, 576)
    t, s = (encode(m, [talk("Is it?", "It is blue.")]).rows[0] for m in (teacher, model))
    last = s.answers[0].tokens[-1]
    assert (last.suffix, covered(s, last.position)) == (b"\n", b".\n")
    found = pairing.align(t, s)
    assert s.answers[0].tail == b"\n" != t.answers[0].tail
    # nor is the end of the turn: it follows ".\n" here and "." there
    assert {a.student for a in found} == {p.position for p in s.answers[0].tokens[:-1]}


def test_end_of_turn_is_aligned_after_the_same_bytes_only() -> None:
    def model(tail: str, role: str) -> ModelAdapter:
        tokenizer = make_tokenizer("llama")
        end = "{{ '" + tail + "<|eot_id|>' }}"
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}" + end + "{% endfor %}")
        return make_adapter(tokenizer, role)

    for tails in itertools.product(("", " ", "  "), repeat=2):
        teacher, student = (model(*pair) for pair in zip(tails, ("teacher", "student"),
                                                         strict=True))
        pairing = pair_models(teacher, student, 576, 576)
        t, s = (encode(m, [talk("Is it?", "Yes it is")]).rows[0] for m in (teacher, student))
        assert (t.answers[0].tail, s.answers[0].tail) == tuple(x.encode() for x in tails)
        both_end = s.answers[0].end_of_turn in {a.student for a in pairing.align(t, s)}
        assert both_end == (tails[0] == tails[1])


def test_base_model_and_chat_model() -> None:
    teacher, student, pairing = paired("llama", "gpt2")
    t, s = (encode(m, [talk("Is it?\n", "The red square")]).rows[0] for m in (teacher, student))
    found = pairing.align(t, s)
    assert len(found) == len(supervised_positions(s))
    assert [covered(s, a.student) for a in found[:-1]] == [
        covered(t, a.teacher) for a in found[:-1]]


@pytest.mark.parametrize(("blind", "images"), [([], True), (["student"], False), ([], False)])
def test_sighted_or_no_images(blind: list[str], images: bool) -> None:
    check_modalities(blind, images)


def test_blind_models_and_images() -> None:
    with pytest.raises(TaidError, match="teacher and the student cannot see"):
        check_modalities(["teacher", "student"], True)


def test_pairing_moves_to_a_device() -> None:
    _, _, pairing = paired("llava", "smolvlm")
    moved = pairing.to("meta")
    assert isinstance(moved, Pairing)
    assert {m.student.shared.device.type for m in moved.maps} == {"meta"}
    assert pairing.maps[0].student.shared.device.type == "cpu"




# ----- models without a template ----------------------------------------------------------------


def base(*merges: tuple[str, str]) -> ModelAdapter:
    """A byte-level base model's adapter whose tokenizer has a few merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["</s>", *letters, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return make_adapter(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), "x")


def test_base_models_glue_nothing_to_an_answer() -> None:
    """Not even where a token joins a probed word to itself ("a" and "a")."""
    merges = (("a", "a"), ("i", "s"), ("is", "is"), ("a", "is"))
    teacher, student = base(*merges), base(("i", "s"))
    found = pair_models(teacher, student, len(teacher.table), len(student.table), ["yes is it"])
    assert found.glue is None
    same = pair_models(base(*merges), base(*reversed(merges)), 261, 261)
    assert same.glue is None and not same.has_chunks and len(same.maps) == 1


@pytest.mark.parametrize(("prompt", "completion", "place"), [
    ("Speak as POLIXENES.", "Sir, that's", "POLIXENES.Sir,"),
    ("Speak as POLIXENES.", " Sir, that's", ""),
    ("Speak as POLIXENES.\n", "Sir, that's", ""),
])
def test_where_question_and_answer_are_one_word(prompt: str, completion: str, place: str) -> None:
    item = parse_record({"prompt": prompt, "completion": completion}, "x")
    found = base().seam(item)
    assert place in found and bool(place) == bool(found)
    assert adapter("llama").seam(item) == ""  # its template stands between
    assert base().seam(parse_record({"text": "plain"}, "x")) == ""
