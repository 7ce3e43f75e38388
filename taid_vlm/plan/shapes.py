"""Tensors without values: real models run on them, at the cost of their shapes alone.

Whole numbers, masks and small tables (positions, image grids, rotary frequencies) keep their
values, because shapes depend on them; all other floating-point tensors are torch's fake tensors.
So a model's own forward and backward run as they are, and ask for the memory that they would use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.initialization import no_init_weights

from taid_vlm.config.model import ModelSpec
from taid_vlm.models.loading import load_skeleton, weights_dtype

VALUES_UP_TO = 2**16  # entries of a floating-point tensor that is computed for real
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)

aten = torch.ops.aten
_COPIES = (aten._to_copy.default, aten.clone.default)
GROUPED_MM = aten._grouped_mm.default  # experts
DEVICE = torch.ops.prim.device.default  # asked so often that it must not take the long way


def device_of(tensor: Tensor) -> torch.device:
    """A tensor's device, without asking it."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


class Shapes(TorchDispatchMode):
    """While it is active, floating-point tensors are made without values."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the way around it costs time

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is DEVICE:
            return device_of(args[0])
        kwargs = kwargs or {}
        given = args  # most often a tensor stands among them, and no lists need be opened
        if not any(isinstance(x, FakeTensor) for x in given):
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(isinstance(x, FakeTensor) for x in given):
            if func is aten.index.Tensor:  # the shape depends on how much of a mask is true
                args = (args[0], [i for index in args[1] for i in _numbered(index)])
            if func is GROUPED_MM:
                return self._grouped(args, kwargs)
            with self.fake:
                return func(*args, **kwargs)
        if func._schema.is_mutable or func.is_view or (given and func in _COPIES):
            return func(*args, **kwargs)
        made = self._without_values(func, args, kwargs)
        return func(*args, **kwargs) if made is None else made

    def _without_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result as fake tensors, or None where its values matter."""
        try:
            with self.fake:
                made = func(*args, **kwargs)
        except NEEDS_VALUES:
            return None
        large = any(x.is_floating_point() and x.numel() > VALUES_UP_TO
                    for x in tree_leaves(made) if isinstance(x, Tensor))
        return made if large else None

    def _grouped(self, args: Any, kwargs: Any) -> Any:
        """A product of float32 experts, which torch has on a CPU but not for its fake tensors."""
        with self.fake:
            half = [x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x
                    for x in args]
            return GROUPED_MM(*half, **kwargs).to(args[0].dtype)

    def hollow(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Take the values of all parameters away, also of small ones; shared ones stay shared.

        The module cannot be moved or cast any more: torch would exchange its parameters for that.

        Args:
            dtype: what floating-point parameters become (default: what they are).
        """
        made: dict[int, nn.Parameter] = {}
        for inner in module.modules():
            for name, p in list(inner._parameters.items()):
                if p is not None:
                    if id(p) not in made:
                        made[id(p)] = self._empty(p, dtype)
                    inner._parameters[name] = made[id(p)]
        module._apply = lambda fn, recurse=True: module  # type: ignore[method-assign]

    def _empty(self, p: Tensor, dtype: torch.dtype | None) -> nn.Parameter:
        with self.fake:
            values = torch.empty(p.shape, dtype=dtype if dtype and p.is_floating_point()
                                 else p.dtype)
        return nn.Parameter(values, requires_grad=p.requires_grad)


def _numbered(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the places where it is true, one tensor per dimension."""
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return [index]
    return list(index.nonzero().unbind(1))


class _OnCpu(TorchFunctionMode):
    """What is asked for on the meta device is made on the CPU: there, numbers have values."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "meta":
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


def model_of_shapes(spec: ModelSpec, role: str, shapes: Shapes) -> Any:
    """The model that `load_model` would load, in its dtype and attention, without its values."""
    with shapes, _OnCpu(), no_init_weights():
        model = load_skeleton(spec, role)
        model.tie_weights()
        if spec.attn_implementation is not None:
            model.set_attn_implementation(spec.attn_implementation)
    dtype = weights_dtype(spec, role, model.config)
    shapes.hollow(model, None if dtype == "auto" else getattr(torch, dtype))
    return model
