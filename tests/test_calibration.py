"""The calibration error against its definition, however the answers are cut up."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from taid_vlm.evaluation.calibration import BINS, Calibration, binned_sums

Answers = list[tuple[np.ndarray, np.ndarray]]


def answers(number: int = 80, seed: int = 0) -> Answers:
    """Confidence and hits of answers of unequal length, from a model that is too sure."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(number):
        confidence = rng.beta(4, 1.5, rng.integers(1, 20)).astype(np.float32)
        made.append((confidence, (rng.random(len(confidence)) < 0.8 * confidence)))
    return made


def counted(given: Answers) -> Calibration:
    """All answers in one batch."""
    found = Calibration()
    index = torch.tensor([i for i, (c, _) in enumerate(given) for _ in c])
    confidence = torch.tensor(np.concatenate([c for c, _ in given]))
    hits = torch.tensor(np.concatenate([h for _, h in given])).float()
    for binned in binned_sums(confidence, hits, index, len(given)):
        found.add(binned)
    return found


def naive(given: Answers) -> float:
    confidence = np.concatenate([c for c, _ in given]).astype(np.float64)
    hits = np.concatenate([h for _, h in given]).astype(np.float64)
    error = 0.0
    for low in range(BINS):
        inside = (confidence * BINS >= low) & (confidence * BINS < low + 1)
        if low == BINS - 1:
            inside |= confidence == 1.0
        if inside.any():
            error += inside.sum() * abs(hits[inside].mean() - confidence[inside].mean())
    return error / len(confidence)


def test_the_error_is_its_definition() -> None:
    assert counted(answers()).error == pytest.approx(naive(answers()), rel=1e-9)


@pytest.mark.parametrize("cut", [1, 7, 40, 79])
def test_parts_merge_to_the_whole(cut: int) -> None:
    whole, parts = counted(answers()), [counted(answers()[:cut]), counted(answers()[cut:])]
    merged = Calibration()
    for part in pickle.loads(pickle.dumps(parts)):  # as they travel between processes
        merged.merge(part)
    assert merged.error == pytest.approx(whole.error, rel=1e-12)
    assert merged.stderr == pytest.approx(whole.stderr, rel=1e-9)
    assert merged.answers == 80


def test_the_error_of_the_error_matches_a_bootstrap() -> None:
    given = answers(400)
    rng = np.random.default_rng(3)
    draws = [counted([given[i] for i in rng.integers(0, 400, 400)]).error for _ in range(150)]
    assert counted(given).stderr == pytest.approx(np.std(draws), rel=0.2)


def one(confidence: Sequence[float], hits: Sequence[float]) -> Calibration:
    return counted([(np.array(confidence, dtype=np.float32), np.array(hits))])


def test_edges() -> None:
    assert math.isnan(Calibration().error)
    assert math.isnan(Calibration().stderr)
    assert Calibration().bins() == []
    sure = one([1.0, 1.0], [1, 1])
    assert sure.error == 0.0
    assert math.isnan(sure.stderr)  # one answer
    assert sure.bins() == [{"tokens": 2, "confidence": 1.0, "accuracy": 1.0}]
    assert one([1.0, 1.0], [0, 0]).error == 1.0
    assert one([0.0, 0.0], [0, 0]).error == 0.0


def test_bins_tell_the_diagram() -> None:
    found = one([0.1, 0.11, 0.7], [0, 1, 1]).bins()
    assert [b["tokens"] for b in found] == [2, 1]
    assert found[0]["confidence"] == pytest.approx(0.105)
    assert found[0]["accuracy"] == 0.5
