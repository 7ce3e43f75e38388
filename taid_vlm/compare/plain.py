"""The comparison as plain numbers, for JSON."""

from __future__ import annotations

from typing import Any

from taid_vlm.compare.compare import Comparison
from taid_vlm.compare.findings import findings
from taid_vlm.compare.judging import Judged


def plain(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain numbers; differences are method - baseline, in the figures' unit.

    `verdicts` are of methods, and empty with one seed each; `of_students` are of those measured.
    """
    return {
        "summary": findings(comparison), "warnings": list(comparison.warnings),
        "unequal": list(comparison.unequal),
        "baseline": comparison.baseline, "seeds": comparison.seeds,
        "held_out": {j.measure.column.key: _judged(j) for j in comparison.held_out},
        "benchmarks": {j.measure.column.key: _judged(j) for j in comparison.benchmarks},
    }


def _judged(judged: Judged) -> dict[str, Any]:
    scale = judged.measure.scale
    return {
        "better": judged.measure.column.better,
        "figures": {name: {"value": f.value, "stderr": f.stderr, "low": f.low, "high": f.high,
                           "n": f.n} for name, f in judged.figures.items()},
        "verdicts": judged.verdicts, "of_students": judged.ranking,
        "against_baseline": {name: {
            "difference": scale * d.interval.value, "low": scale * d.interval.low,
            "high": scale * d.interval.high, "p": d.p, "p_holm": d.adjusted, "test": d.test,
            "significant": d.significant, "covers_seeds": d.of_methods,
        } for name, d in judged.against.items()},
        "gap_recovered": {name: None if r.share is None else {
            "share": r.share.value, "low": r.share.low, "high": r.share.high}
            for name, r in judged.recovered.items()},
        "unpaired": judged.measure.unpaired,
    }
