"""The implementations that are compared, each as its users would call it.

An implementation is a function `Case -> Loss`: it imports what it needs, refuses what it cannot do
with an error, and returns a function from a `Problem` to the mean loss over the answers, on which
`backward` is called. Numbers are the defaults of each library unless said otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax, softmax

from bench.problem import TAID_T, Case, Problem
from taid_vlm.errors import TaidError
from taid_vlm.fused.divergence import FusedDivergence
from taid_vlm.fused.heads import Head
from taid_vlm.objectives import parse_objective

Loss = Callable[[Problem], Tensor]
# TRL's and Liger's one family of losses; beta is 0 for the forward and 1 for the reverse KL
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def ours(case: Case, float32_logits: bool = False) -> Loss:
    """`taid_vlm.fused.divergence.FusedDivergence` on the answers alone."""
    fused = FusedDivergence(parse_objective(case.objective), memory_budget=case.memory_budget,
                            float32_logits=float32_logits)
    t = TAID_T if case.objective == "taid" else None

    def loss(problem: Problem) -> Tensor:
        student, teacher = problem.student_hidden, problem.teacher_hidden
        if len(problem.answers) < len(student):
            student, teacher = student[problem.answers], teacher[problem.answers]
        total = fused(student, Head(problem.student_head), teacher, Head(problem.teacher_head),
                      t=t).loss
        return total / len(problem.answers)

    return loss


def ours_float32(case: Case) -> Loss:
    """The same with the logits of half-precision heads in float32 on a CPU (`loss_logits`)."""
    if case.dtype == torch.float32 or case.device == "cuda":
        raise TaidError("is `ours` in float32, and on CUDA")
    return ours(case, float32_logits=True)


def naive(case: Case) -> Loss:
    """All logits of both models, float32 softmaxes, autograd: as the public TAID code does."""

    def loss(problem: Problem) -> Tensor:
        s, u = _logits(problem)
        per_token = FORMULAS[case.objective](s, u)
        return (per_token * problem.mask).sum() / problem.mask.sum()

    return loss


def trl(case: Case) -> Loss:
    """What TRL's DistillationTrainer computes: tiles, both projections again in backward."""
    beta = _beta(case)
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(problem: Problem) -> Tensor:
        return _chunked_divergence_loss(
            problem.student_hidden[None], problem.teacher_hidden[None], problem.student_head,
            problem.teacher_head, problem.mask[None], beta)[0]

    return loss


def gkd(case: Case) -> Loss:
    """TRL's GKDTrainer: materialised logits, log-softmaxes in their own type."""
    beta = _beta(case)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    def loss(problem: Problem) -> Tensor:
        s, u = _logits(problem)
        return GKDTrainer.generalized_jsd_loss(
            s[None], u[None], labels=problem.labels[None], beta=beta)

    return loss


def liger(case: Case) -> Loss:
    """Liger's chunked JSD: torch.compile around chunks of tokens, on any device."""
    beta = _beta(case)
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    jsd = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
    return lambda problem: jsd(problem.student_hidden, problem.student_head,
                               problem.teacher_hidden, problem.teacher_head, problem.labels)


def liger_triton(case: Case) -> Loss:
    """Liger's fused linear JSD with Triton kernels, for GPUs only."""
    beta = _beta(case)
    if case.device == "cpu":
        raise TaidError("needs a GPU (Triton kernels)")
    from liger_kernel.transformers import LigerFusedLinearJSD

    jsd = LigerFusedLinearJSD(jsd_beta=beta)
    return lambda problem: jsd(problem.student_hidden, problem.student_head,
                               problem.teacher_hidden, problem.teacher_head, problem.labels)


IMPLEMENTATIONS: dict[str, Callable[[Case], Loss]] = {
    "ours": ours, "ours_float32": ours_float32, "naive": naive, "trl": trl, "gkd": gkd,
    "liger": liger, "liger_triton": liger_triton,
}


def _beta(case: Case) -> float:
    if case.objective not in BETAS:
        raise TaidError(f"has no {case.objective}")
    return BETAS[case.objective]


def _logits(problem: Problem) -> tuple[Tensor, Tensor]:
    """Both models' logits [P, V] at all positions; the teacher's without gradient."""
    s = linear(problem.student_hidden, problem.student_head)
    with torch.no_grad():
        return s, linear(problem.teacher_hidden, problem.teacher_head)


# ----- the textbook, from logits [N, V] to losses [N] up to what has no gradient ---------------


def _softmaxes(s: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, log q, p, log p in float32 (float64 for float64 logits)."""
    dtype = torch.promote_types(s.dtype, torch.float32)
    return (softmax(s, -1, dtype=dtype), log_softmax(s, -1, dtype=dtype),
            softmax(u, -1, dtype=dtype), log_softmax(u, -1, dtype=dtype))


def _cross_entropy(target: Tensor, s: Tensor) -> Tensor:
    """-sum(softmax(target) log q), which is the KL up to the target's own entropy."""
    dtype = torch.promote_types(s.dtype, torch.float32)
    p, log_q = softmax(target, -1, dtype=dtype), log_softmax(s, -1, dtype=dtype)
    return -(p * log_q).masked_fill(s.isinf(), 0).sum(-1)


def _taid(s: Tensor, u: Tensor) -> Tensor:
    return _cross_entropy((1 - TAID_T) * s.detach() + TAID_T * u, s)


def _forward_kl(s: Tensor, u: Tensor) -> Tensor:
    return _cross_entropy(u, s)


def _reverse_kl(s: Tensor, u: Tensor) -> Tensor:
    q, log_q, _, log_p = _softmaxes(s, u)
    return (q * (log_q - log_p)).sum(-1)


def _jsd(s: Tensor, u: Tensor) -> Tensor:
    q, log_q, p, log_p = _softmaxes(s, u)
    log_m = (0.5 * p + 0.5 * q).log()
    return 0.5 * (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1)


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "taid": _taid, "forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd,
}
