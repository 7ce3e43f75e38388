"""A teacher that is the student's base model, beneath its adapter.

One copy of the weights says what both say: the teacher is the base model without the student's
adapter, or with one of its own, which stands beside the student's, frozen and not saved.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from taid_vlm.batch.forward import Batch
from taid_vlm.errors import TaidError
from taid_vlm.fused.model_head import head_of
from taid_vlm.models.forward import Autocast, evaluation_mode, head_rows
from taid_vlm.models.head import LogitTransform, keeps_type
from taid_vlm.models.lora import TEACHER, add_teacher, inner_module, is_teachers
from taid_vlm.models.quantization import numel
from taid_vlm.teachers.local import LocalTeacher
from taid_vlm.teachers.signal import HiddenSignal


@dataclass
class TeacherInStudent:
    """For a DistillationTrainer: its teacher is `model`, the base of the student that it trains.

    adapter: folder of the teacher's own adapter, None for the base model as it is.
    empty: whether that adapter's weights are not read, but stay on the meta device.
    """

    model: PreTrainedModel
    adapter: Path | None = None
    empty: bool = False
    dtype: torch.dtype = field(init=False)  # before an adapter brings weights of another type

    def __post_init__(self) -> None:
        self.dtype = self.model.dtype

    def enter(self, student: Any) -> None:
        """Put the teacher's adapter beside that of the student, a PeftModel on `model`; raises
        TaidError for any other student, with which the teacher would move."""
        if not hasattr(student, "get_base_model") or student.get_base_model() is not self.model:
            raise TaidError("a TeacherInStudent is the base model of a student that trains an "
                            "adapter: give its model with a peft_config, or load the teacher.")
        if self.adapter is not None:
            add_teacher(student, self.adapter, self.empty)


class SharedTeacher(LocalTeacher):
    """The teacher inside of the student.

    Its passes move no random state, take no gradient, and leave modes and adapters as they were;
    which parameters have a gradient is never touched.
    """

    def __init__(self, shared: TeacherInStudent, accelerator: Accelerator | None = None) -> None:
        self.model = Beneath(shared.model, None if shared.adapter is None else TEACHER)
        self.autocast: Autocast = (
            contextlib.nullcontext if accelerator is None else accelerator.autocast)
        if keeps_type(shared.dtype):
            self.autocast = functools.partial(
                torch.autocast, shared.model.device.type, enabled=False)
        self.transform: LogitTransform | None = None

    @property
    def shared_parameters(self) -> int:
        """How many lie in memory once."""
        return sum(numel(p) for name, p in self.model.named_parameters() if not is_teachers(name))

    @torch.no_grad()
    def hidden(self, batch: Batch) -> HiddenSignal | None:
        """Hidden states, and the head without what the student adapts of it."""
        with self.model.teaching():
            signal = super().hidden(batch)
        if signal is None or self.transform is None:
            return None
        head = inner_module(self.model.module.get_output_embeddings())
        return signal._replace(head=head_of(head, head_rows(self.model), self.transform))


class Beneath(nn.Module):
    """A model without the student's adapter, with or without one of its own; what it is called or
    asked to generate, it does so.

    Args:
        model: a transformers model that peft has put layers into.
        adapter: the name of its own.
    """

    def __init__(self, model: PreTrainedModel, adapter: str | None) -> None:
        super().__init__()
        self.module: Any = model
        self._adapter = adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.teaching():
            return self.module(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.teaching():
            return self.module.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that take part: its own."""
        return ((name, p) for name, p in super().named_parameters(*args, **kwargs)
                if is_teachers(name) or ".lora_" not in name)

    @contextlib.contextmanager
    def teaching(self) -> Iterator[None]:
        """Inside, the model is the teacher; it may be entered more than once.

        peft's own switches would also say anew which adapters have a gradient, and forget what
        `freeze` has taken from them.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [layer for layer in self.module.modules() if isinstance(layer, BaseTunerLayer)]
        before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
        try:
            for layer in layers:
                layer._disable_adapters = self._adapter is None
                layer._active_adapter = [self._adapter]
            with evaluation_mode(self.module):
                yield
        finally:
            for layer, (disabled, active) in zip(layers, before, strict=True):
                layer._disable_adapters, layer._active_adapter = disabled, active
