"""How far apart two models are, per token: the figures that are logged and evaluated."""

from __future__ import annotations

import torch
from torch import Tensor

from taid_vlm.objectives.divergences import (
    _forward_terms,
    _reverse_terms,
    make_pair,
    row_chunks,
    upcast,
)

DIAGNOSTICS = ("kl", "reverse_kl", "teacher_entropy", "student_entropy", "agreement")


@torch.no_grad()
def diagnose(student_logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
    """Per-token figures of student [N, K] against teacher [N, K] logits, each [N] float32.

    kl: KL(teacher || student), reverse_kl: KL(student || teacher), both entropies (all in nats),
    and agreement: 1.0 where both models' most likely entry is the same.
    """
    rows = student_logits.shape[0]
    out = {name: student_logits.new_zeros(rows, dtype=torch.float32) for name in DIAGNOSTICS}
    for chunk in row_chunks(*student_logits.shape):
        for name, values in _diagnose_rows(student_logits[chunk], teacher_logits[chunk]).items():
            out[name][chunk] = values.float()
    return out


def _diagnose_rows(s: Tensor, u: Tensor) -> dict[str, Tensor]:
    pair = make_pair(upcast(s), upcast(u))
    return {
        "kl": _forward_terms(pair.log_q, pair.r).sum(-1),
        "reverse_kl": _reverse_terms(pair.log_q, pair.r).sum(-1),
        "teacher_entropy": entropy(pair.log_p),
        "student_entropy": entropy(pair.log_q),
        "agreement": s.argmax(-1) == u.argmax(-1),
    }


def entropy(log_p: Tensor) -> Tensor:
    """Entropy in nats [N] of log-probabilities [N, V]; 0 log 0 = 0."""
    return torch.special.entr(log_p.exp()).sum(-1)
