"""Figures of models that several seeds have trained and the same held-out records measure.

Two things could have come out otherwise: the seed and the records. Their errors are kept apart:
over seeds, the spread of the seeds' means; over records, that of the records' means over seeds.
An interval has both (their squares add up) and Student's t of the seeds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from miniature.intervals import Interval, around
from taid_vlm.evaluation.statistics import Pooled, pool_seeds

Sums = Mapping[str, tuple[float, float]]  # record -> total of a figure, and over how much
PER_TOKEN = ("kl", "nll", "agreement")


def sums(run: Mapping[str, Any], figure: str, truth: Mapping[str, float]) -> Sums:
    """One arm's figure by record, from what `pairs.run_arm` returns.

    Args:
        figure: kl, nll and agreement are per token; caption_kl per caption, against the truth's
            own log-probability; accuracy per question.
        truth: entropies of the held-out captions, by record.
    """
    found: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))

    def add(record: str, total: float, weight: float) -> None:
        found[record] = (found[record][0] + total, found[record][1] + weight)

    for loss in run["losses"]:
        if figure in PER_TOKEN and figure in loss:
            add(loss["source"], loss[figure], loss["tokens"])
        elif figure == "caption_kl" and loss["category"] == "caption":
            add(loss["source"], loss["nll"] - truth[loss["source"]], 1.0)
    for answer in run["answers"]:
        if figure == "accuracy" and answer["category"] != "caption":
            add(answer["source"], float(answer["right"]), 1.0)
    return dict(found)


def pool(runs: Sequence[Sums]) -> Pooled:
    """One figure over the runs of several seeds, all measured on the same records."""
    records = list(runs[0])
    return pool_seeds([[run[record][0] for record in records] for run in runs],
                      [runs[0][record][1] for record in records])


def pool_difference(first: Sequence[Sums], second: Sequence[Sums]) -> Pooled:
    """`first` minus `second`, paired by seed and by record."""
    return pool([{record: (a[record][0] - b[record][0], weight)
                  for record, (_, weight) in a.items()}
                 for a, b in zip(first, second, strict=True)])


def interval_of(pooled: Pooled) -> Interval:
    return around(pooled.value, pooled.stderr, pooled.seeds)


def as_json(pooled: Pooled) -> dict[str, Any]:
    """For results.json; an interval needs two seeds (otherwise null)."""
    found = interval_of(pooled)
    return {"value": pooled.value, "over_seeds": pooled.stderr_seeds,
            "over_records": pooled.stderr_questions, "low": found.low, "high": found.high,
            "seeds": pooled.seeds, "records": pooled.n}
