"""The loss and the gradient of a step, computed apart: row by row, in float64, from the textbook.

Nothing is shared with any trainer: no collator, no padding, no chunks, no float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from bench.problem import TAID_T
from bench.step_rows import encode_alone, tokenizer_of
from bench.step_setup import ROLES, Pair
from taid_vlm.errors import TaidError


def reference(pair: Pair, objective: str, device: str = "cpu") -> dict[str, float]:
    """`loss`: the mean over the answer tokens of all rows; `grad_norm`: of all of the student's
    parameters, before clipping. Weights are the given ones, rounded as they are.

    Raises:
        TaidError: the pair does not share one vocabulary, so that there is no textbook.
    """
    student, teacher = (pair.models[role].double().to(device).eval() for role in ROLES)
    student.zero_grad()
    if objective != "ce":
        _check_vocabulary(pair)
    rows = [encode_alone(pair.processors["student"], row) for row in pair.rows]
    tokens = sum(len(answer) for _, answer in rows)
    total = 0.0
    for inputs, answer in rows:
        s = _answer_logits(student, inputs, len(answer), device)
        with torch.no_grad():
            u = s if objective == "ce" else _answer_logits(teacher, inputs, len(answer), device)
        loss = FORMULAS[objective](s, u, answer.to(device)).sum() / tokens
        loss.backward()
        total += loss.item()
    norms = [p.grad.norm() for p in student.parameters() if p.grad is not None]
    return {"loss": total, "grad_norm": float(torch.stack(norms).norm())}


def _check_vocabulary(pair: Pair) -> None:
    words = [tokenizer_of(processor).get_vocab() for processor in pair.processors.values()]
    rows = {model.get_output_embeddings().weight.shape[0] for model in pair.models.values()}
    if words[0] != words[1] or len(rows) > 1:
        raise TaidError("no reference: the two models have different vocabularies")


def _answer_logits(model: Any, inputs: dict[str, Tensor], answers: int, device: str) -> Tensor:
    """[answers, V] at the positions before the answer's tokens."""
    moved = {key: value.to(device, torch.float64 if value.is_floating_point() else value.dtype)
             for key, value in inputs.items()}
    return model(**moved, use_cache=False, logits_to_keep=answers + 1).logits[0, :-1]


# ----- the textbook: logits [n, V] of student and teacher, ids [n], to losses [n] -------------


def _cross_entropy(s: Tensor, u: Tensor, answer: Tensor) -> Tensor:
    return -log_softmax(s, -1).gather(1, answer[:, None])[:, 0]


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _forward_kl(s: Tensor, u: Tensor, answer: Tensor) -> Tensor:
    return _divergence(log_softmax(u, -1), log_softmax(s, -1))


def _reverse_kl(s: Tensor, u: Tensor, answer: Tensor) -> Tensor:
    return _divergence(log_softmax(s, -1), log_softmax(u, -1))


def _jsd(s: Tensor, u: Tensor, answer: Tensor) -> Tensor:
    log_p, log_q = log_softmax(u, -1), log_softmax(s, -1)
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    return (_divergence(log_p, log_m) + _divergence(log_q, log_m)) / 2


def _taid(s: Tensor, u: Tensor, answer: Tensor) -> Tensor:
    """At the schedule's start."""
    return _forward_kl(s, (1 - TAID_T) * s.detach() + TAID_T * u, answer)


FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "taid": _taid, "forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd,
    "ce": _cross_entropy,
}
