"""A divergence from sampled tokens alone: right on average over what the student samples."""

from __future__ import annotations

from torch import Tensor


def sampled_reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """The estimate k1 of KL(q || p) at tokens that were drawn from q, with the policy gradient
    (log q - log p) d log q (on-policy distillation as reinforcement learning has it; verl, TRL).

    Args:
        student, teacher: log q and log p of the sampled tokens, of one shape. No gradient reaches
            the teacher.

    Returns:
        log q - log p, in nats, of either sign. Over tokens weighed by q, its mean is KL(q || p) and
        its gradient's mean the reverse KL's gradient, for the mean of d log q itself is 0.

    Example:
        >>> import torch
        >>> from taid_vlm.objectives import sampled_reverse_kl
        >>> student = torch.tensor([0.5, 0.5]).log().requires_grad_()  # each drawn once
        >>> teacher = torch.tensor([0.8, 0.2]).log()
        >>> cost = sampled_reverse_kl(student, teacher)
        >>> [round(nats, 4) for nats in cost.tolist()], round(cost.mean().item(), 4)  # KL(q || p)
        ([-0.47, 0.9163], 0.2231)
    """
    cost = (student - teacher).detach()
    return cost + cost * (student - student.detach())
