"""Common segments: the finest pieces of an answer that both tokenizers can end."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from adapters.samples import TEXT_KINDS, adapter, answers, encode, talk
from zoo.tokenizers import VARIANTS

from taid_vlm.adapters import AnswerSpan, AnswerToken
from taid_vlm.alignment.segments import Segment, common_segments, same_glue

Sides = tuple[AnswerSpan, AnswerSpan]
HEADS = ((), (b"",), (b" ",), (b"\n", b" "))
PAIRS = [(t, s) for t in VARIANTS for s in VARIANTS if t != s]


def answer(ends: list[int], first: int = 5, heads: Sequence[bytes] = ()) -> AnswerSpan:
    """Tokens that end at `ends`, after ones that cover nothing of the answer."""
    before = [AnswerToken(i, 0, 0, prefix) for i, prefix in enumerate(heads, first)]
    every = enumerate(itertools.pairwise([0, *ends]), first + len(before))
    return AnswerSpan(0, True, (*before, *(AnswerToken(i, a, b) for i, (a, b) in every)), None)


def drawn(seed: int) -> Sides:
    """Two random tokenizations of one text, some with empty tokens at its start."""
    rng = random.Random(seed)
    length = rng.randint(1, 12)

    def side() -> AnswerSpan:
        cuts = [byte for byte in range(1, length) if rng.random() < rng.choice((0.2, 0.8))]
        return answer([*cuts, length], rng.randint(1, 9), rng.choice(HEADS))

    return side(), side()


def boundaries(span: AnswerSpan) -> set[int]:
    return {token.end for token in span.tokens}


def head(span: AnswerSpan) -> bytes:
    return b"".join(token.prefix for token in span.tokens if not token.end)


def joined(segments: list[Segment], side: int) -> tuple[AnswerToken, ...]:
    return tuple(token for segment in segments for token in segment[side])


@pytest.mark.parametrize("seed", range(60))
def test_random_tokenizations(seed: int) -> None:
    teacher, student = drawn(seed)
    found = list(common_segments(teacher, student))
    assert joined(found, 0) == teacher.tokens
    assert joined(found, 1) == student.tokens
    for theirs, ours in found:
        assert theirs and ours
        assert (theirs[0].start, theirs[-1].end) == (ours[0].start, ours[-1].end)
        inner = {t.end for t in theirs[:-1]} & {t.end for t in ours[:-1]}
        assert inner <= {0}  # finest: no common boundary within, but for what stands in front
    common = boundaries(teacher) & boundaries(student)
    if head(teacher) != head(student):
        common -= {0}
    assert [segment[1][-1].end for segment in found] == sorted(common)


@pytest.mark.parametrize("seed", range(20))
def test_sides_can_be_exchanged(seed: int) -> None:
    teacher, student = drawn(seed)
    there = list(common_segments(teacher, student))
    back = list(common_segments(student, teacher))
    assert [(s, t) for t, s in there] == back


@pytest.mark.parametrize("seed", range(20))
def test_equal_tokenizations_are_cut_at_every_token(seed: int) -> None:
    _, student = drawn(seed)
    found = list(common_segments(student, student))
    heads = sum(token.end == 0 for token in student.tokens)
    assert [len(t) for t, _ in found] == [heads] * (heads > 0) + [1] * (
        len(student.tokens) - heads)


def test_bytes_that_one_side_lacks_at_the_end_make_no_piece() -> None:
    found = list(common_segments(answer([2, 4]), answer([1, 2, 3])))
    assert [(t[-1].end, s[-1].end) for t, s in found] == [(2, 2)]
    assert list(common_segments(answer([4]), answer([1, 2, 3]))) == []


def test_no_tokens() -> None:
    none = AnswerSpan(0, True, (), None)
    assert list(common_segments(none, answer([1]))) == []
    assert list(common_segments(none, none)) == []


def positions(segment: Segment) -> tuple[list[int], list[int]]:
    theirs, ours = ([token.position for token in side] for side in segment)
    return theirs, ours


def test_a_space_in_front_belongs_to_what_follows() -> None:
    for other in ((), (b"",), (b"\n",)):
        student = answer([1, 2, 3], 1, other)
        first, second = common_segments(answer([2, 3], 1, [b" "]), student)
        assert positions(first)[0] == [1, 2]
        assert positions(second)[0] == [3]


def test_the_same_space_in_front_is_a_piece() -> None:
    first, *others = common_segments(answer([2, 3], 1, [b" "]), answer([1, 2, 3], 1, [b" "]))
    assert positions(first) == ([1], [1])
    assert [positions(one) for one in others] == [([2], [2, 3]), ([3], [4])]


def test_tokens_without_bytes_elsewhere_belong_to_what_they_follow() -> None:
    tokens = tuple(AnswerToken(i, a, b) for i, (a, b) in enumerate([(0, 2), (2, 2), (2, 3)], 1))
    found = list(common_segments(AnswerSpan(0, True, tokens, None), answer([2, 3])))
    assert [[t.position for t in piece] for piece, _ in found] == [[1, 2], [3]]


# ----- glue ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("theirs", "ours", "same"), [
    ((b"", b""), (b"", b""), True),
    ((b" ", b""), (b"", b""), True),  # "Assistant: The" against a newline
    ((b"\n", b""), (b" ", b""), True),
    ((b"x", b""), (b"x", b""), True),
    ((b"x", b""), (b"", b""), False),
    ((b"", b""), (b" x", b""), False),
    ((b"", b"\n"), (b"", b"\n"), True),
    ((b"", b"\n"), (b"", b""), False),
    ((b"", b""), (b"", b" "), False),
    ((b" ", b"."), (b"", b"."), True),
    ((b" ", b"."), (b"", b"!"), False),
])
@pytest.mark.parametrize("tokens", [1, 2])
def test_same_glue(
    theirs: tuple[bytes, bytes], ours: tuple[bytes, bytes], same: bool, tokens: int
) -> None:
    def side(prefix: bytes, suffix: bytes) -> tuple[AnswerToken, ...]:
        if tokens == 1:
            return (AnswerToken(1, 0, 4, prefix, suffix),)
        return (AnswerToken(1, 0, 2, prefix), AnswerToken(2, 2, 4, suffix=suffix))

    assert same_glue((side(*theirs), side(*ours))) == same


# ----- real tokenizers ----------------------------------------------------------------------------


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_pieces_of_real_answers_are_the_same_bytes(teacher: str, student: str) -> None:
    texts = [text for kind in TEXT_KINDS for text in answers(kind)]
    items = [talk("Is it?", text) for text in texts]
    rows = [encode(adapter("llama", role, variant), items).rows
            for role, variant in (("teacher", teacher), ("student", student))]
    for text, t, s in zip(texts, *rows, strict=True):
        found = list(common_segments(t.answers[0], s.answers[0]))
        assert joined(found, 0) == t.answers[0].tokens
        assert joined(found, 1) == s.answers[0].tokens
        said = [[text.encode()[segment[side][0].start : segment[side][-1].end]
                 for segment in found] for side in (0, 1)]
        assert said[0] == said[1]
        assert b"".join(said[0]) == text.encode()
        assert len(found) > len(text.split()) / 3
