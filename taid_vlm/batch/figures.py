"""What is reported of a batch, per token, from logits. Shapes: `forward.py`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from taid_vlm.alignment import Pairing, VocabularyMap
from taid_vlm.batch.forward import Batch
from taid_vlm.batch.losses import by_map, chunk_pair_logits, has_chunks, of_partners
from taid_vlm.objectives import best_guess, data_nll, diagnose


class Measured(NamedTuple):
    """A figure where it is defined: values [n], and which of the batch's N tokens they stand at
    (None: all of them, in order)."""

    values: Tensor
    tokens: Tensor | None = None


@torch.no_grad()
def token_figures(
    batch: Batch, student_logits: Tensor, teacher_logits: Tensor | None, pairing: Pairing | None,
    closely: bool = False,
) -> dict[str, Measured]:
    """What is reported, per token of the student: KL both ways, entropies, agreement, mass outside
    the shared vocabulary, both models' negative log-likelihood of the data, and, where there are
    chunks, the KL between the models' likelihoods of one.

    Args:
        closely: also what is worth its time in evaluation only: JSD (of chunks, too), the student's
            confidence in its most likely token and whether that is the data's, head and tail mass.
            Ranks are those of the entries that are compared: the rest, and a group of tokens of
            different tokenizers, count as one each. A chunk's likelihood has no ranks.
    """
    figures = {"nll": Measured(data_nll(student_logits, batch["labels"]))}
    if closely:
        figures |= {name: Measured(values)
                    for name, values in best_guess(student_logits, batch["labels"]).items()}
    if teacher_logits is None or pairing is None:
        return figures

    compare = functools.partial(compared_figures, closely=closely)
    compared = by_map(pairing, batch, student_logits, teacher_logits, compare)
    teacher_nll = data_nll(teacher_logits, batch["teacher_labels"])
    if not has_chunks(batch):
        return figures | {"teacher_nll": Measured(teacher_nll)} | {
            name: Measured(values) for name, values in compared.items()}
    return figures | at_tokens(batch, teacher_nll, compared) | chunk_figures(
        batch, chunk_pair_logits(batch, student_logits, teacher_logits), closely)


def at_tokens(
    batch: Batch, teacher_nll: Tensor, compared: Mapping[str, Tensor]
) -> dict[str, Measured]:
    """Where texts are split differently: figures of the teacher's tokens [N_teacher], and of the
    pairs [P], at the student's tokens."""
    return {"teacher_nll": Measured(_at_student(batch, teacher_nll))} | {
        name: Measured(values, batch["pair_student"]) for name, values in compared.items()}


def compared_figures(
    vocabulary: VocabularyMap, s: Tensor, u: Tensor, closely: bool = False
) -> dict[str, Tensor]:
    """Figures of student logits [n, V_student] against teacher logits [n, V_teacher]."""
    figures = diagnose(vocabulary.map_student(s), vocabulary.map_teacher(u), closely)
    return figures | vocabulary.unshared_mass(s, "student") | vocabulary.unshared_mass(u, "teacher")


def chunk_figures(
    batch: Batch, outcomes: tuple[Tensor, Tensor], closely: bool = False
) -> dict[str, Measured]:
    """Figures of both models' likelihoods of chunks, [chunks, 2] each."""
    figures = diagnose(*outcomes, closely)
    names = ("kl", "reverse_kl", "jsd") if closely else ("kl", "reverse_kl")
    return {f"chunk_{name}": Measured(figures[name], batch["chunk_last"]) for name in names}


def _at_student(batch: Batch, values: Tensor) -> Tensor:
    """Values of the teacher's tokens [N_teacher], summed up at the student's [N]: each one at its
    partner, or at the end of its chunk."""
    counts = batch["chunk_student"] < 0
    counts[batch["chunk_last"]] = True
    return of_partners(batch, values).where(counts, 0.0)
