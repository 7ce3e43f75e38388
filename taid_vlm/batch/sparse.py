"""Losses against a teacher that is known by k entries of its laws and the mass of all others.

Both models' laws are compared over k + 1 entries a token: the teacher's k, and the rest. That is
the exact coarse-graining of both, so a divergence over it is a lower bound of the one over the
whole vocabulary (data-processing inequality), and that itself where k is the vocabulary's size.
Nothing is said of how the rest is shared out, but it keeps the student from putting mass outside
of the k: without it (top-k renormalised) the student would be taught to put nothing there, a bias
that no number of steps removes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from taid_vlm.alignment import Pairing, VocabularyMap
from taid_vlm.batch.figures import Measured
from taid_vlm.batch.forward import Batch
from taid_vlm.batch.losses import by_map
from taid_vlm.config.objective import SAMPLED_RKL
from taid_vlm.errors import TaidError
from taid_vlm.objectives import (
    Objective,
    best_guess,
    data_nll,
    diagnose,
    label_log_prob,
    sampled_reverse_kl,
)
from taid_vlm.objectives.divergences import LOG_SMALLEST, row_chunks, upcast

# losses that mean over k + 1 entries what they mean over all, or need the own token's alone
SPARSE = ("taid", "forward_kl", "ce", SAMPLED_RKL)
ONE_SIDED, UNNAMED = -1, -2  # entries of teacher's tokens that the student lacks, and of padding


class SparseSignal(NamedTuple):
    """ids and log_probs [N, k] of the most likely tokens, most likely first, and log_rest [N], the
    log-probability of all others together (-inf where there are none).

    own: [N] log-probabilities of the data's tokens (`teacher_labels`), among the k or not; None
    where they are not known.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor
    own: Tensor | None = None

    def at(self, rows: Tensor) -> SparseSignal:
        """Of some of the tokens, without `own`."""
        return type(self)(*(part[rows] for part in self[:3]))


class EntrySignal(SparseSignal):
    """The same of entries that a pair compares, with their ids under its map (< 0: none)."""


class Draws(EntrySignal):
    """Entries with their share of the draws: a law on average only, so that nothing but a loss
    which is linear in it can be taken of them."""


def check_sparse(objective: Objective, teacher: str) -> None:
    """Raise TaidError for an objective that needs whole laws, or more than laws.

    Args:
        teacher: what the teacher is, for the message: "a served teacher".
    """
    problem = None
    if dense := [term.name for term in objective.terms if term.name not in SPARSE]:
        problem = f"'{dense[0]}' needs the teacher's whole distribution; use taid or forward_kl"
    elif objective.visual:
        problem = f"'{objective.visual[0].name}' needs the teacher's own features; take it out"
    elif objective.visual_advantage:
        problem = "token_weights would ask the teacher twice, with degraded images; take it out"
    elif objective.kd_temperature != 1 and objective.needs_teacher:
        problem = (f"kd_temperature = {objective.kd_temperature:g} would change how much the other "
                   "tokens weigh together, which only the whole distribution says; set it to 1")
    if objective.sampled is not None:
        check_sparse(objective.sampled, teacher)
    if problem is not None:
        raise TaidError(f"objective: {problem}. ({teacher} gives a few tokens of its laws only.)")


def check_one_by_one(pairing: Pairing, teacher: str) -> None:
    """Raise TaidError for a pair that splits texts differently: a piece's likelihood needs laws."""
    if pairing.has_chunks:
        raise TaidError(f"{teacher} gives its most likely tokens only, which cannot be compared "
                        "with a student that splits texts differently: take a student with the "
                        "teacher's tokenizer, or a teacher in this process.")


def sparse_losses(
    objective: Objective, batch: Batch, student_logits: Tensor, signal: SparseSignal,
    pairing: Pairing, t: float | None = None,
) -> dict[str, Tensor]:
    """As `losses.token_losses`: every term of the objective per token, {name: [N] nats}."""
    if objective.estimates:
        assert signal.own is not None  # a server says it of every token
        own = label_log_prob(student_logits, batch["labels"])
        return {SAMPLED_RKL: sampled_reverse_kl(own, signal.own.to(own))}
    return objective.on_data(student_logits, batch["labels"]) | _by_map(
        pairing, batch, student_logits, signal,
        lambda *law: objective.between(*sparse_pair(*law), t))


@torch.no_grad()
def sparse_figures(
    batch: Batch, student_logits: Tensor, signal: SparseSignal, pairing: Pairing,
    closely: bool = False,
) -> dict[str, Measured]:
    """As `figures.token_figures`, what can be known of it: kl and reverse_kl are over the k + 1
    entries, and so at most what they are over all; agreement is exact."""
    figures = {"nll": data_nll(student_logits, batch["labels"])}
    if closely:
        figures |= best_guess(student_logits, batch["labels"])
    if signal.own is not None:
        figures["teacher_nll"] = -signal.own
    if not isinstance(signal, Draws):
        figures |= _by_map(pairing, batch, student_logits, signal, _compared)
    return {name: Measured(values) for name, values in figures.items()}


def _by_map(
    pairing: Pairing, batch: Batch, student_logits: Tensor, signal: SparseSignal,
    compare: Callable[[VocabularyMap, Tensor, EntrySignal], dict[str, Tensor]],
) -> dict[str, Tensor]:
    rows = torch.arange(len(student_logits), device=student_logits.device)
    return by_map(pairing, batch, student_logits, rows, lambda vocabulary, s, rows: compare(
        vocabulary, s, as_entries(vocabulary, signal.at(rows))))


def _compared(
    vocabulary: VocabularyMap, student_logits: Tensor, signal: EntrySignal
) -> dict[str, Tensor]:
    """agreement: 1.0 where both models' most likely entry is the same; where padding is the
    teacher's most likely row it is none."""
    figures = diagnose(*sparse_pair(vocabulary, student_logits, signal))
    best = signal.ids[:, 0]
    if vocabulary.has_rest:
        best = torch.where(best == ONE_SIDED, vocabulary.width - 1, best)
    agreement = (vocabulary.map_student(student_logits).argmax(-1) == best).float()
    return {"kl": figures["kl"], "reverse_kl": figures["reverse_kl"], "agreement": agreement}


def sparse_pair(
    vocabulary: VocabularyMap, student_logits: Tensor, signal: SparseSignal
) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher over the k + 1 entries, both [N, k + 1], the rest last.

    Args:
        student_logits: [N, V_student]; differentiable.
    """
    entry, top, rest = as_entries(vocabulary, signal)[:3]
    student = top_and_rest(vocabulary.map_student(student_logits), entry)
    teacher = torch.cat([top, rest[:, None].to(top)], dim=-1)
    return student, teacher.clamp(min=LOG_SMALLEST)


def as_entries(vocabulary: VocabularyMap, signal: SparseSignal) -> EntrySignal:
    """What is known of a teacher's tokens as what is known of the entries that are compared.

    Tokens that only the teacher has count to the rest, where the student has tokens of its own to
    be the rest. Where it has none, the teacher is conditioned on the shared tokens, as always; of
    those outside of the k, all are then taken for shared. Rows that no token names are left out.
    """
    if isinstance(signal, EntrySignal):
        return signal
    if vocabulary.identity:
        return EntrySignal(*signal[:3])
    side = vocabulary.teacher
    known = sum(len(part) for part in (side.shared, side.rest, side.padding))
    table = torch.full((known,), UNNAMED, dtype=torch.long, device=signal.ids.device)
    table[side.shared] = torch.arange(len(side.shared), device=table.device)
    table[side.rest] = ONE_SIDED
    entry, rest = table[signal.ids], signal.log_rest
    if vocabulary.has_rest:
        moved = signal.log_probs.masked_fill(entry != ONE_SIDED, -torch.inf)
        rest = torch.cat([moved, rest[:, None].to(moved)], dim=-1).logsumexp(-1)
    return EntrySignal(entry, signal.log_probs.masked_fill(entry < 0, -torch.inf), rest)


def top_and_rest(logits: Tensor, entry: Tensor) -> Tensor:
    """Log-probabilities [N, k + 1] of some entries [N, k] of logits [N, W], and of all others
    together; differentiable."""
    out: Tensor = _TopAndRest.apply(logits, entry)
    return out


class _TopAndRest(torch.autograd.Function):
    """Log-probabilities [N, k + 1] of some entries [N, k] and of all others together, a few rows at
    a time: nothing as large as the logits is kept for backward but the logits themselves.

    An entry < 0 has none (the floor). The gradient takes the normaliser for a constant: what
    follows is a loss of the softmax, which does not change with it.
    """

    @staticmethod
    def forward(ctx, logits, entry):  # type: ignore[no-untyped-def]
        out = upcast(logits.new_empty(0)).new_empty(len(logits), entry.shape[1] + 1)
        for rows in row_chunks(*logits.shape):
            x, index = upcast(logits[rows]), entry[rows]
            top = x.gather(1, index.clamp(min=0)).masked_fill(index < 0, -torch.inf)
            rest = _others(x, index).logsumexp(-1, keepdim=True)
            out[rows] = torch.cat([top, rest], dim=-1) - x.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, entry)
        return out.clamp(min=LOG_SMALLEST)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        logits, entry = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in row_chunks(*logits.shape):
            index, g = entry[rows], upstream[rows]
            share = _others(upcast(logits[rows]), index).softmax(-1).nan_to_num(0.0)
            top = g[:, :-1].masked_fill(index < 0, 0.0)
            whole = (share * g[:, -1:]).scatter_add(1, index.clamp(min=0), top)
            gradient[rows] = whole.to(gradient.dtype)
        return gradient, None


def _others(x: Tensor, index: Tensor) -> Tensor:
    """Logits [n, V] with -inf at the entries [n, k] of each row; one < 0 is none."""
    taken = torch.zeros(len(x), x.shape[1] + 1, dtype=torch.bool, device=x.device)
    taken.scatter_(1, torch.where(index < 0, x.shape[1], index), True)
    return x.masked_fill(taken[:, :-1], -torch.inf)
