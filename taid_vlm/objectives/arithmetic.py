"""Elementary functions that keep their digits in eager and in compiled loops alike."""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 128  # entries that a compiled sum adds up before it adds up their sums


def row_sum(x: Tensor) -> Tensor:
    """Sum over the entries of each row, [N, V] -> [N].

    A compiled loop adds up a long row one after the other, which costs digits (1e-5 over 150,000
    entries); there it is done in two stages.
    """
    if not torch.compiler.is_compiling():
        return x.sum(-1)
    blocks = x.shape[-1] // LANES
    head, tail = x[:, : blocks * LANES], x[:, blocks * LANES :]
    return head.unflatten(-1, (blocks, LANES)).sum(-1).sum(-1) + tail.sum(-1)


def row_logsumexp(x: Tensor) -> Tensor:
    """[N, V] -> [N, 1]."""
    if not torch.compiler.is_compiling():
        return x.logsumexp(-1, keepdim=True)
    top = x.amax(-1, keepdim=True)
    return top + row_sum((x - top).exp())[:, None].log()


def expm1(x: Tensor) -> Tensor:
    """e^x - 1 with all digits; compiled loops have exp and a polynomial at half expm1's price."""
    if x.dtype != torch.float32 or not torch.compiler.is_compiling():
        return torch.expm1(x)
    near = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (
        1 / 120 + x * (1 / 720 + x * (1 / 5040 + x / 40320)))))))
    return torch.where(x.abs() < 0.5, near, x.exp() - 1)


def log1p(x: Tensor) -> Tensor:
    """log(1 + x) with all digits, x finite; compiled loops have log1p only one by one, at twenty
    times the price of a logarithm and what 1 + x rounds away (Kahan)."""
    if x.dtype != torch.float32 or not torch.compiler.is_compiling():
        return torch.log1p(x)
    rounded = 1 + x
    return torch.where(rounded == 1, x, rounded.log() * (x / (rounded - 1)))
