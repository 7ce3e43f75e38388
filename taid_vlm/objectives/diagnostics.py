"""How far apart two models are, per token: the figures that are logged and evaluated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from taid_vlm.objectives.arithmetic import row_sum
from taid_vlm.objectives.compiling import row_groups, should_compile
from taid_vlm.objectives.divergences import (
    LOG_SMALLEST,
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
SCRATCH = 4  # float32 [n, V] that compiled sums have in use at a time, about
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
    measure, groups = _way(student_logits)
    for chunk in groups:
        found = _diagnose_rows(student_logits[chunk], teacher_logits[chunk], closely, measure)
        for name, values in found.items():
            out[name][chunk] = values.float()
    return out


def _way(logits: Tensor) -> tuple[Callable[..., dict[str, Tensor]], Iterator[slice]]:
    """How rows are measured, and how many at a time: on a CPU compiled, where there are many."""
    (rows, width), device = logits.shape, logits.device.type
    known = _is_on_cpu(logits) and rows > 1 and logits.dtype != torch.float64
    if known and should_compile(rows * width, device):
        return _compiled_sums, row_groups(rows, width, device, SCRATCH)
    return _sums, row_chunks(rows, width, device)


def _is_on_cpu(x: Tensor) -> bool:
    """Whether it has its values there: a rehearsal's tensors have none."""
    return type(x) is Tensor and x.device.type == "cpu"


def _diagnose_rows(
    s: Tensor, u: Tensor, closely: bool, measure: Callable[..., dict[str, Tensor]]
) -> dict[str, Tensor]:
    s, u = upcast(s), upcast(u)
    limits = rank_limits(u) if closely else ()
    return {**measure(s, u, *limits), "agreement": s.argmax(-1) == u.argmax(-1)}


def _sums(s: Tensor, u: Tensor, *limits: Tensor) -> dict[str, Tensor]:
    """What is added up over the entries of each row, [n] each.

    Args:
        limits: of the teacher's head and tail, for the figures that are measured closely.
    """
    pair = make_pair(s, u)
    q, p = pair.q, pair.log_p.exp()
    found = {
        "kl": row_sum(_forward_terms(pair.log_q, pair.r)),
        "reverse_kl": row_sum(_reverse_terms(pair.log_q, pair.r)),
        "teacher_entropy": row_sum(_entropy_terms(pair.log_p, p)),
        "student_entropy": row_sum(_entropy_terms(pair.log_q, q)),
    }
    if limits:
        found["jsd"] = jsd(pair)[0]
        for name, places in zip(("head", "tail"), rank_places(u.shape[-1]), strict=True):
            x, limit = (u, limits[0]) if name == "head" else (-u, limits[1])
            found |= _masses(name, x, limit, places, q, p)
    return found


@functools.cache
def _compiler() -> Callable[..., dict[str, Tensor]]:
    return torch.compile(_sums, dynamic=True)


def _compiled_sums(s: Tensor, u: Tensor, *limits: Tensor) -> dict[str, Tensor]:
    """`_sums` in a few passes over the rows; compiled once for every width."""
    for logits in (s, u):
        torch._dynamo.mark_static(logits, 1)
    return _compiler()(s, u, *limits)


def rank_places(width: int) -> tuple[int, int]:
    """Entries in the head and in the tail of a model's ranks, of `width` ones."""
    return min(HEAD, width), width // TAIL_PART


def rank_limits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The last entry of the head, and the last of the tail with its sign turned, [n, 1] each."""
    head, tail = rank_places(logits.shape[-1])
    # numpy's search, in one thread, is ten times as fast as one thread of torch's
    if _is_on_cpu(logits) and torch.get_num_threads() < 10:
        values = logits.detach().numpy()
        largest, smallest = (torch.from_numpy(np.partition(values, place, axis=-1)[:, place, None])
                             for place in (logits.shape[-1] - head, max(tail, 1) - 1))
        return largest, -smallest
    largest, smallest = (x.topk(places, sorted=False).values.amin(-1, keepdim=True)
                         for x, places in ((logits, head), (-logits, max(tail, 1))))
    return largest, smallest


def _masses(
    name: str, x: Tensor, last: Tensor, places: int, q: Tensor, p: Tensor
) -> dict[str, Tensor]:
    """Probability on the `places` largest of each row of x [n, K], `last` [n, 1] being the last.

    Entries that tie for the last places share them, so that the figures do not depend on the order
    in which equal logits (frequent in bfloat16) are sorted.
    """
    above, level = x > last, x == last
    left = places - row_sum(above.to(q.dtype))
    share = left / row_sum(level.to(q.dtype))
    return {key: row_sum(torch.where(above, mass, 0.0)) + share * row_sum(
        torch.where(level, mass, 0.0)) for key, mass in ((f"{name}_mass", q),
                                                         (f"teacher_{name}_mass", p))}


def _entropy_terms(log_p: Tensor, p: Tensor) -> Tensor:
    """-p log p; 0 log 0 = 0."""
    return torch.where(p == 0, 0.0, -p * log_p)


@torch.no_grad()
def data_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] in nats, [N] float32 (float64 for float64 logits): what
    `divergence("ce")` is, without what its gradient costs.

    Args:
        logits: [N, V]. labels: [N] token ids.

    Example:
        >>> import torch
        >>> from taid_vlm.objectives import data_nll
        >>> data_nll(torch.tensor([[0.8, 0.2]]).log(), torch.tensor([1]))
        tensor([1.6094])
    """
    nll = upcast(logits.new_empty(len(logits)))
    for rows in row_chunks(len(logits), logits.shape[1], logits.device.type):
        x = upcast(logits[rows])
        nll[rows] = x.logsumexp(-1) - x.gather(-1, labels[rows, None])[:, 0]
    return nll.masked_fill(nll == torch.inf, -LOG_SMALLEST)


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
