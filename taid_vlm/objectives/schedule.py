"""TAID's interpolation parameter t: when it moves, and by how much (paper, section 3)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from taid_vlm.config.objective import ScheduleSpec
from taid_vlm.errors import RecipeError

# alpha * total_steps in the paper's own runs (5e-4 x 11,720 steps): with alpha="auto" a run of any
# length lets the adaptive term act as much as it did there. The paper's constant 5e-4 never acts
# in runs shorter than about 4,000 steps: the linear floor is then always the higher one.
PAPER_ALPHA_STEPS = 5.86


@dataclass
class ScheduleState:
    """All that a checkpoint must hold for t to go on exactly."""

    t: float
    momentum: float = 0.0
    previous_loss: float | None = None
    updates: int = 0
    active: int = 0
    skipped: int = 0


class TaidSchedule:
    """The adaptive schedule of t; one `update` per optimizer step, from the global mean loss.

    Args:
        total_steps: optimizer steps of the whole run.
        t_start, t_end: 0 <= t_start <= t_end <= 1.
        alpha: step size of the adaptive term; "auto" scales it with the run's length.
        momentum: decay of the running relative improvement (the paper's beta).
        adaptive: False leaves the linear schedule alone.

    Raises:
        RecipeError: a value out of range.

    The paper's rule (Shing et al., 2025, arXiv:2501.16937, section 3): t grows by alpha sigmoid(m)
    (1 - t), where m is the running mean of the loss's relative improvement, and is at least on
    the line from t_start to t_end.

    Example:
        >>> from taid_vlm import TaidSchedule
        >>> line = TaidSchedule(total_steps=4, t_start=0.2, adaptive=False)
        >>> [round(line.update(loss=1.0, step=step), 2) for step in range(4)]
        [0.2, 0.4, 0.6, 0.8]
        >>> schedule = TaidSchedule(total_steps=100, t_start=0.2, momentum=0.9)
        >>> losses = [2.0, 1.6, 1.3, 1.1]  # falls, so that t runs ahead of the line
        >>> [round(schedule.update(loss, step), 2) for step, loss in enumerate(losses)]
        [0.2, 0.22, 0.25, 0.27]
    """

    def __init__(
        self,
        total_steps: int,
        t_start: float = 0.4,
        t_end: float = 1.0,
        alpha: Literal["auto"] | float = "auto",
        momentum: float = 0.99,
        adaptive: bool = True,
    ) -> None:
        if not total_steps >= 1:
            raise RecipeError(f"total_steps = {total_steps!r}, but it must be >= 1.")
        spec = ScheduleSpec(t_start=t_start, t_end=t_end, alpha=alpha, momentum=momentum,
                            adaptive=adaptive)
        self.total_steps, self.t_start, self.t_end = total_steps, spec.t_start, spec.t_end
        self.automatic = spec.alpha == "auto"
        self.alpha = (spec.alpha if spec.alpha != "auto" else
                      min(1.0, PAPER_ALPHA_STEPS / total_steps))
        self.momentum, self.adaptive = spec.momentum, spec.adaptive
        self.state = ScheduleState(t=spec.t_start)

    @property
    def t(self) -> float:
        """The interpolation parameter for the next optimizer step."""
        return self.state.t

    @property
    def active_share(self) -> float:
        """Share of updates in which the adaptive term, not the linear floor, decided t."""
        moves = self.state.updates - 1 if self.state.updates else 0
        return self.state.active / moves if moves > 0 else 0.0

    def update(self, loss: float, step: int) -> float:
        """Move t after optimizer step `step` (counted from 0) with mean loss `loss`; return t.

        A loss that is not finite changes nothing and is counted in `state.skipped`: one bad
        batch must not poison the momentum.
        """
        state = self.state
        loss = float(loss)
        if not math.isfinite(loss):
            state.skipped += 1
            return state.t
        state.updates += 1
        previous, state.previous_loss = state.previous_loss, loss
        if previous is None:
            return state.t
        improvement = max(-1.0, min(1.0, (previous - loss) / (previous + 1e-15)))
        state.momentum = self.momentum * state.momentum + (1 - self.momentum) * improvement
        state.t = self._next(step)
        return state.t

    def _next(self, step: int) -> float:
        linear = self.t_start + (self.t_end - self.t_start) * step / self.total_steps
        if not self.adaptive:
            return min(self.t_end, linear)
        state = self.state
        adaptive = state.t + self.alpha * _sigmoid(state.momentum) * (1 - state.t)
        state.active += adaptive > linear and state.t < self.t_end
        return min(self.t_end, max(linear, adaptive))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; raises RecipeError on foreign keys."""
        try:
            self.state = ScheduleState(**state)
        except TypeError as error:
            raise RecipeError(f"not a TaidSchedule state: {error}") from None


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
