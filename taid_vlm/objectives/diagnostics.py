"""How far apart two models are, per token: the figures that are logged and evaluated."""

from __future__ import annotations

import torch
from torch import Tensor

from taid_vlm.objectives.divergences import (
    _forward_terms,
    _reverse_terms,
    jsd,
    make_pair,
    row_chunks,
    upcast,
)

DIAGNOSTICS = ("kl", "reverse_kl", "teacher_entropy", "student_entropy", "agreement")
CLOSE_DIAGNOSTICS = (*DIAGNOSTICS, "jsd", "head_mass", "tail_mass", "teacher_head_mass",
                     "teacher_tail_mass")
HEAD = 10  # entries of the teacher's head
TAIL_PART = 5  # one in so many entries is in its tail: the 80th to 100th percentile by rank


@torch.no_grad()
def diagnose(
    student_logits: Tensor, teacher_logits: Tensor, closely: bool = False
) -> dict[str, Tensor]:
    """Per-token figures of student [N, K] against teacher [N, K] logits, each [N] float32.

    kl: KL(teacher || student), reverse_kl: KL(student || teacher), both entropies (all in nats),
    and agreement: 1.0 where both models' most likely entry is the same.

    Args:
        closely: also what costs a search for ranks. jsd: the Jensen-Shannon divergence in nats.
            head_mass and tail_mass: the student's probability on the teacher's 10 most likely
            entries, and on the fifth of all entries that it ranks last (the TAID paper's head and
            tail); teacher_head_mass and teacher_tail_mass: the teacher's own.

    Example:
        >>> import torch
        >>> from taid_vlm.objectives import diagnose
        >>> teacher = torch.tensor([[0.8, 0.2]]).log()
        >>> figures = diagnose(torch.tensor([[0.4, 0.6]]).log(), teacher)
        >>> {name: round(value.item(), 3) for name, value in figures.items()}  # nats, and a share
        {'kl': 0.335, 'reverse_kl': 0.382, 'teacher_entropy': 0.5, 'student_entropy': 0.673,
         'agreement': 0.0}
    """
    rows, names = student_logits.shape[0], CLOSE_DIAGNOSTICS if closely else DIAGNOSTICS
    out = {name: student_logits.new_zeros(rows, dtype=torch.float32) for name in names}
    for chunk in row_chunks(rows, student_logits.shape[1], student_logits.device.type):
        found = _diagnose_rows(student_logits[chunk], teacher_logits[chunk], closely)
        for name, values in found.items():
            out[name][chunk] = values.float()
    return out


def _diagnose_rows(s: Tensor, u: Tensor, closely: bool) -> dict[str, Tensor]:
    pair = make_pair(upcast(s), upcast(u))
    found = {
        "kl": _forward_terms(pair.log_q, pair.r).sum(-1),
        "reverse_kl": _reverse_terms(pair.log_q, pair.r).sum(-1),
        "teacher_entropy": entropy(pair.log_p),
        "student_entropy": entropy(pair.log_q),
        "agreement": s.argmax(-1) == u.argmax(-1),
    }
    if closely:
        found["jsd"] = jsd(pair)[0]
        head, tail = head_and_tail(u)
        q, p = pair.q, pair.log_p.exp()
        found |= {"head_mass": (q * head).sum(-1), "tail_mass": (q * tail).sum(-1),
                  "teacher_head_mass": (p * head).sum(-1), "teacher_tail_mass": (p * tail).sum(-1)}
    return found


def head_and_tail(logits: Tensor) -> tuple[Tensor, Tensor]:
    """How far every entry belongs to the head and to the tail of a model's ranks, both [n, K].

    1 inside, 0 outside. Entries that tie for the last places share them, so that the figures do
    not depend on the order in which equal logits (frequent in bfloat16) are sorted.
    """
    width = logits.shape[-1]
    return (_first_places(logits, min(HEAD, width)),
            _first_places(-logits, width // TAIL_PART))


def _first_places(x: Tensor, places: int) -> Tensor:
    """1 for the `places` largest of each row, a share where some tie for the last of them."""
    if places == 0:
        return torch.zeros_like(x)
    last = x.topk(places, sorted=False).values.amin(-1, keepdim=True)
    above, level = x > last, x == last
    left = places - above.sum(-1, keepdim=True)
    return above + level * (left / level.sum(-1, keepdim=True))


def entropy(log_p: Tensor) -> Tensor:
    """Entropy in nats [N] of log-probabilities [N, V]; 0 log 0 = 0."""
    return torch.special.entr(log_p.exp()).sum(-1)


@torch.no_grad()
def best_guess(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """How sure a model is of its most likely token, and whether that is the data's, both [N].

    Args:
        logits: [N, V]. labels: [N] token ids.

    Returns:
        confidence: its probability among all tokens; token_accuracy: 1.0 where it is the label.

    Example:
        >>> import torch
        >>> from taid_vlm.objectives import best_guess
        >>> best_guess(torch.tensor([[0.8, 0.2], [0.3, 0.7]]).log(), torch.tensor([0, 0]))
        {'confidence': tensor([0.8000, 0.7000]), 'token_accuracy': tensor([1., 0.])}
    """
    confidence = logits.new_zeros(len(logits), dtype=torch.float32)
    for rows in row_chunks(len(logits), logits.shape[1], logits.device.type):
        x = upcast(logits[rows])
        confidence[rows] = (x.amax(-1) - x.logsumexp(-1)).exp().float()
    return {"confidence": confidence, "token_accuracy": (logits.argmax(-1) == labels).float()}
