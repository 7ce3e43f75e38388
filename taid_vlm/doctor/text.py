"""The inspection as text for a terminal, the verdict first."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from itertools import groupby, zip_longest

from taid_vlm.doctor.doctor import Inspection
from taid_vlm.doctor.facts import Facts
from taid_vlm.doctor.preflight import Preflight, Spread
from taid_vlm.doctor.rounding import Rounding, rounding_rows
from taid_vlm.doctor.streams import Piece, StreamToken, Trace
from taid_vlm.doctor.table import fact_rows
from taid_vlm.io.terminal import Cell, printable, table

SHOWN_ROWS = 24  # of the table of what is compared
_PLAIN, _RED, _GREEN, _BLUE, _GREY = (f"\033[{code}m" for code in (0, 31, 32, 34, 90))
_OUTCOMES = {"exact": "green", "shared": "green", "chunks": "yellow", "alone": "green",
             "refused": "red"}
_LEGEND = {"aligned": "⟦compared token by token⟧", "chunk": "⟪compared|as one piece of text⟫",
           "unaligned": "⟨of an answer, not compared⟩"}
_MARKS = {"aligned": ("⟦", "⟧", _GREEN), "chunk": ("⟪", "⟫", _BLUE), "unaligned": ("⟨", "⟩", _RED)}


class Paint:
    """Printable text in colours of a terminal, or without."""

    def __init__(self, colour: bool) -> None:
        self.colour = colour

    def __call__(self, text: str, code: str) -> str:
        text = printable(text)
        return f"{code}{text}{_PLAIN}" if self.colour and text else text


def as_text(inspection: Inspection, colour: bool = False, width: int | None = None) -> str:
    """The whole inspection.

    Answer tokens that are compared stand in ⟦ ⟧, chunks of several in ⟪ | ⟫, and those that are
    not compared in ⟨ ⟩; the tokens of an image are folded into one mark.

    Args:
        colour: with the escape codes of a terminal.
        width: columns; the terminal's by default.
    """
    paint = Paint(colour)
    width = max(width or shutil.get_terminal_size((110, 24)).columns, 60)
    blocks = [[table(_head(inspection), width=width, colour=colour)],
              [table(_facts(inspection.facts), width=width, colour=colour)]]
    blocks += [[*map(printable, _preflight(check))] for check in inspection.preflight
               if check.whole or check.dropped or check.sources]
    if inspection.quantization is not None:
        blocks.append(_rounding(inspection.quantization, width))
    if inspection.record is not None:
        blocks.append(_trace(inspection.record, paint))
    return "\n\n".join("\n".join(block) for block in blocks)


def _head(inspection: Inspection) -> list[Sequence[Cell]]:
    verdict, record = inspection.verdict, inspection.record
    name = verdict.outcome.upper()
    rows: list[Sequence[Cell]] = [
        ("verdict ", (f"{name}: {verdict.headline}", _OUTCOMES[verdict.outcome])),
        ("case", f"{verdict.case}: {verdict.reason}") if verdict.case else ("why", verdict.reason),
        *(("change", change) for change in verdict.changes),
        *(("warning", warning) for warning in verdict.warnings)]
    if record is not None:
        chunks = f", {record.chunk} of them in chunks" if record.chunk else ""
        word = "aligned" if len(record.sides) > 1 else "learned"
        rows.append((word, f"{record.aligned} of {record.supervised} answer tokens of the "
                           f"student{chunks}"))
        rows.append(("record", f"{record.source}{', cut' if record.cut else ''}"
                     f"{', of the teacher ' + record.teacher if record.teacher else ''}"))
    return rows


# ----- facts --------------------------------------------------------------------------------


def _facts(facts: Mapping[str, Facts]) -> list[Sequence[Cell]]:
    """Both sides beside each other; ≠ where they differ in what matters."""
    lines: list[Sequence[Cell]] = [("", "", *((role, "bold") for role in facts))]
    for section, rows in groupby(fact_rows(facts), key=lambda row: row.section):
        lines.append([(section, "bold")])
        lines += [(f"  {row.label}", ("≠" if row.differs else "", "yellow"), *row.values)
                  for row in rows]
    return lines


# ----- preflight ----------------------------------------------------------------------------


def _preflight(check: Preflight) -> list[str]:
    lines = [f"preflight {check.name}: {check.sentence}"]
    for one in check.dropped:
        lines.append(f"  {one.count:,} x {one.reason}: {', '.join(one.sources) or one.detail}"
                     f"{', ...' if one.count > len(one.sources) > 0 else ''}")
        lines += [f"    {one.remedy}"] if one.remedy else []
    lines += [f"  source {name}: {read:,} rows read, {used:,} used, {read - used:,} left out"
              for name, (read, used) in check.sources.items()]
    if check.cut:
        lines.append(f"  {check.cut:,} texts are cut to the maximum length")
    if not check.whole:
        return lines
    lines.append(f"  {check.supervised:,} answer tokens, {check.aligned:,} compared "
                 f"({check.coverage:.1%}), {check.chunk:,} of them in chunks")
    for what, spreads in (("tokens per record", check.lengths), ("image tokens", check.images)):
        lines += [f"  {what:<18} {role:<8} {_spread(one)}" for role, one in spreads.items()]
    return lines


def _spread(spread: Spread) -> str:
    return (f"median {spread.median:>6,}   95 % {spread.p95:>6,}   max {spread.max:>6,}   "
            f"({spread.n:,} records)")


def _rounding(rounding: Rounding, width: int) -> list[str]:
    return [f"quantization {rounding.kind} of the teacher, over {rounding.records:,} records and "
            f"{rounding.tokens:,} answer tokens", table(
                [("  " + name, value) for name, value in rounding_rows(rounding)], width=width)]


# ----- one record ---------------------------------------------------------------------------


def _trace(record: Trace, paint: Paint) -> list[str]:
    lines = []
    for role, stream in record.sides.items():
        shown = "".join(_shown(piece, paint) for piece in stream.pieces)
        lines += [f"--- {role}: {stream.length} tokens", shown, ""]
    kinds = {piece.kind for stream in record.sides.values() for piece in stream.pieces}
    legend = [paint(text, _MARKS[kind][2]) for kind, text in _LEGEND.items() if kind in kinds]
    if len(record.sides) == 1:
        return [*lines, "⟦ ⟧ is learned"]
    return [*lines, f"marks: {', '.join(legend)}", "", *_table(record)]


def _shown(piece: Piece, paint: Paint) -> str:
    if piece.kind == "image":
        return paint(f"[image: {piece.count} tokens]", _GREY)
    if piece.kind not in _MARKS:
        return paint(piece.text, _GREY) if piece.kind == "special" else printable(piece.text)
    opening, closing, code = _MARKS[piece.kind]
    inner = "|".join(token.text for token in piece.tokens) if piece.kind == "chunk" else piece.text
    return paint(f"{opening}{inner}{closing}", code)


def _table(record: Trace) -> list[str]:
    """What is compared with what, a chunk over as many lines as its longer side has tokens."""
    teacher, student = (_groups(record.sides[role].pieces) for role in ("teacher", "student"))
    lines = [f"    {'teacher: position, id, token':<34}{'student: position, id, token'}"]
    for group in list(student)[:SHOWN_ROWS]:
        for pair in zip_longest(teacher[group], student[group]):
            lines.append(f"    {_cell(pair[0])} {_cell(pair[1])}".rstrip())
    if len(student) > SHOWN_ROWS:
        lines.append(f"    ... and {len(student) - SHOWN_ROWS} more")
    return lines


def _groups(pieces: Sequence[Piece]) -> dict[int, tuple[StreamToken, ...]]:
    return {piece.group: piece.tokens for piece in pieces if piece.group is not None}


def _cell(token: StreamToken | None) -> str:
    if token is None:
        return f"{'':<32}"
    return f"{token.position:>5} {token.id:>7} {token.name!r:<18.18}"
