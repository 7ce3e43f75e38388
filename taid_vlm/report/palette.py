"""One colour per model name, the same in every chart, table and card of a page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from taid_vlm.report.data import Report, Row

# slot -> (on light, on dark). Hues follow the colour-blind-safe set of Okabe and Ito, darkened
# (or lightened) until each reaches a contrast of about 3:1 against its background.
SLOTS: dict[str, tuple[str, str]] = {
    "taid": ("#b53f06", "#ff8d52"),
    "teacher": ("#343a42", "#dfe3e8"),
    "start": ("#8b919a", "#8d95a1"),
    "kl": ("#0a63ab", "#62a6f3"),
    "rkl": ("#00815f", "#3fc79c"),
    "sft": ("#a94e8a", "#e59ccb"),
    "sky": ("#3f9bd1", "#9bd8fb"),
    "amber": ("#b58200", "#efc04b"),
    "brown": ("#7b5433", "#c8a27e"),
}
ROLE_SLOTS = {"teacher": "teacher", "start": "start", "main": "taid"}
# First match wins, so reverse KL stands before KL.
NAME_SLOTS = (
    (r"\btaid\b", "taid"),
    (r"\bteacher\b", "teacher"),
    (r"\b(start|warm ?start|warm|init(ial)?|before)\b", "start"),
    (r"\b(rkl|reverse kl)\b", "rkl"),
    (r"\b(kl|fkl|forward kl|kd)\b", "kl"),
    (r"\b(sft|ce|cross entropy|fine tun\w+)\b", "sft"),
)
# Dash patterns in points; the second and third mark names that share a colour with an earlier one.
DASHES: tuple[tuple[float, ...], ...] = ((), (5.0, 2.5), (1.5, 2.0))


@dataclass(frozen=True)
class Style:
    """How one name is drawn: a slot of the palette and a dash pattern in points."""

    slot: str
    dash: tuple[float, ...] = ()

    @property
    def css(self) -> str:
        """The colour as a CSS value that follows the light or dark scheme."""
        return f"var(--s-{self.slot})"

    @property
    def dasharray(self) -> str:
        """The dash pattern as an SVG attribute value."""
        return " ".join(f"{length:g}" for length in self.dash) or "none"


def assign(report: Report) -> dict[str, Style]:
    """A style for every name of the report: known names first, the others in order."""
    names = list(dict.fromkeys(_names(report)))
    roles = _roles(report)
    styles: dict[str, Style] = {}
    for name in sorted(names, key=lambda name: name not in roles):
        slot = ROLE_SLOTS.get(roles.get(name, "")) or known_slot(name)
        if slot and Style(slot) not in styles.values():
            styles[name] = Style(slot)
    free = _free_styles(set(styles.values()))
    for name in names:
        if name not in styles:
            styles[name] = next(free)
    return styles


def known_slot(name: str) -> str:
    """The slot that a name stands for by itself ("Reverse-KL" -> "rkl"), or an empty string."""
    plain = re.sub(r"[\W_]+", " ", name.lower())
    return next((slot for pattern, slot in NAME_SLOTS if re.search(pattern, plain)), "")


def _names(report: Report) -> Iterator[str]:
    """Every name; those of charts and galleries first, where colour carries the most."""
    for section in report.sections:
        yield from (name for curve in section.curves for name in curve.series)
        yield from (name for example in section.examples for name in example.answers)
    yield from (row.name for row in _rows(report))


def _rows(report: Report) -> Iterable[Row]:
    return (row for part in report.sections for table in part.tables for row in table.rows)


def _roles(report: Report) -> dict[str, str]:
    return {row.name: row.role for row in _rows(report) if row.role in ROLE_SLOTS}


def _free_styles(taken: set[Style]) -> Iterator[Style]:
    """Unused styles, solid ones first; past the last they repeat rather than run out."""
    # The named slots keep their meaning as long as others are left.
    order = ["sky", "amber", "brown", "sft", "rkl", "kl", "start", "teacher", "taid"]
    every = [Style(slot, dash) for dash in DASHES for slot in order]
    yield from (style for style in every if style not in taken)
    while True:
        yield from every


def stylesheet() -> str:
    """The CSS variables of the palette for the light scheme and, on screens, the dark one."""
    light = "".join(f"--s-{slot}:{pair[0]};" for slot, pair in SLOTS.items())
    dark = "".join(f"--s-{slot}:{pair[1]};" for slot, pair in SLOTS.items())
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
