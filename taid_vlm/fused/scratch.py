"""Memory that is used over and over."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Room for a chunk's logits, the same for all chunks of all calls.

    Pages of memory that are new cost a CPU as much time as the arithmetic on them. CUDA's
    allocator keeps by itself what was freed, so there every tensor is a new one.
    """

    def __init__(self) -> None:
        self._held: Tensor | None = None

    @property
    def kept(self) -> list[Tensor]:
        """What lies in memory between two calls."""
        return [] if self._held is None else [self._held]

    def take(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[rows, width], not initialised; what was taken before is overwritten."""
        if device.type == "cuda":
            return torch.empty(rows, width, dtype=dtype, device=device)
        held, self._held = self._held, None
        if held is None or (held.dtype, held.device) != (dtype, device) \
                or len(held) < rows * width:
            del held  # before the new one is made
            held = torch.empty(rows * width, dtype=dtype, device=device)
        self._held = held
        return held[: rows * width].view(rows, width)
