"""Losses that see but a few entries of the teacher's law, as a cache or a server has them.

Without the rest: what some trainers make of their top entries. With it, or drawn: as here
(`teachers/sparse.py`). Shapes: student and teacher logits [R, N, V]; losses [R, N] in nats.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from taid_vlm import divergence

KEPT = 4  # entries of a law, or draws from it

CutLoss = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def top_kl(s: Tensor, u: Tensor, _: torch.Generator) -> Tensor:
    """Forward KL from the likeliest entries, made a law of their own."""
    inside = torch.zeros_like(u, dtype=torch.bool).scatter(-1, _top(u), True)
    return divergence("forward_kl", s, u.masked_fill(~inside, -torch.inf))


def top_kl_rest(s: Tensor, u: Tensor, _: torch.Generator) -> Tensor:
    """Forward KL between the likeliest entries, all others together as one more."""
    return divergence("forward_kl", _with_rest(s, _top(u)), _with_rest(u, _top(u)))


def drawn_kl(s: Tensor, u: Tensor, generator: torch.Generator) -> Tensor:
    """Forward KL from draws (Anshumann et al., ACL 2025), up to a constant."""
    p = u.softmax(-1).flatten(0, -2).cpu()
    drawn = torch.multinomial(p, KEPT, True, generator=generator)
    share = torch.zeros_like(p).scatter_add_(-1, drawn, torch.full(drawn.shape, 1 / KEPT))
    return divergence("forward_kl", s, share.log().view_as(u).to(u.device))


def top_rkl(s: Tensor, u: Tensor, _: torch.Generator) -> Tensor:
    """What reverse KL sums up over the teacher's likeliest entries, and nothing of the others."""
    log_q, log_p = (x.log_softmax(-1).gather(-1, _top(u)) for x in (s, u))
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def top_rkl_rest(s: Tensor, u: Tensor, _: torch.Generator) -> Tensor:
    """Reverse KL between the likeliest entries, all others together as one more."""
    return divergence("reverse_kl", _with_rest(s, _top(u)), _with_rest(u, _top(u)))


def _top(u: Tensor) -> Tensor:
    return u.topk(KEPT, dim=-1).indices


def _with_rest(logits: Tensor, entries: Tensor) -> Tensor:
    """Logarithms of a law's `entries` and of all its others together, [..., KEPT + 1]."""
    kept = logits.gather(-1, entries)
    others = logits.scatter(-1, entries, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept, others], -1)


CUT_LOSSES: dict[str, CutLoss] = {loss.__name__: loss for loss in (
    top_kl, top_kl_rest, drawn_kl, top_rkl, top_rkl_rest)}
