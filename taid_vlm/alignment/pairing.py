"""Which predictions of two models may be compared: the same next token after the same text.

Cases: (a) same tokenizer, compared as it is; (b) same way of splitting text but other rows, ids
or added tokens, compared through the vocabulary map, exactly; (c) different tokenizers, refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from taid_vlm.adapters import AnswerSpan, EncodedRow, ModelAdapter, check_spelled
from taid_vlm.alignment.vocabulary import VocabularyMap, build_vocabulary_map
from taid_vlm.errors import AlignmentError, TaidError

PROBES = (
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "In 2025 they paid $1,234.50 (about 3.14 times more).\nYes: no; a_b c-d.",
    "naïve café — 数量 图片 Привет",
)
PROBE_WORDS = ("The", "the", "a", "yes", "is", "in", "It", "A")


@dataclass(frozen=True)
class AlignedToken:
    """One comparable prediction.

    teacher, student: positions of the predicted token in the padded rows.
    turn: which answer of the record. map_index: 0, or 1 for a first token whose template glues
    other bytes to it on the two sides.
    """

    teacher: int
    student: int
    turn: int
    map_index: int


@dataclass(frozen=True)
class Pairing:
    """How one teacher and one student are compared; made once per run by `pair_models`.

    maps: the vocabulary map, and where templates glue different bytes to an answer's first token
        a second map for that position.
    glue: (teacher's, student's) glued bytes that the second map stands for.
    ends: (teacher's, student's) ids that end a turn or a document and share an entry.
    """

    case: Literal["a", "b"]
    reason: str
    maps: tuple[VocabularyMap, ...]
    glue: tuple[bytes, bytes] | None = None
    warnings: tuple[str, ...] = ()
    ends: frozenset[tuple[int, int]] = frozenset()

    def to(self, device: torch.device | str) -> Pairing:
        """The same pairing with its maps on a device."""
        return replace(self, maps=tuple(vocabulary.to(device) for vocabulary in self.maps))

    def align(self, teacher: EncodedRow, student: EncodedRow) -> list[AlignedToken]:
        """All comparable tokens of one record, in order of position.

        Raises:
            AlignmentError: the two models were shown different answers.
        """
        if len(teacher.answers) != len(student.answers):
            raise AlignmentError("the two templates print different numbers of texts")
        aligned: dict[int, AlignedToken] = {}  # a token across two texts counts once
        for t, s in zip(teacher.answers, student.answers, strict=True):
            found = [*self._align_answer(t, s), *self._align_end(t, s, teacher, student)]
            aligned |= {token.student: token for token in found if token.student not in aligned}
        # position 0 has no prediction before it
        return [a for a in aligned.values()
                if a.teacher > teacher.offset and a.student > student.offset]

    def _align_end(
        self, t: AnswerSpan, s: AnswerSpan, teacher: EncodedRow, student: EncodedRow
    ) -> Iterable[AlignedToken]:
        """The token that ends the answer, where both predict it after the same bytes."""
        if t.end_of_turn is None or s.end_of_turn is None or t.tail != s.tail:
            return
        ids = (teacher.ids[t.end_of_turn - teacher.offset],
               student.ids[s.end_of_turn - student.offset])
        if ids in self.ends:
            yield AlignedToken(t.end_of_turn, s.end_of_turn, s.turn, 0)

    def _align_answer(self, teacher: AnswerSpan, student: AnswerSpan) -> Iterable[AlignedToken]:
        ours = {(token.start, token.end): token for token in teacher.tokens}
        for token in student.tokens:
            other = ours.get((token.start, token.end))
            if other is None or other.suffix != token.suffix:
                continue
            if other.prefix == token.prefix:
                yield AlignedToken(other.position, token.position, student.turn, 0)
            elif (other.prefix, token.prefix) == self.glue:
                yield AlignedToken(other.position, token.position, student.turn, 1)


def supervised_tokens(row: EncodedRow) -> int:
    """Tokens of a row that could be learned from, ends of turns included."""
    found = sum(len(a.tokens) + (a.end_of_turn is not None) for a in row.answers)
    starts_row = any(token.position == row.offset for a in row.answers for token in a.tokens)
    return found - starts_row


def align_alone(student: EncodedRow) -> list[AlignedToken]:
    """The supervised tokens of a student without a teacher."""
    tokens = [
        AlignedToken(position, position, answer.turn, 0)
        for answer in student.answers
        for position in (*(token.position for token in answer.tokens),
                         *([] if answer.end_of_turn is None else [answer.end_of_turn]))
    ]
    return [token for token in tokens if token.student > student.offset]


def pair_models(
    teacher: ModelAdapter,
    student: ModelAdapter,
    teacher_rows: int,
    student_rows: int,
    samples: Sequence[str] = (),
) -> Pairing:
    """Decide how two models can be compared.

    Args:
        teacher, student: the adapters.
        teacher_rows, student_rows: rows of the two heads.
        samples: answers from the data; the tokenizers must split them in the same places.

    Raises:
        AlignmentError: different tokenizers (case c), with the first text split differently.
    """
    for text in (*PROBES, *samples):
        _same_split(teacher, student, text)
    roles = _roles(teacher, student)
    glue = _first_token_glue(teacher, student)
    tables = (teacher.table, student.table, teacher_rows, student_rows, roles)
    maps = [build_vocabulary_map(*tables)]
    if glue is not None:
        maps.append(build_vocabulary_map(*tables, *glue))
    case: Literal["a", "b"] = "a" if maps[0].identity else "b"
    warnings = _warnings(teacher, student)
    return Pairing(case, _reason(maps[0], glue), tuple(maps), glue, warnings, frozenset(roles))


def _same_split(teacher: ModelAdapter, student: ModelAdapter, text: str) -> None:
    spans = {}
    for adapter in (teacher, student):
        try:
            spans[adapter.role] = check_spelled(adapter, text.strip())
        except AlignmentError:
            spans[adapter.role] = []  # unknown characters, or another normal form
    if spans["teacher"] == spans["student"]:
        return
    data = text.strip().encode()
    shown = {role: "|".join(data[a:b].decode(errors="replace") for a, b in found[:12])
             for role, found in spans.items()}
    raise AlignmentError(
        "teacher and student split text differently, so their next-token distributions are not "
        "over the same events. Different tokenizers are not supported yet; choose a student (or "
        f"teacher) of the same tokenizer family. Teacher: '{shown['teacher']}'; student: "
        f"'{shown['student']}'."
    )


def _roles(teacher: ModelAdapter, student: ModelAdapter) -> list[tuple[int, int]]:
    """Ids that end a turn, and ids that end a document, on the two sides.

    If one model ends both with one token and the other does not, only the turn is paired.
    """
    turn = (teacher.end_of_turn_id, student.end_of_turn_id)
    document = (teacher.tokenizer.eos_token_id, student.tokenizer.eos_token_id)
    roles: list[tuple[int, int]] = []
    for t, s in (turn, document):
        taken = any(t == a or s == b for a, b in roles)
        if t is not None and s is not None and not taken:
            roles.append((t, s))
    return roles


def _first_token_glue(
    teacher: ModelAdapter, student: ModelAdapter
) -> tuple[bytes, bytes] | None:
    """Bytes glued to an answer's first token on one side only, as in "Assistant: The"."""
    for word in PROBE_WORDS:  # whether a space is glued depends on the word having such a token
        glued = tuple(m.probe(word).answers[0].tokens[0].prefix for m in (teacher, student))
        if glued[0] != glued[1]:
            return glued  # type: ignore[return-value]
    return None


def _reason(vocabulary: VocabularyMap, glue: tuple[bytes, bytes] | None) -> str:
    if vocabulary.identity:
        text = "same tokenizer and same rows: logits are compared as they are"
    else:
        text = (
            f"same splits, other rows: {len(vocabulary.student.shared):,} shared tokens; rest "
            f"{len(vocabulary.teacher.rest):,} (teacher) and {len(vocabulary.student.rest):,} "
            f"(student); padding rows {len(vocabulary.teacher.padding):,} and "
            f"{len(vocabulary.student.padding):,}"
        )
    if glue is None:
        return text
    return (f"{text}. The templates glue {glue[0].decode()!r} (teacher) and {glue[1].decode()!r} "
            "(student) to an answer's first token; it is compared through a map of its own")


def _warnings(teacher: ModelAdapter, student: ModelAdapter) -> tuple[str, ...]:
    return tuple(
        f"{adapter.role}: no special token ends an answer, so where to stop is not distilled"
        for adapter in (teacher, student)
        if adapter.end_of_turn_id is None
    )


def check_modalities(blind: Sequence[str], has_images: bool) -> None:
    """Raise TaidError if records with images meet models (`blind`: their roles) that cannot see."""
    if has_images and blind:
        raise TaidError(
            f"the records hold images, but the {' and the '.join(blind)} cannot see: a text model "
            "was given. Choose a model with vision, or text records."
        )
