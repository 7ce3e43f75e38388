"""Which predictions of two models may be compared: the same next token after the same text.

Cases: (a) same tokenizer, compared as it is; (b) same way of splitting text but other rows, ids
or added tokens, compared through the vocabulary map, exactly; (c) different tokenizers, refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from taid_vlm.adapters import (
    PROBE_WORDS,
    AnswerSpan,
    EncodedRow,
    ModelAdapter,
    check_spelled,
)
from taid_vlm.alignment.vocabulary import VocabularyMap, build_vocabulary_map
from taid_vlm.errors import AlignmentError, TaidError

PROBES = (
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "In 2025 they paid $1,234.50 (about 3.14 times more).\nYes: no; a_b c-d.",
    "naïve café — 数量 图片 Привет",
)


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
    """

    case: Literal["a", "b"]
    reason: str
    maps: tuple[VocabularyMap, ...]
    glue: tuple[bytes, bytes] | None = None
    warnings: tuple[str, ...] = ()

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
            for token in self._align_answer(t, s):
                if self._comparable(token, teacher, student):
                    aligned.setdefault(token.student, token)
        return list(aligned.values())

    def _comparable(self, token: AlignedToken, teacher: EncodedRow, student: EncodedRow) -> bool:
        """Both positions have a prediction before them, of one and the same outcome."""
        t, s = token.teacher - teacher.offset, token.student - student.offset
        return t > 0 and s > 0 and self.maps[token.map_index].same_entry(
            teacher.ids[t], student.ids[s])

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
        ends = (teacher.end_of_turn, student.end_of_turn)
        if None not in ends and teacher.tail == student.tail:  # both end it after the same bytes
            yield AlignedToken(*ends, student.turn, 0)  # type: ignore[arg-type]


def supervised_positions(row: EncodedRow) -> list[tuple[int, int]]:
    """(position, turn) of every token of a row that can be learned, ends of turns included."""
    found: dict[int, int] = {}
    for answer in row.answers:
        end = [] if answer.end_of_turn is None else [answer.end_of_turn]
        for position in (*(token.position for token in answer.tokens), *end):
            found.setdefault(position, answer.turn)
    return [(position, turn) for position, turn in found.items() if position > row.offset]


def align_alone(student: EncodedRow) -> list[AlignedToken]:
    """The supervised tokens of a student without a teacher."""
    return [AlignedToken(position, position, turn, 0)
            for position, turn in supervised_positions(student)]


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
    return Pairing(case, _reason(maps[0], glue), tuple(maps), glue, _warnings(teacher, student))


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
    for word in PROBE_WORDS:
        rows = [model.probe(word) for model in (teacher, student)]
        firsts = [row.answers[0].tokens[0].prefix for row in rows if row and row.answers[0].tokens]
        if len(firsts) == 2 and firsts[0] != firsts[1]:
            return firsts[0], firsts[1]
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
