"""Several runs in one plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from taid_vlm.compare.compare import Comparison
from taid_vlm.compare.folders import Distillation, Method
from taid_vlm.compare.measures import BASE, TEACHER
from taid_vlm.report import Curve

Points = list[tuple[float, float]]

TRAINING = (
    ("Held-out KL(teacher ‖ student)", "nats/token", "eval_kl", "kl", ""),
    ("Held-out agreement", "share of tokens", "eval_agreement", "agreement", ""),
    ("KL in training", "nats/token", "kl", "", ""),
    ("Own loss of each objective", "nats/token", "loss", "",
     "Losses of different objectives do not compare with each other."),
    ("Interpolation t", "t", "t", "", ""),
    ("Held-out mass on the teacher's tail", "probability", "eval_tail_mass", "tail_mass", ""),
)
LOGARITHMIC = ("eval_tail_mass",)


def training_curves(methods: Sequence[Method]) -> list[Curve]:
    """Curves over steps; held-out ones begin before training."""
    drawn = []
    for title, label, key, start, caption in TRAINING:
        every = {m.name: _mean([_points(run, key, start) for run in m.runs])
                 for m in methods if m.runs}
        series = {name: points for name, points in every.items() if len(points) > 1}
        if series:
            several = any(len(m.runs) > 1 for m in methods if m.name in series)
            captions = [caption, "Means over seeds." if several else ""]
            drawn.append(Curve(title, "step", label, series, key in LOGARITHMIC,
                               " ".join(filter(None, captions))))
    return drawn


def _points(run: Distillation, key: str, start: str) -> dict[float, float]:
    """By step; what is not finite was written as null, and is a gap."""
    points = {row["step"]: math.nan if row[key] is None else row[key]
              for row in run.results.history if key in row}
    return {0: run.before[start], **points} if points and start in run.before else points


def _mean(seeds: Sequence[Mapping[float, float]]) -> Points:
    """Over seeds, at the steps that all of them have."""
    steps = [step for step in seeds[0] if all(step in points for points in seeds)]
    return [(step, math.fsum(points[step] for points in seeds) / len(seeds)) for step in steps]


def reliability(methods: Sequence[Method]) -> Curve | None:
    """Accuracy of the most likely token against the confidence in it."""
    series: dict[str, Points] = {}
    for method in methods:
        for after in [run.results.eval.after for run in method.runs[:1]]:
            if after is not None and after.calibration:
                series[method.name] = [(b["confidence"], b["accuracy"]) for b in after.calibration]
    if not series:
        return None
    return Curve("Calibration", "confidence", "share of right tokens",
                 {**series, "perfect": [(0.0, 0.0), (1.0, 1.0)]},
                 caption="Below the diagonal a student is too sure of itself. First seeds.")


def masses(comparison: Comparison) -> Curve | None:
    """One point per model: how much of the teacher's head it covers, and how much leaks away."""
    figures = {j.measure.column.key: j.figures for j in comparison.held_out}
    if not {"head_mass", "tail_mass"} <= figures.keys():
        return None
    head, tail = figures["head_mass"], figures["tail_mass"]
    series = {name: [(head[name].value or 0.0, tail[name].value or 0.0)]
              for name in (TEACHER, BASE, *comparison.names) if name in head and name in tail}
    return Curve("Head and tail", "mass on the teacher's 10 most likely tokens",
                 "mass on the fifth it ranks last", series, log_y=True,
                 caption="A student that averages modes lies above the teacher, with mass where "
                         "the teacher has none; one that drops modes lies below or to the right.")


def capacity_gap(comparison: Comparison) -> Curve | None:
    """Where runs differ in their teachers: a figure over the teacher's size, by objective."""
    nll = next((j.figures for j in comparison.held_out if j.measure.column.key == "nll"), {})
    series: dict[str, Points] = {}
    for method in comparison.methods:
        for run in [run.results for run in method.runs[:1] if "teacher" in run.results.models]:
            value = nll[method.name].value if method.name in nll else None
            if value is not None:
                series.setdefault(_objective(run.objective), []).append(
                    (run.models["teacher"].parameters / 1e6, value))
    if len({x for points in series.values() for x, _ in points}) < 2:
        return None
    return Curve("Capacity gap", "teacher's parameters in millions", "held-out NLL, nats/token",
                 {name: sorted(points) for name, points in series.items()},
                 caption="Whether a larger teacher still helps, by objective.")


def _objective(objective: Any) -> str:
    if isinstance(objective, str):
        return objective
    names = [term.get("name", "") for term in objective.get("terms", [])]
    return str(objective.get("name") or " + ".join(names))
