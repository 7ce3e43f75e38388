"""What a report is made of: plain frozen records, with no logic of the page in them."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Role = Literal["teacher", "start", "baseline", "main", ""]
Better = Literal["lower", "higher", ""]


@dataclass(frozen=True)
class Figure:
    """One measured figure; ``None`` or a value that is not finite prints as missing.

    ``value`` and ``stderr`` are in the unit of their column, ``n`` counts the examples (or runs)
    behind the value. ``stderr=None`` says that the uncertainty is unknown, ``0.0`` that it is nil.
    ``low`` and ``high`` are a 95 % interval, shown in place of the error. ``verdict`` is for who
    has compared in pairs; ``None`` leaves it to the standard errors. ``mark`` says how a difference
    is to be taken, ``note`` is for the tooltip.
    """

    value: float | None
    stderr: float | None = None
    n: int | None = None
    low: float | None = None
    high: float | None = None
    verdict: Literal["best", "tie", ""] | None = None
    mark: Literal["better", "worse", "even", ""] = ""
    note: str = ""


@dataclass(frozen=True)
class Column:
    """One column of a table: ``format`` is a format spec, ``help`` one plain sentence."""

    key: str
    label: str
    better: Better = ""
    format: str = ".3f"
    unit: str = ""
    help: str = ""


@dataclass(frozen=True)
class Row:
    """One model of a table; ``values`` maps column keys to figures and may lack some."""

    name: str
    role: Role
    values: dict[str, Figure]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows in the order in which they are shown; teacher and start rows do not compete.

    ``key`` replaces the sentences that explain errors and marks.
    """

    title: str
    columns: list[Column]
    rows: list[Row]
    caption: str = ""
    key: str = ""


@dataclass(frozen=True)
class Curve:
    """One chart: ``series`` maps a name to its (x, y) points, drawn in the given order."""

    title: str
    x_label: str
    y_label: str
    series: dict[str, list[tuple[float, float]]]
    log_y: bool = False
    caption: str = ""


@dataclass(frozen=True)
class Example:
    """One question put to every model.

    ``image`` holds the bytes of a PNG or JPEG (``None`` for a text-only question), ``answers`` maps
    the name of a model to its answer. ``scores`` is what a benchmark's rule gave each answer, from
    0 to 1; without it an answer is right where it is the reference. ``progress`` is what the last
    of the models said on its way, by step.
    """

    image: bytes | None
    prompt: str
    reference: str
    category: str
    answers: dict[str, str]
    scores: dict[str, float] = field(default_factory=dict)
    progress: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """One part of the page, shown as paragraphs, tables, curves and a gallery, in that order."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """The whole page: ``summary`` holds whole sentences, ``recipe`` is YAML text."""

    title: str
    summary: list[str]
    sections: list[Section]
    provenance: dict[str, str] = field(default_factory=dict)
    recipe: str = ""


def as_json(report: Report) -> str:
    """The report as strict JSON: images as base64 text, values that are not finite as null."""
    return json.dumps(_plain(asdict(report)), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
