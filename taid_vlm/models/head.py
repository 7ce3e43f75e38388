"""What stands behind an output head: the one list of config keys that scale or cap logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from taid_vlm.objectives.divergences import upcast


@dataclass(frozen=True)
class LogitTransform:
    """What some models do behind the head: z -> softcap(scale * z), c * tanh(z / c).

    softcap: c; None for none.
    """

    scale: float = 1.0
    softcap: float | None = None

    @property
    def is_identity(self) -> bool:
        """Whether it does nothing."""
        return self.scale == 1.0 and self.softcap is None

    def forward(self, z: Tensor) -> Tensor:
        """Logits of its own in float32 (float64), or `z` itself where it does nothing."""
        if self.is_identity:
            return z
        z = upcast(z) * self.scale
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def backward(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient in z from that in the logits; it overwrites both where it does anything."""
        if self.softcap is not None:
            gradient.addcmul_(gradient, logits.div_(self.softcap).square_(), value=-1.0)
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


IDENTITY = LogitTransform()

SCALES = ("logit_scale", "lm_head_multiplier")  # config keys of factors behind a head
DIVISORS = ("logits_scaling",)


def known_logit_transforms(config: Any) -> Iterator[LogitTransform]:
    """Nothing, or what the config names."""
    scale, softcap = 1.0, getattr(config, "final_logit_softcapping", None)
    for name in SCALES:
        scale *= getattr(config, name, None) or 1.0
    for name in DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    yield IDENTITY
    yield LogitTransform(scale, softcap)
