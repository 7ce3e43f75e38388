"""Which predictions of two models may be compared: the same next token after the same text.

Cases: (a) same tokenizer, compared as it is; (b) same way of splitting text but other rows, ids
or added tokens, compared through the vocabulary map, exactly; (c) different tokenizers, compared
through the map where both say the same token, and by likelihood where they cut the text
differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from taid_vlm.adapters import (
    PROBE_WORDS,
    AnswerSpan,
    AnswerToken,
    EncodedRow,
    ModelAdapter,
    check_spelled,
)
from taid_vlm.alignment.cell_store import CellStore
from taid_vlm.alignment.cells import build_cell_map
from taid_vlm.alignment.segments import common_segments, same_glue
from taid_vlm.alignment.vocabulary import VocabularyMap, build_vocabulary_map
from taid_vlm.errors import AlignmentError, SampleDropped, TaidError

ONE_SIDED = "special token that only one model has inside an answer"
PROBES = (
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "In 2025 they paid $1,234.50 (about 3.14 times more).\nYes: no; a_b c-d.",
    "naïve café — 数量 图片 Привет",
)


class AlignedToken(NamedTuple):
    """One comparable prediction.

    teacher, student: positions of the predicted token in the padded rows.
    turn: which answer of the record. map_index: 0, or 1 for a first token whose template glues
    other bytes to it on the two sides.
    """

    teacher: int
    student: int
    turn: int
    map_index: int


class AlignedChunk(NamedTuple):
    """The same bytes of an answer, in tokens that are not the same; compared by likelihood.

    teacher, student: positions of its tokens in the padded rows, in order.
    map_index: where the first tokens are in one cell, the map under which they are compared, too.
    """

    teacher: tuple[int, ...]
    student: tuple[int, ...]
    turn: int
    map_index: int | None = None


Aligned: TypeAlias = AlignedToken | AlignedChunk
Case = Literal["a", "b", "c"]


@dataclass(frozen=True)
class Pairing:
    """How one teacher and one student are compared; made once per run by `pair_models`.

    maps: the vocabulary map, and where templates glue different bytes to an answer's first token
        a second map for that position.
    glue: (teacher's, student's) glued bytes that the second map stands for.
    """

    case: Case
    reason: str
    maps: tuple[VocabularyMap, ...]
    glue: tuple[bytes, bytes] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def has_chunks(self) -> bool:
        """Whether texts can be split differently: by other tokenizers, or by a space that only one
        template puts before an answer and that cannot always be part of its first token."""
        return self.case == "c" or self.glue is not None

    def to(self, device: torch.device | str) -> Pairing:
        """The same pairing with its maps on a device."""
        return replace(self, maps=tuple(vocabulary.to(device) for vocabulary in self.maps))

    def align(self, teacher: EncodedRow, student: EncodedRow) -> list[Aligned]:
        """All that is comparable in one record, in order of position; chunks if `has_chunks`.

        Raises:
            AlignmentError: the two models were shown different answers.
            SampleDropped: an answer with a special token that only one model has.
        """
        if len(teacher.answers) != len(student.answers):
            raise AlignmentError("the two templates print different numbers of texts")
        compare = self._chunked if self.has_chunks else self._token_by_token
        aligned: list[Aligned] = []
        taken: set[int] = set()  # a token across two texts counts once
        for t, s in zip(teacher.answers, student.answers, strict=True):
            self._check_special(t, s, teacher, student)
            for pair in compare(t, s, teacher, student):
                positions = student_positions(pair)
                if taken.isdisjoint(positions):
                    taken.update(positions)
                    aligned.append(pair)
        return aligned

    def _check_special(
        self, t: AnswerSpan, s: AnswerSpan, teacher: EncodedRow, student: EncodedRow
    ) -> None:
        """A special token inside an answer must be one and the same token on both sides."""
        places = [{(token.start, token.end): token for token in own.tokens} for own in (t, s)]
        for place in dict.fromkeys(at for side in places for at, token in side.items()
                                   if token.special):
            t_token, s_token = (side.get(place) for side in places)
            if t_token is None or s_token is None or not self.maps[0].same_token(
                    teacher.ids[t_token.position - teacher.offset],
                    student.ids[s_token.position - student.offset]):
                role, row, token = ("teacher", teacher, t_token) if t_token and (
                    t_token.special) else ("student", student, s_token)
                assert token is not None
                a, b = row.byte_spans[token.position - row.offset]
                name = row.text.encode()[a:b].decode(errors="replace")
                raise SampleDropped(
                    ONE_SIDED, f"'{name}' of the {role} is not one token of the other model")

    def _token_by_token(
        self, t: AnswerSpan, s: AnswerSpan, teacher: EncodedRow, student: EncodedRow
    ) -> Iterator[Aligned]:
        by_span = {(token.start, token.end): token for token in t.tokens}
        for s_token in s.tokens:
            t_token = by_span.get((s_token.start, s_token.end))
            if t_token is not None and (pair := self._token(t_token, s_token, s.turn)) is not None \
                    and self._comparable(pair, teacher, student):
                yield pair
        yield from self._ends(t, s, teacher, student)

    def _chunked(
        self, t: AnswerSpan, s: AnswerSpan, teacher: EncodedRow, student: EncodedRow
    ) -> Iterator[Aligned]:
        for t_tokens, s_tokens in common_segments(t, s):
            # nothing stands before the first token of a row, so nothing predicts it
            t_first, s_first = t_tokens[0], s_tokens[0]
            predicted = t_first.position > teacher.offset and s_first.position > student.offset
            if not predicted or not same_glue((t_tokens, s_tokens)):
                continue
            first = self._token(t_first, s_first, s.turn, t_first.suffix)
            if first is not None and not self._comparable(first, teacher, student):
                first = None
            one_each = len(t_tokens) == len(s_tokens) == 1
            if first is not None and one_each and self._alone(first, teacher, student):
                yield first
            else:
                yield AlignedChunk(tuple(token.position for token in t_tokens),
                                   tuple(token.position for token in s_tokens), s.turn,
                                   None if first is None else first.map_index)
        yield from self._ends(t, s, teacher, student)

    def _alone(self, token: AlignedToken, teacher: EncodedRow, student: EncodedRow) -> bool:
        """Whether the entry of two tokens holds nothing but these two."""
        teacher_id = teacher.ids[token.teacher - teacher.offset]
        student_id = student.ids[token.student - student.offset]
        return self.maps[token.map_index].same_token(teacher_id, student_id)

    def _token(
        self, teacher: AnswerToken, student: AnswerToken, turn: int, suffix: bytes | None = None
    ) -> AlignedToken | None:
        """The map under which two tokens of the same bytes may be compared.

        Args:
            suffix: of the student's token, where it is to count as another than its own.
        """
        if teacher.suffix != (student.suffix if suffix is None else suffix):
            return None
        if teacher.prefix == student.prefix:
            return AlignedToken(teacher.position, student.position, turn, 0)
        if (teacher.prefix, student.prefix) == self.glue:
            return AlignedToken(teacher.position, student.position, turn, 1)
        return None

    def _ends(
        self, t: AnswerSpan, s: AnswerSpan, teacher: EncodedRow, student: EncodedRow
    ) -> Iterator[AlignedToken]:
        """Both models end the turn after the same bytes."""
        if t.end_of_turn is None or s.end_of_turn is None or t.tail != s.tail:
            return
        pair = AlignedToken(t.end_of_turn, s.end_of_turn, s.turn, 0)
        if self._comparable(pair, teacher, student):
            yield pair

    def _comparable(self, token: AlignedToken, teacher: EncodedRow, student: EncodedRow) -> bool:
        """Both positions have a prediction before them, of one and the same outcome."""
        t, s = token.teacher - teacher.offset, token.student - student.offset
        return t > 0 and s > 0 and self.maps[token.map_index].same_entry(
            teacher.ids[t], student.ids[s])


def student_positions(aligned: Aligned) -> tuple[int, ...]:
    """Positions of the student's tokens in one comparison."""
    return aligned.student if isinstance(aligned, AlignedChunk) else (aligned.student,)


def teacher_positions(aligned: Aligned) -> tuple[int, ...]:
    """Positions of the teacher's tokens in one comparison."""
    return aligned.teacher if isinstance(aligned, AlignedChunk) else (aligned.teacher,)


def supervised_positions(row: EncodedRow) -> list[tuple[int, int]]:
    """(position, turn) of every token of a row that can be learned, ends of turns included."""
    turns: dict[int, int] = {}
    for answer in row.answers:
        end = [] if answer.end_of_turn is None else [answer.end_of_turn]
        for position in (*(token.position for token in answer.tokens), *end):
            turns.setdefault(position, answer.turn)
    return [(position, turn) for position, turn in turns.items() if position > row.offset]


def align_alone(student: EncodedRow) -> list[Aligned]:
    """The supervised tokens of a student without a teacher."""
    return [AlignedToken(position, position, turn, 0)
            for position, turn in supervised_positions(student)]


def pair_models(
    teacher: ModelAdapter,
    student: ModelAdapter,
    teacher_rows: int,
    student_rows: int,
    samples: Sequence[str] = (),
    alignment: str = "auto",
) -> Pairing:
    """Decide how two models can be compared.

    Args:
        teacher, student: the adapters.
        teacher_rows, student_rows: rows of the two heads.
        samples: answers from the data; whether the tokenizers split them in the same places
            decides between cases b and c.
        alignment: "exact" (case a or refuse), "shared" (a or b), "chunks" (c, also where the
            tokenizers agree), or "auto" (the first of a, b, c that holds).

    Raises:
        AlignmentError: the pair does not allow the alignment asked for, with the reason.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from taid_vlm.adapters import make_adapter
        >>> from taid_vlm.alignment import pair_models
        >>> from taid_vlm.demo.demo import data_folder
        >>> models = data_folder() / "models"
        >>> teacher, student = (
        ...     make_adapter(AutoTokenizer.from_pretrained(models / f"words-{role}"), role)
        ...     for role in ("teacher", "student"))
        >>> pairing = pair_models(teacher, student, teacher_rows=512, student_rows=503)
        >>> pairing.case, pairing.reason
        ('b', 'same splits, other rows: 500 shared tokens; rest 3 (teacher) and 3 (student); ...')
    """
    difference, warnings = _compare_splits(teacher, student, samples)
    if difference is not None and alignment in ("exact", "shared"):
        raise AlignmentError(
            f"alignment: {alignment}, but teacher and student split text differently, so their "
            "next-token distributions are not over the same events. Use alignment: chunks (or "
            f"auto), or a student of the teacher's tokenizer family. {difference}.",
            code=f"alignment_{alignment}"
        )
    roles = _roles(teacher, student)
    glue = _first_token_glue(teacher, student)
    chunks = difference is not None or alignment == "chunks"
    build: Any = partial(
        build_cell_map, teacher, student, find=CellStore(teacher, student).find
    ) if chunks else partial(build_vocabulary_map, teacher.table, student.table)
    maps = [build(teacher_rows, student_rows, roles, around)
            for around in ((b"", b""), glue) if around is not None]
    case: Case = "c" if chunks else "a" if maps[0].identity else "b"
    if alignment == "exact" and case != "a":
        raise AlignmentError(
            f"alignment: exact, but the two vocabularies are not the same ({_counts(maps[0])}).",
            mend="Use alignment: shared (or auto).", code="alignment_exact")
    reason = _reason(case, maps[0], glue, difference)
    return Pairing(case, reason, tuple(maps), glue, (*_warnings(teacher, student), *warnings))


def _compare_splits(
    teacher: ModelAdapter, student: ModelAdapter, samples: Sequence[str]
) -> tuple[str | None, list[str]]:
    """The first text that is split differently, shown; and a warning about unspellable samples."""
    difference, problems = None, []
    for index, text in enumerate((*samples, *PROBES)):
        try:
            spans = [check_spelled(adapter, text.strip()) for adapter in (teacher, student)]
        except AlignmentError as error:  # unknown characters, or another normal form
            problems += [str(error)] if index < len(samples) else []
            continue
        if spans[0] != spans[1] and difference is None:
            same = next(i for i, pair in enumerate(zip_longest(*spans)) if pair[0] != pair[1])
            shown = [_cut_at(text.strip().encode(), cuts, same) for cuts in spans]
            difference = f"Teacher: '{shown[0]}'; student: '{shown[1]}'"
    if not problems:
        return difference, []
    message = (f"{len(problems)} of {len(samples)} probed answers cannot be spelled by both "
               "tokenizers")
    if len(problems) == len(samples):
        raise AlignmentError(f"{message}, so nothing can be aligned: {problems[0]}",
                             code="unspellable")
    return difference, [f"{message}; such records are left out: {problems[0]}"]


def _cut_at(data: bytes, spans: list[tuple[int, int]], same: int) -> str:
    """A text as a tokenizer cuts it, from shortly before the place where two of them differ."""
    start = max(0, same - 4)
    pieces = (data[a:b].decode(errors="replace") for a, b in spans[start : start + 12])
    return ("…" if start else "") + "|".join(pieces)


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


def _reason(
    case: Case, vocabulary: VocabularyMap, glue: tuple[bytes, bytes] | None,
    difference: str | None,
) -> str:
    if case == "c":
        why = f"different splits ({difference})" if difference else "asked for"
        text = (f"{why}: compared where both models begin the same bytes, over "
                f"{_counts(vocabulary)}; where the text is cut differently, also by the "
                "likelihood of the same bytes")
    elif case == "a":
        text = "same tokenizer and same rows: logits are compared as they are"
    else:
        text = f"same splits, other rows: {_counts(vocabulary)}"
    if glue is None:
        return text
    return (f"{text}. The templates glue {glue[0].decode()!r} (teacher) and {glue[1].decode()!r} "
            "(student) to an answer's first token; it is compared through a map of its own, or by "
            "likelihood")


def _counts(vocabulary: VocabularyMap) -> str:
    teacher, student = vocabulary.teacher, vocabulary.student
    cells = f" and {vocabulary.cells:,} groups of tokens" if vocabulary.cells else ""
    return (f"{len(student.shared):,} shared tokens{cells}; rest {len(teacher.rest):,} (teacher) "
            f"and {len(student.rest):,} (student); padding rows {len(teacher.padding):,} and "
            f"{len(student.padding):,}")


def _warnings(teacher: ModelAdapter, student: ModelAdapter) -> tuple[str, ...]:
    adapters = (teacher, student)
    return (
        *(f"{adapter.role}: no special token ends an answer, so where to stop is not distilled"
          for adapter in adapters if adapter.end_of_turn_id is None),
        *(f"{adapter.role}: the chat template leaves the last answer open; {adapter.added_end} is "
          "put behind it, so that where to stop is learned"
          for adapter in adapters if adapter.added_end))


def check_modalities(blind: Sequence[str], has_images: bool) -> None:
    """Raise TaidError if records with images meet models (`blind`: their roles) that cannot see."""
    if has_images and blind:
        raise TaidError(
            f"the records hold images, but the {' and the '.join(blind)} cannot see: a text model "
            "was given.", mend="Choose a model with vision, or text records.", code="blind"
        )
