"""The objectives that are compared: names of `taid_vlm.divergence` and settings of TaidSchedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from taid_vlm import TaidSchedule, divergence


@dataclass(frozen=True)
class Method:
    """One objective; `schedule` holds arguments of TaidSchedule, for "taid" only."""

    loss: str
    schedule: Mapping[str, Any] = field(default_factory=dict)


METHODS: dict[str, Method] = {
    "SFT": Method("ce"),
    "KL": Method("forward_kl"),
    "RKL": Method("reverse_kl"),
    "JSD": Method("jsd"),
    "Skew KL": Method("skew_kl"),
    "Skew RKL": Method("skew_rkl"),
    "TVD": Method("tvd"),
    "Adaptive KL": Method("adaptive_kl"),
    "Alpha-beta": Method("alpha_beta"),
    "TAID": Method("taid"),
    "TAID, t to 0.7": Method("taid", {"t_end": 0.7}),
}


class Objective:
    """A method's loss for many runs at once; each run of TAID has a schedule of its own."""

    def __init__(self, method: Method, runs: int, steps: int) -> None:
        self.loss = method.loss
        self.schedules = [TaidSchedule(steps, **method.schedule)
                          for _ in range(runs if method.loss == "taid" else 0)]

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of every run [R], from logits [R, N, V] and labels [R, N]."""
        if not self.schedules:
            return divergence(self.loss, student, teacher, labels=labels).mean(-1)
        each = [divergence("taid", s, u, t=schedule.t).mean()
                for s, u, schedule in zip(student, teacher, self.schedules, strict=True)]
        return torch.stack(each)

    def update(self, losses: Tensor, step: int) -> None:
        """Move every run's t after optimizer step `step`."""
        if self.schedules:
            for schedule, loss in zip(self.schedules, losses.tolist(), strict=True):
                schedule.update(loss, step)

    @property
    def t(self) -> list[float]:
        return [schedule.t for schedule in self.schedules]

    @property
    def active_share(self) -> float | None:
        """Mean share of steps in which TAID's adaptive term decided t; None for other losses."""
        shares = [schedule.active_share for schedule in self.schedules]
        return sum(shares) / len(shares) if shares else None
