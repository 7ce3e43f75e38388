"""Steps whose loss or gradient is no number: not applied, counted, their records named."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from taid_vlm.batch.forward import Batch
from taid_vlm.errors import TaidError

logger = logging.getLogger(__name__)

NONFINITE, OVERFLOW = "loss or gradient not finite", "gradient overflow in float16"
NAMED = 5  # records in a message


class StepGuard:
    """What happened to the steps of one process; all processes come to the same result.

    Args:
        accelerator: of the run.
        most: so many in a row that are not applied end the run.
    """

    def __init__(self, accelerator: Accelerator, most: int) -> None:
        self.accelerator, self.most = accelerator, most
        self.skipped: Counter[str] = Counter()  # steps by reason
        self.in_a_row = 0
        self.applied = True  # the last step
        self._seen: list[tuple[list[str], Tensor, Tensor]] = []

    def note(self, batch: Batch, losses: Mapping[str, Tensor]) -> None:
        """Remember which tokens [N] of a micro-batch have a loss that is no number."""
        if losses and len(batch["labels"]):
            bad = ~torch.stack([x.detach().isfinite() for x in losses.values()]).all(0)
            self._seen.append((batch["sources"], batch["row"], bad))

    def judge(self, norm: Tensor | float | None, parameters: list[nn.Parameter], step: int) -> bool:
        """Whether an optimizer step may be applied; if not, its gradients are taken away, so that
        no optimizer moves a weight, a moment or its count.

        float16's GradScaler leaves such a step out by itself, and lowers its scale; it needs the
        gradients for that, and a few of them are as usual at the start of a run.

        Raises:
            TaidError: after `most` in a row.
        """
        seen, self._seen = self._seen, []
        bad = torch.stack([mask.any() for _, _, mask in seen]).any() if seen else torch.zeros(())
        failed = bad.float()
        if norm is not None:
            failed = failed + float(not math.isfinite(float(norm)))
        if self.accelerator.num_processes > 1:
            failed = self.accelerator.reduce(failed.to(self.accelerator.device), "sum")
        self.applied = not bool(failed)
        if self.applied:
            self.in_a_row = 0
            return True
        scaled = self.accelerator.scaler is not None
        self.skipped[OVERFLOW if scaled else NONFINITE] += 1
        if not scaled:
            for parameter in parameters:
                parameter.grad = None
            self.in_a_row += 1
            self._tell(seen, step)
        return False

    def _tell(self, seen: list[tuple[list[str], Tensor, Tensor]], step: int) -> None:
        records = ", ".join(_names(seen)) or "no single record"
        logger.warning("Step %d is not applied: its loss or gradient is not finite (%s).",
                       step, records)
        if self.in_a_row >= self.most:
            raise TaidError(
                f"{self.in_a_row} steps in a row had a loss or gradient that is not finite, the "
                f"last one with {records}. Lower train.learning_rate, look at these records, or "
                "raise train.max_nonfinite_steps.")

    def state_dict(self) -> dict[str, int]:
        return dict(self.skipped)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.skipped, self.in_a_row = Counter(state), 0


def _names(seen: list[tuple[list[str], Tensor, Tensor]]) -> list[str]:
    """The records whose own loss is no number, or, if only the gradient is, all of the step."""
    bad = [sources[row] for sources, rows, mask in seen for row in rows[mask].unique().tolist()]
    names = bad or [source for sources, _, _ in seen for source in sources]
    more = [f"{len(names) - NAMED} more"] if len(names) > NAMED else []
    return [*names[:NAMED], *more]
