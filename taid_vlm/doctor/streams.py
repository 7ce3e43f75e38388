"""One record as pieces of both models' token streams, with what is compared linked by number."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from taid_vlm.adapters import EncodedRow, ModelAdapter
from taid_vlm.alignment import (
    Aligned,
    AlignedChunk,
    student_positions,
    supervised_positions,
    teacher_positions,
)
from taid_vlm.doctor.checkup import Checked
from taid_vlm.errors import SampleDropped
from taid_vlm.io.images import png
from taid_vlm.records import Record

THUMBNAIL = 240  # pixels of the longer side

Kind = Literal["text", "special", "image", "aligned", "chunk", "unaligned"]


@dataclass(frozen=True)
class StreamToken:
    """position: in the padded row; name: as the vocabulary spells it; text: what it covers."""

    position: int
    id: int
    name: str
    text: str


@dataclass(frozen=True)
class Piece:
    """A stretch of one stream.

    kind: "text" of the template and the question, a "special" token, a folded "image", a token
        that is "aligned" with one of the other model, a "chunk" of tokens that is, or a token of
        an answer that is "unaligned" and so not compared.
    group: of what is compared, the number that both sides share.
    tokens: of the answers, every token; of the rest only their `count`.
    """

    kind: Kind
    text: str
    count: int
    group: int | None = None
    tokens: tuple[StreamToken, ...] = ()


@dataclass(frozen=True)
class Stream:
    """One model's side of a record.

    learned: its supervised texts in order, each with the end of its turn.
    """

    length: int
    pieces: tuple[Piece, ...]
    learned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trace:
    """A record as both models see it.

    supervised, aligned, chunk: tokens of the student that can be learned, that are compared, and
        those among them that are compared in chunks.
    cut: whether a plain text was shortened to the maximum length.
    left_out: why the record is not trained on, "" if it is.
    images: small PNGs of its images, in order.
    teacher: which of several it is.
    """

    source: str
    sides: dict[str, Stream]
    supervised: int
    aligned: int
    chunk: int
    cut: bool
    left_out: str
    images: tuple[bytes, ...] = ()
    teacher: str = ""


def trace(record: Record, checked: Checked, adapters: Sequence[ModelAdapter]) -> Trace | None:
    """Lay out a record that was checked; None if it never came as far as tokens."""
    if any(adapter.role not in checked.rows for adapter in adapters):
        return None
    sides = {a.role: Stream(len(checked.rows[a.role].ids),
                            tuple(_pieces(a, checked.rows[a.role], checked.aligned)),
                            tuple(_learned(a, checked.rows[a.role])))
             for a in adapters}
    aligned = sum(len(student_positions(each)) for each in checked.aligned)
    chunk = sum(len(each.student) for each in checked.aligned if isinstance(each, AlignedChunk))
    return Trace(checked.source, sides, len(supervised_positions(checked.rows["student"])),
                 aligned, chunk, checked.cut, checked.reason, tuple(_thumbnails(record)))


def _thumbnails(record: Record) -> Iterator[bytes]:
    for image in record.images:
        with contextlib.suppress(SampleDropped):
            yield png(image.still(), THUMBNAIL)


# ----- one side -----------------------------------------------------------------------------


def _pieces(
    adapter: ModelAdapter, row: EncodedRow, aligned: Sequence[Aligned]
) -> Iterator[Piece]:
    """The row from its first token to its last."""
    kinds, data, cursor = _kinds(adapter, row, aligned), row.text.encode(), 0

    def stretch(index: int) -> Any:  # what is one piece with the token before has the same
        return kinds[index], index if kinds[index][0] in ("special", "unaligned") else None

    for ((kind, group), _), indices in groupby(range(len(row.ids)), key=stretch):
        index, *more = indices
        end = index + len(more) + 1
        first, last = row.byte_spans[index][0], row.byte_spans[end - 1][1]
        if first > cursor:  # whitespace that no token covers
            yield Piece("text", _shown(data[cursor:first]), 0)
        yield _piece(adapter, row, data, kind, None if kind == "image" else group, index, end)
        cursor = max(last, cursor)


def _learned(adapter: ModelAdapter, row: EncodedRow) -> Iterator[str]:
    data = row.text.encode()
    for answer in row.answers:
        spans = [(row.byte_spans[token.position - row.offset], token) for token in answer.tokens]
        text = b"".join(data[a + len(token.prefix) : b - len(token.suffix)]
                        for (a, b), token in spans)
        end = "" if answer.end_of_turn is None else adapter.table.strings[
            row.ids[answer.end_of_turn - row.offset]]
        yield (text + answer.tail).decode(errors="replace") + (end or "")


def _kinds(
    adapter: ModelAdapter, row: EncodedRow, aligned: Sequence[Aligned]
) -> list[tuple[Kind, int | None]]:
    """What every token is, and its group (of images: which one)."""
    positions = student_positions if adapter.role == "student" else teacher_positions
    groups: Mapping[int, tuple[Kind, int]] = {
        position: ("chunk" if isinstance(found, AlignedChunk) else "aligned", group)
        for group, found in enumerate(aligned) for position in positions(found)}
    supervised = {position for position, _ in supervised_positions(row)}

    def kind(index: int, start: int) -> tuple[Kind, int | None]:
        image = next((i for i, (a, b) in enumerate(row.images) if a <= start < b), None)
        if image is not None:
            return "image", image
        if index + row.offset in groups:
            return groups[index + row.offset]
        if index + row.offset in supervised:
            return "unaligned", None
        return "special" if adapter.table.text[row.ids[index]] is None else "text", None

    return [kind(index, start) for index, (start, _) in enumerate(row.byte_spans)]


def _piece(
    adapter: ModelAdapter, row: EncodedRow, data: bytes, kind: Kind, group: int | None,
    index: int, end: int,
) -> Piece:
    start, stop = row.byte_spans[index][0], row.byte_spans[end - 1][1]
    text = "" if kind == "image" else _shown(data[start:stop])
    if kind == "special" and not text:  # put there by the tokenizer, so not in the text
        text = adapter.table.strings[row.ids[index]] or ""
    tokens = () if kind in ("text", "image") else tuple(
        StreamToken(i + row.offset, row.ids[i], adapter.table.strings[row.ids[i]] or "",
                    _shown(data[slice(*row.byte_spans[i])])) for i in range(index, end))
    return Piece(kind, text, end - index, group, tokens)


def _shown(data: bytes) -> str:
    """Text; bytes of characters that are cut in two are spelled out (\\xe2)."""
    return data.decode(errors="backslashreplace")
