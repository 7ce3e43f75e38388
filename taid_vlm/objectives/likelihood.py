"""Comparing likelihoods of the same bytes, for models whose tokens differ.

A chunk is a piece of an answer that teacher and student say in different tokens. Its probability
under a model is the product over its tokens (chain rule); "this chunk, or anything else" is then
a distribution over two outcomes, on which every loss of the package works unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from taid_vlm.objectives.divergences import row_chunks, upcast

CERTAIN = -1e-30  # log-probability nearest to 0: log(1 - p) and its gradient stay finite
LOG_HALF = -0.6931471805599453


def label_log_prob(logits: Tensor, labels: Tensor) -> Tensor:
    """log softmax(logits)[label], accurate to its own size also where it is nearly 0.

    Args:
        logits: [N, V]; differentiable.
        labels: [N] token ids.

    Returns:
        [N] nats, float32 (float64 for float64 logits).

    Example:
        >>> import torch
        >>> from taid_vlm.objectives import label_log_prob
        >>> label_log_prob(torch.tensor([[0.0, 0.0], [0.0, 30.0]]), torch.tensor([0, 1]))
        tensor([-6.9315e-01, -9.3576e-14])
    """
    return _LabelLogProb.apply(logits, labels)


class _LabelLogProb(torch.autograd.Function):
    """Through the log odds z = s_y - logsumexp(s without y): log p = -log(1 + e^-z).

    With the plain log-softmax, 1 - p of a confident model would be rounding noise, and the
    gradient of a chunk's loss divides by it.
    """

    @staticmethod
    def forward(ctx, logits, labels):  # type: ignore[no-untyped-def]
        others, odds = label_odds(logits, labels)
        ctx.save_for_backward(logits, labels, others, odds)
        return logsigmoid(odds)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        logits, labels, others, odds = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        add_label_gradient(gradient, logits, labels, others, odds, upstream)
        return gradient, None


def label_odds(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """logsumexp of all other logits, and the label's logit minus that: both [N], without gradient.
    """
    others, odds = (upcast(logits.new_empty(len(logits))) for _ in range(2))
    for rows in row_chunks(*logits.shape):
        s, y = upcast(logits[rows]), labels[rows, None]
        others[rows] = s.scatter(1, y, -torch.inf).logsumexp(-1)
        odds[rows] = s.gather(1, y)[:, 0] - others[rows]
    return others, odds


def add_label_gradient(
    gradient: Tensor, logits: Tensor, labels: Tensor, others: Tensor, odds: Tensor,
    upstream: Tensor,
) -> None:
    """Add the gradient of sum(upstream * `label_log_prob`) in the logits to `gradient` [N, V].

    Args:
        others, odds: of `label_odds`. upstream: [N].
    """
    weight = (upstream * torch.sigmoid(-odds))[:, None]
    for rows in row_chunks(*logits.shape):
        w = weight[rows]
        g = -(upcast(logits[rows]) - others[rows, None]).exp() * w
        g = torch.where(w == 0, 0.0, g).scatter(1, labels[rows, None], w)
        gradient[rows] += g.to(gradient.dtype)


def chunk_logits(log_prob: Tensor, chunk: Tensor, chunks: int) -> Tensor:
    """Two logits per chunk: log p(chunk) and log(1 - p(chunk)).

    Args:
        log_prob: [N] log-probabilities of tokens; differentiable.
        chunk: [N] which chunk each token belongs to; below 0 for none.
        chunks: how many chunks there are.

    Returns:
        [chunks, 2], normalised.

    Example:
        >>> import torch
        >>> from taid_vlm.objectives import chunk_logits
        >>> tokens = torch.tensor([0.5, 0.5, 0.9]).log()  # two tokens of a chunk, and one of none
        >>> chunk_logits(tokens, torch.tensor([0, 0, -1]), chunks=1).exp()
        tensor([[0.2500, 0.7500]])
    """
    index = torch.where(chunk < 0, chunks, chunk)  # no mask, whose size a GPU would be waited for
    total = log_prob.new_zeros(chunks + 1).index_add(0, index, log_prob)[:chunks]
    total = total.clamp(max=CERTAIN)
    return torch.stack([total, _log1mexp(total)], dim=-1)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, in the form that is accurate on either side of log(1/2)."""
    near = torch.log(-torch.expm1(x.clamp(min=LOG_HALF)))
    far = torch.log1p(-torch.exp(x.clamp(max=LOG_HALF)))
    return torch.where(x > LOG_HALF, near, far)
