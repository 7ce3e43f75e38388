"""Every loss as its paper writes it: softmax, logs and sums, and autograd for the gradient.

It shares no code with the package on purpose, and it is only good in float64: in float32 these
forms lose their digits where student and teacher agree, which the tests show.
"""

from __future__ import annotations

import torch
from torch import Tensor


def softmax(logits: Tensor) -> Tensor:
    weights = (logits - logits.max(-1, keepdim=True).values).exp()
    return weights / weights.sum(-1, keepdim=True)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def entropy(logits: Tensor) -> Tensor:
    p = softmax(logits)
    return -(p * p.log()).sum(-1)


def taid_target(s: Tensor, u: Tensor, t: float) -> Tensor:
    return (1 - t) * s.detach() + t * u


def taid(s: Tensor, u: Tensor, t: float) -> Tensor:
    return kl(softmax(taid_target(s, u, t)), softmax(s))


def amid(s: Tensor, u: Tensor, t: float, alpha: float = 1.0) -> Tensor:
    """The generalised mean of order (1 - alpha) / 2 of detached student and teacher, normalised."""
    if alpha == 1:
        return taid(s, u, t)
    q, p, c = softmax(s).detach(), softmax(u), (1 - alpha) / 2
    mean = ((1 - t) * q**c + t * p**c) ** (1 / c)
    return kl(mean / mean.sum(-1, keepdim=True), softmax(s))


def todi(s: Tensor, u: Tensor) -> Tensor:
    q, p = softmax(s), softmax(u)
    w = torch.sigmoid((p / q).log()).detach()
    return (w * p * (p / q).log() + (1 - w) * q * (q / p).log()).sum(-1)


def entropy_switch(s: Tensor, u: Tensor, threshold: float = 0.8) -> Tensor:
    return torch.where(entropy(u) >= threshold, forward_kl(s, u), reverse_kl(s, u))


def forward_kl(s: Tensor, u: Tensor) -> Tensor:
    return kl(softmax(u), softmax(s))


def reverse_kl(s: Tensor, u: Tensor) -> Tensor:
    return kl(softmax(s), softmax(u))


def jsd(s: Tensor, u: Tensor, beta: float = 0.5) -> Tensor:
    if beta == 0:
        return forward_kl(s, u)
    if beta == 1:
        return reverse_kl(s, u)
    q, p = softmax(s), softmax(u)
    mixture = beta * p + (1 - beta) * q
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def skew_kl(s: Tensor, u: Tensor, lam: float = 0.1) -> Tensor:
    q, p = softmax(s), softmax(u)
    return kl(p, lam * p + (1 - lam) * q)


def skew_rkl(s: Tensor, u: Tensor, lam: float = 0.1) -> Tensor:
    q, p = softmax(s), softmax(u)
    return kl(q, lam * q + (1 - lam) * p)


def tvd(s: Tensor, u: Tensor) -> Tensor:
    return 0.5 * (softmax(u) - softmax(s)).abs().sum(-1)


def head_tokens(p: Tensor, mu: float) -> list[int]:
    """Most likely tokens first, as long as their joint mass is below mu; at least one."""
    order = sorted(range(len(p)), key=lambda token: -float(p[token]))
    head, mass = order[:1], float(p[order[0]])
    for token in order[1:]:
        mass += float(p[token])
        if mass >= mu:
            break
        head.append(token)
    return head


def head_share(s: Tensor, u: Tensor, mu: float) -> Tensor:
    """Share of the gap |p - q| that lies in the teacher's head, row by row."""
    p, q = softmax(u), softmax(s)
    shares = []
    for row_p, gap in zip(p, (p - q).abs(), strict=True):
        total = float(gap.sum())
        shares.append(float(gap[head_tokens(row_p, mu)].sum()) / total if total else 0.5)
    return torch.tensor(shares, dtype=s.dtype)


def adaptive_kl(s: Tensor, u: Tensor, mu: float = 0.5) -> Tensor:
    w = head_share(s.detach(), u, mu)
    return w * forward_kl(s, u) + (1 - w) * reverse_kl(s, u)


def alpha_beta(s: Tensor, u: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    """The definition and its four limits (Cichocki, Cruces and Amari, 2011)."""
    q, p = softmax(s), softmax(u)
    c = alpha + beta
    if alpha == 0 and beta == 0:
        terms = 0.5 * (p.log() - q.log()) ** 2
    elif beta == 0:
        terms = (p**alpha * (p / q).log() * alpha - p**alpha + q**alpha) / alpha**2
    elif alpha == 0:
        terms = (q**beta * (q / p).log() * beta - q**beta + p**beta) / beta**2
    elif c == 0:
        terms = ((q / p).log() * alpha + (p / q) ** alpha - 1) / alpha**2
    else:
        terms = -(p**alpha * q**beta - alpha / c * p**c - beta / c * q**c) / (alpha * beta)
    return terms.sum(-1)


def ce(s: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([-row[label].log() for row, label in zip(softmax(s), labels, strict=True)])


LOSSES = {
    "taid": taid,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_rkl": skew_rkl,
    "tvd": tvd,
    "adaptive_kl": adaptive_kl,
    "alpha_beta": alpha_beta,
    "amid": amid,
    "todi": todi,
    "entropy_switch": entropy_switch,
}


def loss_of(
    name: str, s: Tensor, u: Tensor, labels: Tensor, temperature: float = 1.0, **parameters: float
) -> Tensor:
    """The loss [N] in the dtype of `s`; cross-entropy knows neither teacher nor temperature."""
    focus, clip = parameters.pop("focus", 0.0), parameters.pop("clip", None)
    loss = ce(s, labels) if name == "ce" else \
        temperature**2 * LOSSES[name](s / temperature, u / temperature, **parameters)
    loss = loss * (1 - (-loss.detach()).exp()) ** focus
    return loss if clip is None else torch.minimum(loss, torch.tensor(clip, dtype=loss.dtype))


def value_and_gradient(
    name: str, s: Tensor, u: Tensor, labels: Tensor, temperature: float = 1.0, **parameters: float
) -> tuple[Tensor, Tensor]:
    """Loss [N] and its gradient [N, V] in the student's logits, both float64."""
    student = s.detach().double().requires_grad_()
    loss = loss_of(name, student, u.detach().double(), labels, temperature, **parameters)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), gradient
