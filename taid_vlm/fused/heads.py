"""Output heads as the fused objective needs them: logits of a few rows, and their way back.

Logits of half-precision heads leave the matrix product in float32 on CUDA; on CPU, whose product
cannot, they are rounded as the models' own are, unless a call asks for float32 products there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from taid_vlm.fused.scratch import Scratch
from taid_vlm.models.head import IDENTITY, LogitTransform

BLOCK = 8192  # rows of a half-precision head's gradient that are added up at a time


class HeadPass(Protocol):
    """One head through all chunks of one call; `backward` follows the `logits` of its chunk.

    product: what the gradient in the last logits may be rounded to at once: the dtype of the
        product it goes into, unless something lies between.
    """

    product: torch.dtype

    def logits(self, x: Tensor) -> Tensor:
        """[n, H] -> [n, V]."""

    def backward(self, x: Tensor, gradient: Tensor, logits: Tensor, needs_x: bool) -> Tensor | None:
        """Adds up the parameters' gradients; the gradient in x, if it is needed.

        Args:
            gradient, logits: [n, V], the gradient in the logits; both may be overwritten.
        """

    def gradients(self) -> list[Tensor | None]:
        """One for each of the head's parameters; None where it is not wanted."""


@dataclass(frozen=True)
class Head:
    """A plain matrix: logits = transform(x @ weight.T + bias), weight [V, H], bias [V] or None.

    Args:
        weight: [V, H]. bias: [V].
        transform: what the model does to its logits: a scale, a softcap.

    Example:
        >>> import torch
        >>> from taid_vlm import Head
        >>> head = Head(torch.eye(3)[:, :2])  # 3 entries, hidden states of 2
        >>> head.rows
        3
        >>> head.open().logits(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2., 0.]])
    """

    weight: Tensor
    bias: Tensor | None = None
    transform: LogitTransform = IDENTITY

    @property
    def rows(self) -> int:
        return len(self.weight)

    @property
    def copies(self) -> int:
        """How many tensors of a chunk's logits it has in use at a time."""
        return 1 if self.transform.is_identity else 2

    @property
    def reuses_logits(self) -> bool:
        """Whether its way back needs no logits: their gradient may take their place."""
        return self.transform.is_identity

    def parameters(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def open(
        self, needs: Sequence[bool] = (), chunks: int = 1, dtype: torch.dtype | None = None,
        scratch: Scratch | None = None, float32_logits: bool = False,
    ) -> HeadPass:
        """Begin a call.

        Args:
            needs: which hidden states and parameters want a gradient, in this order; () for none.
            chunks: how many there will be.
            dtype: what autocast computes in; None for the parameters' own.
            scratch: where the logits are made, each chunk's in the place of the one before.
            float32_logits: not to be rounded to half precision on a CPU either.
        """
        return _MatrixPass(self, needs or [False] * 3, chunks, dtype or self.weight.dtype,
                           scratch or Scratch(), float32_logits)


class _MatrixPass:
    def __init__(
        self, head: Head, needs: Sequence[bool], chunks: int, dtype: torch.dtype, scratch: Scratch,
        float32_logits: bool,
    ) -> None:
        self.head, self.needs, self.dtype, self.scratch = head, needs[1:], dtype, scratch
        self.widened = float32_logits and dtype.itemsize < 4
        self.product = dtype if head.transform.is_identity else _wide(dtype)
        self.weight = head.weight.to(dtype)
        self.bias = None if head.bias is None else head.bias.to(dtype)
        self.weight_gradient: Tensor | None = None
        self.bias_gradient: Tensor | None = None
        # several chunks of half precision are added up in float32
        self.sum_dtype = _wide(head.weight.dtype) if chunks > 1 else head.weight.dtype

    def logits(self, x: Tensor) -> Tensor:
        x = self._cast(x)
        if _leaves_wide(x, self.weight):
            z = torch.mm(x, self.weight.T, out_dtype=torch.float32)
            z = z if self.bias is None else z.add_(self.bias)
            return self.head.transform.forward(z)
        z = self.scratch.take(len(x), self.head.rows, torch.float32 if self.widened else self.dtype,
                              x.device)
        if self.widened:
            _float32_product(x, self.weight, z)
            z = z if self.bias is None else z.add_(self.bias)
        elif self.bias is None:
            torch.mm(x, self.weight.T, out=z)
        else:
            torch.addmm(self.bias, x, self.weight.T, out=z)
        return self.head.transform.forward(z)

    def backward(self, x: Tensor, gradient: Tensor, logits: Tensor, needs_x: bool) -> Tensor | None:
        g = self.head.transform.backward(gradient, logits).to(self.dtype)
        if self.needs[0]:
            self._add_weight(g, self._cast(x))
        if self.bias is not None and self.needs[1]:
            total = g.sum(0, dtype=_wide(g.dtype))
            before = self.bias_gradient
            self.bias_gradient = total if before is None else before.add_(total)
        return g @ self.weight if needs_x else None

    def _cast(self, x: Tensor) -> Tensor:
        """Under autocast; elsewhere unequal types are the caller's error, as with any layer."""
        return x if self.dtype == self.head.weight.dtype else x.to(self.dtype)

    def _add_weight(self, g: Tensor, x: Tensor) -> None:
        first = self.weight_gradient is None
        if self.weight_gradient is None:
            self.weight_gradient = torch.empty_like(self.head.weight, dtype=self.sum_dtype)
        total = self.weight_gradient
        if total.dtype == g.dtype:
            total.addmm_(g.T, x, beta=0 if first else 1)  # 0: what is there is not read
            return
        for start in range(0, len(total), BLOCK):
            block = slice(start, start + BLOCK)
            rows = g[:, block].T
            part = (torch.mm(rows, x, out_dtype=torch.float32) if _leaves_wide(g, x)
                    else rows @ x)
            total[block] = part if first else total[block] + part

    def gradients(self) -> list[Tensor | None]:
        found = [self.weight_gradient, self.bias_gradient]
        return [_typed(g, p) if need else None
                for need, g, p in zip(self.needs, found, self.head.parameters(), strict=False)]


def _float32_product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [n, V] = x [n, H] @ weight.T [V, H] of half precision, in float32, a block of the weight
    at a time."""
    x = x.float()
    with _exact_units(weight.dtype):
        for start in range(0, len(weight), BLOCK):
            block = slice(start, start + BLOCK)
            torch.mm(x, weight[block].float().T, out=out[:, block])


@contextlib.contextmanager
def _exact_units(dtype: torch.dtype) -> Iterator[None]:
    """Let a CPU multiply float32 numbers that are bfloat16's in its bfloat16 units, where it has
    them: the products are exact, and are added up in float32."""
    mkldnn: Any = torch.backends.mkldnn
    matmul = mkldnn.matmul
    before = matmul.fp32_precision
    if dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _leaves_wide(x: Tensor, weight: Tensor) -> bool:
    """Whether their product can leave in float32 without being rounded first."""
    return x.is_cuda and x.dtype.itemsize < 4 and x.dtype == weight.dtype


class ModuleHead:
    """Any module as a head (LoRA, quantised): called per chunk, and differentiated by autograd.

    Args:
        module: takes [n, H], gives [n, V].
        rows: V.
        transform: what follows the module.
    """

    copies = 4  # of a low-rank head: the product, the update, its multiple, their sum
    reuses_logits = False  # the module may have saved them for its own way back

    def __init__(
        self, module: nn.Module, rows: int, transform: LogitTransform = IDENTITY
    ) -> None:
        self.module, self.rows, self.transform = module, rows, transform

    def parameters(self) -> list[Tensor]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def open(
        self, needs: Sequence[bool] = (), chunks: int = 1, dtype: torch.dtype | None = None,
        scratch: Scratch | None = None, float32_logits: bool = False,
    ) -> HeadPass:
        """Begin a call, see `Head.open`; its logits are of the module's own type."""
        return _ModulePass(self, needs, dtype)


class _ModulePass:
    def __init__(
        self, head: ModuleHead, needs: Sequence[bool], dtype: torch.dtype | None
    ) -> None:
        self.head, self.parameters, self.dtype = head, head.parameters(), dtype
        self.needs_graph, self.needs_x = any(needs), bool(needs) and needs[0]
        self.totals: list[Tensor | None] = [None] * len(self.parameters)

    def logits(self, x: Tensor) -> Tensor:
        autocast = torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not None)
        with autocast, torch.set_grad_enabled(self.needs_graph):
            x = x.detach().requires_grad_(self.needs_x)
            z = self.head.module(x)
        self.product = z.dtype if self.head.transform.is_identity else _wide(z.dtype)
        if self.needs_graph:
            self.x, self.z = x, z
        return self.head.transform.forward(z.detach())

    def backward(self, x: Tensor, gradient: Tensor, logits: Tensor, needs_x: bool) -> Tensor | None:
        g = self.head.transform.backward(gradient, logits).to(self.z.dtype)
        wanted = [self.x] * needs_x + self.parameters
        found = list(torch.autograd.grad(self.z, wanted, g, allow_unused=True))
        g_x = found.pop(0) if needs_x else None
        for index, part in enumerate(found):
            if part is not None:
                before = self.totals[index]
                # a copy: two parameters may be given one and the same gradient
                self.totals[index] = (part.to(_wide(part.dtype), copy=True)
                                      if before is None else before.add_(part))
        del self.x, self.z
        return g_x

    def gradients(self) -> list[Tensor | None]:
        return [_typed(g, p) for g, p in zip(self.totals, self.parameters, strict=True)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precisions, as `upcast`."""
    return torch.promote_types(dtype, torch.float32)


def _typed(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """Zero where no row reached the parameter, as with a plain sum over no rows."""
    return torch.zeros_like(parameter) if gradient is None else gradient.to(parameter.dtype)
