"""Steps that go wrong: not applied, counted, their records named.

A loss or gradient that is no number is never applied; a loss far above those of the steps before
is not, where that is asked for (`train.spike_factor`). All of a step's figures and what is wrong
with it cross the processes, and leave the device, together.
"""

from __future__ import annotations

import logging
import statistics
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from taid_vlm.batch.forward import Batch
from taid_vlm.config.objective import MOVING
from taid_vlm.errors import TaidError
from taid_vlm.objectives import Objective
from taid_vlm.objectives.objective import Term, VisualTerm

logger = logging.getLogger(__name__)

NONFINITE, OVERFLOW = "loss or gradient not finite", "gradient overflow in float16"
SPIKE = "loss spike"
NAMED = 5  # records in a message
# of a message: what is wrong with a step, what is wrong with several, and what to change
WORDS = {
    NONFINITE: ("its loss or gradient is not finite", "a loss or gradient that is not finite",
                "Lower train.learning_rate"),
    SPIKE: ("its loss is a spike", "a loss above train.spike_factor times the median of those "
            "before", "Lower train.learning_rate, raise train.spike_factor"),
}

Seen = Sequence[tuple[list[str], Tensor, Tensor]]


class StepGuard:
    """What happened to the steps of one process; all processes come to the same result.

    Args:
        accelerator: of the run.
        most: so many in a row that are not applied end the run.
        factor: a step is not applied if its loss is above so many times the median of the last
            `window` applied ones; None applies it.
        window: before so many steps are applied, none is compared.
    """

    def __init__(
        self, accelerator: Accelerator, most: int, factor: float | None = None, window: int = 100
    ) -> None:
        self.accelerator, self.most, self.factor = accelerator, most, factor
        self.skipped: Counter[str] = Counter()  # steps by reason
        self.in_a_row = 0
        self.applied = True  # the last step
        self.sums: dict[str, float] = {}  # of the last step, over all processes
        self._recent: deque[float] = deque(maxlen=window)  # losses of applied steps
        self._seen: list[tuple[list[str], Tensor, Tensor]] = []

    def note(self, batch: Batch, losses: Mapping[str, Tensor]) -> None:
        """Remember a micro-batch's records and the losses of their tokens [N]."""
        if losses and len(batch["labels"]):
            total = torch.stack([x.detach() for x in losses.values()]).sum(0)
            self._seen.append((batch["sources"], batch["row"], total))

    def judge(
        self, sums: Mapping[str, Tensor], norm: Tensor | float | None,
        parameters: Sequence[nn.Parameter], step: int, objective: Objective, t: float | None,
    ) -> None:
        """Whether an optimizer step may be applied; if not, its gradients are taken away, so that
        no optimizer moves a weight, a moment or its count. Waits for the device, once.

        float16's GradScaler leaves out a step whose gradient is no number by itself, and lowers
        its scale; it needs the gradients for that, and a few such steps are as usual at the start
        of a run.

        Args:
            sums: of this process's tokens; `self.sums` are those of all.
            norm: of the gradient.
            t: TAID's, of this step.

        Raises:
            TaidError: after `most` in a row.
        """
        seen, self._seen = self._seen, []
        bad_loss, bad_gradient = self._add_up(sums, norm, seen)
        loss = comparable_loss(objective, self.sums, t)
        reason = self._reason(bad_loss, bad_gradient, loss)
        self.applied = reason is None
        if reason is None:
            self.in_a_row = 0
            if self.factor is not None and loss is not None:
                self._recent.append(loss)
            return
        self.skipped[reason] += 1
        if reason != OVERFLOW:
            for parameter in parameters:
                parameter.grad = None
            self.in_a_row += 1
            self._report(reason, seen, step)

    def _add_up(
        self, sums: Mapping[str, Tensor], norm: Tensor | float | None, seen: Seen
    ) -> tuple[bool, bool]:
        """`self.sums`, and whether any process has a loss or a gradient that is no number."""
        names = sorted(sums)
        values = [sums[name] for name in names]
        no = values[0].new_zeros(())
        loss = torch.stack([~x.isfinite().all() for *_, x in seen]).any() if seen else no
        norm = no if norm is None else norm
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
        flags = [loss.to(no), (~norm.isfinite()).to(no)]
        *totals, loss_flag, norm_flag = self.accelerator.reduce(
            torch.stack([*values, *flags]), "sum").tolist()
        self.sums = dict(zip(names, totals, strict=True))
        return bool(loss_flag), bool(norm_flag)

    def _reason(self, bad_loss: bool, bad_gradient: bool, loss: float | None) -> str | None:
        if bad_gradient and self.accelerator.scaler is not None:
            return OVERFLOW
        if bad_loss or bad_gradient:
            return NONFINITE
        compared = self.factor is not None and len(self._recent) == self._recent.maxlen
        if compared and loss is not None and self.factor is not None:
            usual = statistics.median(self._recent)
            return SPIKE if loss > self.factor * usual > 0 else None
        return None

    def _report(self, reason: str, seen: Seen, step: int) -> None:
        records = ", ".join(_names(seen, reason)) or "no single record"
        one, several, mend = WORDS[reason]
        logger.warning("Step %d is not applied: %s (%s).", step, one, records)
        if self.in_a_row >= self.most:
            raise TaidError(
                f"{self.in_a_row} steps in a row were not applied, the last one for {several}, "
                f"with {records}. {mend}, look at these records, or raise "
                "train.max_nonfinite_steps.")

    def state_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"skipped": dict(self.skipped), "in_a_row": self.in_a_row,
                "recent": list(self._recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; {} for the start of a run."""
        self.skipped, self.in_a_row = Counter(state.get("skipped", {})), state.get("in_a_row", 0)
        self._recent = deque(state.get("recent", ()), self._recent.maxlen)


def comparable_loss(
    objective: Objective, sums: Mapping[str, float], t: float | None
) -> float | None:
    """A step's loss as it can be compared between steps: the weighted sum of its terms' means,
    TAID's over t². None where a term has nothing to be measured on.

    TAID's target moves away from the student as t grows, and its loss with it: it is the integral
    of s Var(s) over s from 0 to t, with the variance of the logits' difference under the
    interpolation at s. As long as that differs little along the way, the loss over t² stays where
    it is; in random pairs it does within a factor of 2 from t = 0.4 to 1, where the loss itself
    grows 6- to 12-fold. What a token weighs (visual_advantage) is left aside.
    """
    total = 0.0
    terms: list[Term | VisualTerm] = [*objective.terms, *objective.visual]
    for term in terms:
        name = f"loss/{term.name}"
        count = sums.get(f"tokens/{name}", sums["tokens"])
        scale = 1.0 if term.name not in MOVING else (t or 0.0) ** 2
        if not count or not scale:
            return None
        total += term.weight * sums[name] / count / scale
    return total


def _names(seen: Seen, reason: str) -> list[str]:
    """The records whose own loss is no number, or, if only the gradient is, all of the step; of a
    spike all, those with the highest loss first."""
    if reason == SPIKE:
        names = _by_loss(seen)
    else:
        bad = [sources[row] for sources, rows, loss in seen
               for row in rows[~loss.isfinite()].unique().tolist()]
        names = bad or [source for sources, _, _ in seen for source in sources]
    more = [f"{len(names) - NAMED} more"] if len(names) > NAMED else []
    return [*names[:NAMED], *more]


def _by_loss(seen: Seen) -> list[str]:
    means = [(float(loss[rows == row].mean()), sources[row]) for sources, rows, loss in seen
             for row in rows.unique().tolist()]
    return [source for _, source in sorted(means, key=lambda mean: -mean[0])]
