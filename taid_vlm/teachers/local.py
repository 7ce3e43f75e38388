"""A teacher that is a model in this process."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from taid_vlm.batch.forward import Batch, teacher_forward
from taid_vlm.fused.model_head import find_logit_transform, output_head
from taid_vlm.models.forward import Autocast, answer_hidden, head_rows, unwrap
from taid_vlm.models.head import LogitTransform, keeps_type
from taid_vlm.teachers.placement import place
from taid_vlm.teachers.signal import HiddenSignal, SparseSignal, most_likely


class LocalTeacher:
    """`model`, frozen, in evaluation mode, on this process's device.

    Weights of half precision are computed with in their own type (`models.head.keeps_type`),
    whatever the student's mixed precision.

    Args:
        accelerator: places the model, and brings its mixed precision; without it the model stays
            as and where it is.
        sharding: over the accelerator's processes, see `teachers.placement`.
    """

    top: int | None = None

    def __init__(
        self, model: PreTrainedModel, accelerator: Accelerator | None = None,
        sharding: str = "replicate",
    ) -> None:
        model.requires_grad_(False).eval()
        self.is_sharded = sharding != "replicate"  # then no process asks it alone
        self.model: Any = model if accelerator is None else place(model, accelerator, sharding)
        self.autocast: Autocast = (
            contextlib.nullcontext if accelerator is None else accelerator.autocast)
        if keeps_type(model.dtype):
            self.autocast = functools.partial(torch.autocast, model.device.type, enabled=False)
            inner = unwrap(self.model)
            inner.forward = self.autocast()(inner.forward)
        self.transform: LogitTransform | None = None

    @property
    def rows(self) -> int:
        return head_rows(self.model)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """[N, V], see `Teacher`."""
        with self.autocast():
            return teacher_forward(self.model, batch)

    @torch.no_grad()
    def hidden(self, batch: Batch) -> HiddenSignal | None:
        """Hidden states and head; the first call finds out what stands behind the head."""
        model, inputs, mask = unwrap(self.model), batch["teacher_inputs"], batch["teacher_mask"]
        with self.autocast():
            if self.transform is None:
                self.transform = find_logit_transform(model, inputs, mask)
            if self.transform is None:
                return None
            return HiddenSignal(answer_hidden(model, inputs, mask),
                                output_head(model, self.transform))

    @torch.no_grad()
    def sparse(self, batch: Batch, k: int) -> SparseSignal:
        """The k most likely tokens in float32, see `Teacher`."""
        return most_likely(self.logits(batch), k, batch["teacher_labels"])
