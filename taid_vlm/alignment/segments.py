"""Two tokenizations of one text, cut where both have a boundary.

Between two common boundaries both models say the same bytes, in one token or in several, so the
likelihoods of such a piece are comparable whatever the tokenizers are; and by the chain rule the
pieces' log-likelihoods add up to the whole answer's.
"""

from __future__ import annotations

from collections.abc import Iterator

from taid_vlm.adapters import AnswerSpan, AnswerToken

Segment = tuple[tuple[AnswerToken, ...], tuple[AnswerToken, ...]]


def common_segments(teacher: AnswerSpan, student: AnswerSpan) -> Iterator[Segment]:
    """The finest pieces of an answer that end with a token on both sides.

    A piece holds at least one token of each side. Tokens in front of the answer's bytes (a space
    that stands alone) are a piece where both sides have the same ones, and else belong to the
    piece that follows them. Bytes that only one side covers at the end make no piece.
    """
    s_ends, t_ends = _ends(student), _ends(teacher)
    common = s_ends.keys() & t_ends.keys()
    if _head(teacher) != _head(student):
        common -= {0}
    start_t = start_s = 0
    for end in sorted(common):
        yield (teacher.tokens[start_t : t_ends[end]], student.tokens[start_s : s_ends[end]])
        start_t, start_s = t_ends[end], s_ends[end]


def _ends(answer: AnswerSpan) -> dict[int, int]:
    """Byte -> how many tokens have ended there; the last of those that end at one byte counts."""
    return {token.end: index for index, token in enumerate(answer.tokens, 1)}


def _head(answer: AnswerSpan) -> bytes:
    """What the tokens in front of the answer's bytes spell."""
    return b"".join(token.prefix for token in answer.tokens if token.end == 0)


def same_glue(segment: Segment) -> bool:
    """Whether both sides speak of the same bytes: nothing but spaces glued in front, and the same
    template text behind."""
    teacher, student = segment
    fronts = (teacher[0].prefix, student[0].prefix)
    return (teacher[-1].suffix == student[-1].suffix
            and (fronts[0] == fronts[1] or not (fronts[0] + fronts[1]).strip()))
