"""The inspection as one self-contained page, in the look of the reports."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from taid_vlm.doctor.doctor import Inspection
from taid_vlm.doctor.preflight import Preflight, Spread
from taid_vlm.doctor.rounding import rounding_rows
from taid_vlm.doctor.streams import Piece, Trace
from taid_vlm.doctor.table import fact_rows
from taid_vlm.io.files import write_text
from taid_vlm.report.card import public_name
from taid_vlm.report.page import data_uri, fill

TEMPLATES = Path(__file__).with_name("templates")
COLOURS = 6  # of linked pieces, in turn
LINE_BREAK = "↵"


def render(inspection: Inspection) -> str:
    """The page as HTML text; the same inspection always gives the same text."""
    sections = groupby(fact_rows(inspection.facts), key=lambda row: row.section)
    names = [side.name for side in inspection.facts.values()]
    return fill(
        "doctor.html.j2", ("doctor.js",), TEMPLATES,
        (TEMPLATES / "doctor.css").read_text(encoding="utf-8"),
        pair=" and ".join(map(public_name, names)),
        verdict=inspection.verdict,
        reason=_sentence(inspection.verdict.reason),
        problem="" if inspection.verdict.outcome == "refused" else inspection.problem,
        roles=list(inspection.facts),
        names=names,
        sections=[(name, list(rows)) for name, rows in sections],
        record=inspection.record and _record(inspection.record),
        rounding=inspection.quantization,
        rounding_rows=inspection.quantization and rounding_rows(inspection.quantization),
        checks=[_check(check, inspection) for check in inspection.preflight],
    )


def write_page(inspection: Inspection, path: Path) -> Path:
    """Write the page in one step; raises TaidError."""
    return write_text(render(inspection), Path(path))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")


# ----- the streams --------------------------------------------------------------------------


def _record(record: Trace) -> dict[str, Any]:
    """The streams, every piece with its class and, where it has partners, its link."""
    images = [data_uri(image) for image in record.images]
    sides = {role: (stream.length, _pieces(stream.pieces, images))
             for role, stream in record.sides.items()}
    kinds = {piece.kind for stream in record.sides.values() for piece in stream.pieces}
    return {**vars(record), "sides": sides, "kinds": kinds}


def _pieces(pieces: tuple[Piece, ...], images: list[str]) -> list[dict[str, Any]]:
    items, thumbnails = [], iter(images)
    for piece in pieces:
        item: dict[str, Any] = {"kind": piece.kind, "group": piece.group, "count": piece.count,
                                "texts": [piece.text]}
        if piece.kind == "image":
            item["image"] = next(thumbnails, "")
        elif piece.kind != "text":
            if piece.kind != "special":
                item["texts"] = [_visible(token.text) for token in piece.tokens]
            item["note"] = " + ".join(f"{token.name} (id {token.id}, position {token.position})"
                                      for token in piece.tokens)
        if piece.group is not None:
            item["colour"] = piece.group % COLOURS
        items.append(item)
    return items


def _visible(text: str) -> str:
    """A token's text with its line breaks to be seen, before they break the line."""
    return text.replace("\n", f"{LINE_BREAK}\n")


# ----- the preflight ------------------------------------------------------------------------


def _check(check: Preflight, inspection: Inspection) -> dict[str, Any]:
    limits = {role: side.max_length for role, side in inspection.facts.items()}
    return {"check": check, "lengths": _spreads(check.lengths, limits),
            "images": _spreads(check.images, {})}


def _spreads(
    spreads: Mapping[str, Spread], limits: Mapping[str, int | None]
) -> list[dict[str, Any]]:
    """Bars on one scale: to the median, to the 95 % and to the longest; and the limit."""
    most = max((spread.max for spread in spreads.values()), default=1)
    # a limit far beyond the longest record would squeeze the bars to nothing
    near = [limit for limit in limits.values() if limit is not None and limit <= 3 * most]
    scale = max([most, *near]) or 1

    def percent(value: int) -> float:
        return round(100 * value / scale, 2)

    return [{"role": role, "spread": spread, "limit": (limit := limits.get(role)),
             "over": limit is not None and spread.max > limit,
             "bars": list(map(percent, (spread.median, spread.p95, spread.max))),
             "mark": None if limit is None or limit > scale else percent(limit)}
            for role, spread in spreads.items()]
