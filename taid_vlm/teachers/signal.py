"""What every teacher gives, wherever it runs.

N are the batch's aligned tokens of the teacher (`teacher_mask`), V the rows of its head. The three
forms of one signal, from the leanest exact one to what a server has: hidden states with their head
(exact, H numbers a token), logits (exact, V numbers), and the k most likely tokens with what is
left (2k + 1 numbers; `batch/sparse.py`). The objective does not know which teacher it came from.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from taid_vlm.batch.forward import Batch
from taid_vlm.batch.sparse import SparseSignal
from taid_vlm.fused.heads import Head, ModuleHead

__all__ = ["HiddenSignal", "SparseSignal", "Teacher", "most_likely"]


class HiddenSignal(NamedTuple):
    """hidden [N, H] and the head [V, H] behind it: together the whole distribution, exactly."""

    hidden: Tensor
    head: Head | ModuleHead


def most_likely(logits: Tensor, k: int, labels: Tensor | None = None) -> SparseSignal:
    """The k most likely tokens of logits [N, V] in float32, with the exact rest, and what the
    law says of `labels` [N]."""
    log_probs = logits.float().log_softmax(-1)
    top, ids = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
    own = None if labels is None else log_probs.gather(-1, labels[:, None])[:, 0]
    return SparseSignal(ids, top, log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1), own)


class Teacher(Protocol):
    """A frozen model's next-token laws at a batch's aligned positions.

    rows: V. top: the k that `sparse` takes where that is all there is; None of a teacher whose
    whole law is known. No method takes a gradient or moves random state.
    """

    @property
    def top(self) -> int | None: ...

    @property
    def rows(self) -> int: ...

    def logits(self, batch: Batch) -> Tensor:
        """[N, V]."""

    def hidden(self, batch: Batch) -> HiddenSignal | None:
        """None where the head is not known, so that hidden states do not say it all."""

    def sparse(self, batch: Batch, k: int) -> SparseSignal:
        """The k most likely tokens, with the exact rest."""
