"""Curves as inline SVG: text stays text, colours follow the scheme of the page."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from taid_vlm.report.data import Curve
from taid_vlm.report.palette import SLOTS, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

Points = list[tuple[float, float]]

SIZE = (4.9, 3.0)  # inches, i.e. 353 x 216 SVG units: near its size on a phone, so text is too
MAX_POINTS = 600  # per series; more than the chart is wide
HOVERED = 100  # points of a series whose value can be read
MARGIN = 0.05  # of an axis, to both sides
MARKER_LIMIT = 16  # series of so few points show them, which also makes a lone point visible
NOISY = 250  # longer series are most likely noisy ones, which thick lines turn into bands
LARGEST = 1e30  # beyond this the axis arithmetic overflows; drawn as a gap like inf

# Stand-ins that matplotlib draws with, replaced by CSS afterwards.
INK, GRID = "#7f8081", "#bfc0c1"
CSS_COLOURS = {
    INK: "var(--muted)",
    GRID: "var(--rule)",
    **{pair[0]: f"var(--s-{slot})" for slot, pair in SLOTS.items()},
}
SVG_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "taid-vlm-report",
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same layout on every machine
    "path.simplify": True,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Axis:
    """What all charts of a page over one quantity share: its ends, and where values are read."""

    low: float
    high: float
    read: frozenset[float]


def axes_of(curves: Iterable[Curve]) -> dict[str, Axis]:
    """By the label of the x axis; of curves without a point none."""
    drawn: dict[str, list[list[float]]] = {}
    for curve in curves:
        every = ([p[0] for p in points if drawable(p, curve.log_y)]
                 for points in curve.series.values())
        drawn.setdefault(curve.x_label, []).extend(filter(None, every))
    return {label: Axis(
        min(map(min, series)), max(map(max, series)), frozenset(
            x for xs in series for x in (*xs[:: math.ceil(len(xs) / HOVERED)], xs[-1])))
        for label, series in drawn.items() if series}


def drawable(point: tuple[float, float], log_y: bool) -> bool:
    """True for a point with a place on the chart."""
    x, y = point
    fits = all(math.isfinite(v) and abs(v) < LARGEST for v in (x, y))
    return fits and not (log_y and y <= 0)


def left_out(curve: Curve) -> int:
    """How many points of the curve have no place on the chart."""
    points = (point for series in curve.series.values() for point in series)
    return sum(not drawable(point, curve.log_y) for point in points)


def thin(points: Points, limit: int = MAX_POINTS) -> Points:
    """At most about ``limit`` of the points: both ends, the lowest and highest of each stretch.

    Extremes are kept, rather than every k-th point, so that a spike stays visible.
    """
    if len(points) <= limit:
        return points
    step = math.ceil(2 * len(points) / limit)
    kept = {0, len(points) - 1}
    for begin in range(0, len(points), step):
        stretch = range(begin, min(begin + step, len(points)))
        kept |= {pick(stretch, key=lambda i: points[i][1]) for pick in (min, max)}
    return [points[i] for i in sorted(kept)]


def draw(
    curve: Curve, styles: Mapping[str, Style], prefix: str, shared: Mapping[str, Axis] | None = None
) -> str:
    """The curve as an ``<svg>`` element, or an empty string when no point can be drawn.

    ``prefix`` starts every id of the element and must be unique on the page; ``shared`` are the
    axes of all its curves.
    """
    own = axes_of([curve])
    if not own:
        return ""
    axis = (own if shared is None else shared)[curve.x_label]
    import matplotlib  # lazy: a page without curves needs no matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(SVG_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the layout font lacks; the browser has them
        canvas = Canvas(figsize=SIZE, layout="constrained", facecolor="none")
        axes = canvas.add_subplot(facecolor="none")
        axes.patch.set_gid("frame")
        titles = {f"series-{number}": _plot(axes, name, points, curve, styles)
                  for number, (name, points) in enumerate(curve.series.items(), start=1)}
        read = {f"values-{number}": _hover(axes, number, points, curve, axis)
                for number, points in enumerate(curve.series.values(), start=1)}
        _dress(axes, curve)
        if axis.low < axis.high:
            margin = MARGIN * (axis.high - axis.low)
            axes.set_xlim(axis.low - margin, axis.high + margin)
        stream = io.StringIO()
        canvas.savefig(stream, format="svg", metadata={"Date": None}, facecolor="none")
    return _inline(stream.getvalue(), prefix, curve, titles, read)


def save_png(curves: Sequence[Curve], styles: Mapping[str, Style], path: Path) -> None:
    """All curves side by side as a picture on white, for where no page is shown."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(SVG_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        columns = min(len(curves), 3)
        rows = math.ceil(len(curves) / columns)
        canvas = Canvas(figsize=(SIZE[0] * columns, SIZE[1] * rows), layout="constrained")
        for number, curve in enumerate(curves, start=1):
            axes = canvas.add_subplot(rows, columns, number)
            for name, points in curve.series.items():
                _plot(axes, name, points, curve, styles)
            _dress(axes, curve)
            axes.legend(axes.lines, curve.series, title=curve.title, frameon=False, fontsize=9)
        canvas.savefig(path, format="png", dpi=150, metadata={"Software": None})


def _plot(axes: Axes, name: str, points: Points, curve: Curve, styles: Mapping[str, Style]) -> str:
    """Draw one series (gaps where points cannot be drawn) and return its tooltip."""
    style = styles[name]
    gap = (math.nan, math.nan)
    shown = [p if drawable(p, curve.log_y) else gap for p in points]
    finite = [p for p in shown if p is not gap]
    line: Line2D = axes.plot(*_columns(thin(shown) if len(finite) == len(shown) else shown))[0]
    width = 1.1 if len(finite) > NOISY else 1.5
    line.set(color=SLOTS[style.slot][0], linewidth=width, gid=f"series-{len(axes.lines)}")
    line.set(linestyle=(0, style.dash) if style.dash else "-", solid_capstyle="round")
    if style.slot == "taid" and not style.dash:
        line.set(linewidth=1.5 * width, zorder=3)
    if len(finite) <= MARKER_LIMIT:
        line.set(marker="o", markersize=4, markeredgewidth=0)
    return f"{name}: last {finite[-1][1]:.4g} at {finite[-1][0]:g}" if finite else name


def _hover(axes: Axes, number: int, points: Points, curve: Curve, axis: Axis) -> Points:
    """Put something invisible over the points that can be read; returns these."""
    shown = [p for p in points if drawable(p, curve.log_y) and p[0] in axis.read]
    if shown:
        axes.plot(*_columns(shown), linestyle="", marker="o", markersize=10, markeredgewidth=0,
                  alpha=0, color=INK, gid=f"values-{number}")
    return shown


def _columns(points: Points) -> tuple[Sequence[float], Sequence[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _dress(axes: Axes, curve: Curve) -> None:
    """Axes, grid and labels; the y label lies flat above the axis, where it reads at once."""
    if curve.log_y:
        axes.set_yscale("log")
    _ticks(axes, curve.log_y)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(INK)
    axes.tick_params(colors=INK, labelsize=10.5, length=0, pad=5)
    axes.tick_params(axis="x", length=3)
    label: dict[str, Any] = {"color": INK, "fontsize": 10.5, "parse_math": False}
    axes.set_xlabel(clean(curve.x_label), **label)
    axes.set_title(clean(curve.y_label), loc="left", pad=7, **label)


def _ticks(axes: Axes, log_y: bool) -> None:
    """Few ticks with plain numbers (10, 0.01), which need no mathematical typesetting."""
    from matplotlib import ticker

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    low, high = axes.dataLim.intervalx
    if low == high:  # a lone measurement: no ticks at places where nothing was measured
        axes.set_xticks([low], [f"{low:g}"])
    if log_y:
        low, high = axes.get_ylim()
        subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=7))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())


def clean(text: str) -> str:
    """Text without what XML forbids: control characters and lone surrogates."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "", text)


def _inline(
    svg: str, prefix: str, curve: Curve, titles: Mapping[str, str],
    read: Mapping[str, Points],
) -> str:
    """Fit matplotlib's SVG document into an HTML page.

    Namespaces, metadata and the global style sheet go (HTML needs none of them), ids become
    unique on the page, colours become CSS variables, each series gets its tooltip.
    """
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in [c for c in parent if _local(c.tag) in ("metadata", "style")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(k): _value(k, v, prefix) for k, v in element.attrib.items()}
    parts = {e.get("id", "").removeprefix(f"{prefix}-"): e for e in root.iter()}
    parts["frame"].set("data-frame", "")
    for part, text in titles.items():
        if part in parts:
            _add_tooltip(parts[part], text)
    for name, (part, points) in zip(curve.series, read.items(), strict=True):
        if points:
            parts[part].set("data-points", "")
            marks = [e for e in parts[part].iter() if e.tag == "use"]
            for mark, (x, y) in zip(marks, points, strict=True):
                mark.set("data-x", f"{x:g}")
                _add_tooltip(mark, f"{name}: {y:.4g} at {x:g}")
    root.attrib = {"viewBox": root.get("viewBox", ""), "role": "img",
                   "aria-label": clean(curve.title)}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _value(key: str, value: str, prefix: str) -> str:
    """One attribute value with prefixed ids and references and with CSS colours."""
    if _local(key) == "id":
        return f"{prefix}-{value}"
    if _local(key) == "href":
        return value.replace("#", f"#{prefix}-", 1)
    value = value.replace("url(#", f"url(#{prefix}-")
    return re.sub(r"#[0-9a-f]{6}\b", lambda m: CSS_COLOURS.get(m[0], m[0]), value)


def _add_tooltip(element: ElementTree.Element, text: str) -> None:
    tooltip = ElementTree.Element("title")
    tooltip.text = clean(text)
    element.insert(0, tooltip)
