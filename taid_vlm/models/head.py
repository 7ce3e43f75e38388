"""What stands behind an output head: the one list of config keys that scale or cap logits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taid_vlm.objectives.divergences import upcast


def keeps_type(dtype: torch.dtype) -> bool:
    """Whether frozen weights of this type are computed with in it, whatever autocast says: those
    of half precision are, as torch cannot mix bfloat16 weights and float16 autocast."""
    return dtype.itemsize < 4


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

    def differentiable(self, z: Tensor) -> Tensor:
        """The same for autograd, which `forward` writes over."""
        if self.softcap is None:
            return self.forward(z)
        return torch.tanh(upcast(z) * self.scale / self.softcap) * self.softcap

    def backward(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient in z from that in the logits; it overwrites both where it does anything."""
        if self.softcap is not None:
            gradient.addcmul_(gradient, logits.div_(self.softcap).square_(), value=-1.0)
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


IDENTITY = LogitTransform()

# Config keys as transformers' modeling code reads them: factors of the logits, and whether they
# multiply (1) or divide (-1), and caps. MPT has a logit_scale, too, that its model never looks at.
SCALES = {
    "logit_scale": 1,  # Cohere
    "lm_head_multiplier": 1,  # Falcon-H1
    "output_multiplier": 1,  # Muse
    "logits_scaling": -1,  # Granite, MiniCPM3
    "logits_mup_width_multiplier": -1,  # Inkling
}
MULTIPLY_BY_LOGITS_SCALING = ("hyperclovax",)
SOFTCAPS = (
    "final_logit_softcapping",  # Gemma, NanoChat, Muse
    "output_logit_soft_cap",  # xLSTM
    "logits_soft_cap",  # RecurrentGemma
)


def logit_settings(config: Any) -> tuple[dict[str, float], dict[str, float]]:
    """The scales and the softcaps that a (text) configuration names; of no effect: left out."""
    return _numbers(config, SCALES, idle=(0, 1)), _numbers(config, SOFTCAPS, idle=(0,))


def _numbers(config: Any, keys: Iterable[str], idle: tuple[int, ...]) -> dict[str, float]:
    values = {key: getattr(config, key, None) for key in keys}
    return {key: float(value) for key, value in values.items()
            if isinstance(value, (int, float)) and value not in idle}


def known_logit_transforms(config: Any) -> Iterator[LogitTransform]:
    """Nothing, or what the config names."""
    scales, softcaps = logit_settings(config)
    multiplies = config.model_type in MULTIPLY_BY_LOGITS_SCALING
    scale = math.prod((value ** (1 if multiplies else SCALES[key])
                       for key, value in scales.items()), start=1.0)
    yield IDENTITY
    yield LogitTransform(scale, next(iter(softcaps.values()), None))
