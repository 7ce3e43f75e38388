"""The objectives that are compared: names of `taid_vlm.divergence` and settings of TaidSchedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from miniature.cut import CUT_LOSSES
from taid_vlm import TaidSchedule, divergence

MOVING = ("taid", "amid")  # losses whose target moves with a schedule's t


@dataclass(frozen=True)
class Method:
    """One objective.

    loss: of `divergence`, or one of CUT_LOSSES. schedule: arguments of TaidSchedule, for losses
    that move. parameters: the loss's own. own: the share of every batch that is learned in texts
    which the student writes itself.
    """

    loss: str
    schedule: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, float] = field(default_factory=dict)
    own: float = 0.0


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
SINCE: dict[str, Method] = {  # published after TAID; the clips are OPSD's, and one that few reach
    "AMiD, alpha 0": Method("amid", parameters={"alpha": 0.0}),
    "AMiD, alpha 3": Method("amid", parameters={"alpha": 3.0}),
    "ToDi": Method("todi"),
    "Entropy switch": Method("entropy_switch"),
    "KL, clip 0.05": Method("forward_kl", parameters={"clip": 0.05}),
    "KL, clip 1": Method("forward_kl", parameters={"clip": 1.0}),
    "KL, focus 1": Method("forward_kl", parameters={"focus": 1.0}),
}
CUT: dict[str, Method] = {
    "KL, top 4 alone": Method("top_kl"), "KL, top 4 and rest": Method("top_kl_rest"),
    "KL, 4 draws": Method("drawn_kl"), "RKL, top 4 alone": Method("top_rkl"),
    "RKL, top 4 and rest": Method("top_rkl_rest"),
}
POLICIES = {"off policy": 0.0, "half": 0.5, "on policy": 1.0}  # share of the student's own text
EXPOSED: dict[str, Method] = {f"{name}, {policy}": replace(METHODS[name], own=own)
                              for name in ("KL", "RKL", "TAID") for policy, own in POLICIES.items()}
EVERY = {**METHODS, **SINCE, **CUT, **EXPOSED}


class Objective:
    """A method's loss for many runs at once; each run of TAID has a schedule of its own."""

    def __init__(self, method: Method, runs: int, steps: int) -> None:
        self.loss, self.parameters = method.loss, method.parameters
        self.schedules = [TaidSchedule(steps, **method.schedule)
                          for _ in range(runs if method.loss in MOVING else 0)]
        self.generator = torch.Generator().manual_seed(0)  # draws from the teacher's laws

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of every run [R], from logits [R, N, V] and labels [R, N]."""
        if self.loss in CUT_LOSSES:
            return CUT_LOSSES[self.loss](student, teacher, self.generator).mean(-1)
        if not self.schedules:
            return divergence(self.loss, student, teacher, labels=labels,
                              **self.parameters).mean(-1)
        each = [divergence(self.loss, s, u, t=schedule.t, **self.parameters).mean()
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
