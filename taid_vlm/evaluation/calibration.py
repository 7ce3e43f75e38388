"""Expected calibration error: how far a model's confidence in its best guess is from its accuracy.

No mean of figures per token: sums per bin are kept, so that it is exact under any split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from taid_vlm.evaluation.statistics import standard_error

BINS = 15  # of equal width over [0, 1]; the last one holds 1.0 (Guo et al., 2017)


class Sums:
    """Sums that are added up in parts."""

    def merge(self, other: Sums) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Calibration(Sums):
    """Sums over tokens by bin of confidence, all float64, and over answers for the error.

    tokens, confidence, hits: [BINS], how many tokens, and the sums of both figures over them.
    cross: [BINS + 1, BINS + 1], sum over answers of the outer product of (hits - confidence by
        bin, tokens) with itself.
    """

    tokens: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    confidence: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    hits: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    cross: Tensor = field(
        default_factory=lambda: torch.zeros(BINS + 1, BINS + 1, dtype=torch.float64))
    answers: int = 0

    def add(self, binned: Tensor) -> None:
        """One answer's sums [3, BINS], from `binned_sums`."""
        self.tokens += binned[0]
        self.confidence += binned[1]
        self.hits += binned[2]
        row = torch.cat([binned[2] - binned[1], binned[0].sum()[None]])
        self.cross += torch.outer(row, row)
        self.answers += 1

    @property
    def error(self) -> float:
        """Mean over tokens of |accuracy - confidence| of their bin; NaN without tokens."""
        total = float(self.tokens.sum())
        return float((self.hits - self.confidence).abs().sum()) / total if total else math.nan

    @property
    def stderr(self) -> float:
        """Standard error with answers as independent draws, linearised: it takes as known which
        bins are too sure, so it is too small near perfect calibration."""
        signs = (self.hits - self.confidence).sign()
        weights = torch.cat([signs, torch.tensor([-self.error], dtype=torch.float64)])
        squares = float(weights @ self.cross @ weights)
        return standard_error(squares, self.answers, float(self.tokens.sum()))

    def bins(self) -> list[dict[str, Any]]:
        """The reliability diagram: every bin that has tokens, from unsure to sure."""
        return [{"tokens": int(n), "confidence": c / n, "accuracy": h / n} for n, c, h in
                zip(self.tokens.tolist(), self.confidence.tolist(), self.hits.tolist(),
                    strict=True) if n]


def binned_sums(confidence: Tensor, hits: Tensor, answer: Tensor, answers: int) -> Tensor:
    """Per answer and bin the tokens, their confidence and their hits, [answers, 3, BINS] float64.

    Args:
        confidence, hits: [N]. answer: [N], which answer a token is of.
    """
    cell = answer * BINS + (confidence * BINS).long().clamp(0, BINS - 1)
    values = torch.stack([torch.ones_like(confidence), confidence, hits]).double()
    sums = values.new_zeros(3, answers * BINS).index_add(1, cell, values)
    return sums.view(3, answers, BINS).transpose(0, 1)
