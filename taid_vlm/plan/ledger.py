"""A ledger of memory: which tensors are alive, what they are for, and when they were most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taid_vlm.plan.shapes import DEVICE, device_of

STUDENT, TEACHER = "student parameters", "teacher parameters"
GRADIENTS, OPTIMIZER, BUCKETS = "gradients", "optimizer state", "gradient buckets"
GATHERED = "gathered weights, gradients"
CASTS = "autocast copies of weights"
STUDENT_TOWER, STUDENT_LANGUAGE = "student activations: vision", "student activations: language"
TEACHER_TOWER, TEACHER_LANGUAGE = "teacher activations: vision", "teacher activations: language"
LOSS = "logits and loss"
BACKWARD = "backward: recomputed, gradients"
SCRATCH = "optimizer scratch"
BATCH = "batch"
OVERHEAD = "framework"
KINDS = (STUDENT, GRADIENTS, OPTIMIZER, SCRATCH, BUCKETS, GATHERED, TEACHER, CASTS, STUDENT_TOWER,
         STUDENT_LANGUAGE, TEACHER_TOWER, TEACHER_LANGUAGE, LOSS, BACKWARD, BATCH, OVERHEAD)

_CAST = torch.ops.aten._to_copy.default


class Ledger(TorchDispatchMode):
    """While it is active, every storage that is made or freed is noted.

    kind: what new storages are for.
    live: bytes now, by kind; peak: the most they came to in sum; at_peak: `live` at that moment;
    most: the most of every kind, each at its own moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = BATCH
        self.live: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.peak, self.at_peak = 0, dict[str, int]()
        self._total = 0
        self._places: dict[int, list[Any]] = {}  # storage -> [weak reference, kind, bytes]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in Shapes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is DEVICE:
            return device_of(args[0])
        made = func(*args, **(kwargs or {}))
        kind = CASTS if func is _CAST and self._is_parameter(args[0]) else self.kind
        self.adopt((made,) if isinstance(made, Tensor) else tree_leaves(made), kind)
        return made

    def adopt(self, values: Iterable[Any], kind: str) -> None:
        """Note the storages of those values that are tensors and not yet known."""
        for value in values:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._places:
                    self._enter(storage, kind)

    def relabel(self, tensor: Tensor, kind: str) -> None:
        """Say that a tensor is for something else than it was made for."""
        place = self._places.get(tensor.untyped_storage()._cdata)
        if place is not None and place[1] != kind:
            self.live[place[1]] -= place[2]
            place[1] = kind
            self._add(kind, place[2], 0)

    def _enter(self, storage: Any, kind: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._places[key] = [ref(storage, partial(self._leave, key)), kind, size]
        self._add(kind, size, size)

    def _leave(self, key: int, _: Any) -> None:
        _, kind, size = self._places.pop(key)
        self.live[kind] -= size
        self._total -= size

    def _add(self, kind: str, size: int, new: int) -> None:
        self.live[kind] += size
        self._total += new
        self.most[kind] = max(self.most[kind], self.live[kind])
        if self._total > self.peak:
            self.peak, self.at_peak = self._total, dict(self.live)

    def _is_parameter(self, value: Any) -> bool:
        place = self._places.get(value.untyped_storage()._cdata)
        return place is not None and place[1] in (STUDENT, TEACHER)
