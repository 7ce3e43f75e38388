"""One batch through both models: per-token losses and figures. The trainer and the plain loop
share this file, so that what is trained is written once.

N are the student's tokens that take part. Each of them has one partner of the teacher's, unless
the models split text differently: then the batch says which have one (`pair_student`,
`pair_teacher`), and which tokens of either model form a chunk (`chunk_student`, `chunk_teacher`);
a chunk's loss and figures stand at its last token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from taid_vlm.alignment import Pairing, VocabularyMap
from taid_vlm.models import answer_logits
from taid_vlm.objectives import (
    Objective,
    advantage_weight,
    best_guess,
    chunk_logits,
    diagnose,
    divergence,
    label_log_prob,
)

Batch = Mapping[str, Any]


class Measured(NamedTuple):
    """A figure where it is defined: values [n], and which of the batch's N tokens they stand at
    (None: all of them, in order)."""

    values: Tensor
    tokens: Tensor | None = None


@torch.no_grad()
def teacher_forward(teacher: nn.Module, batch: Batch) -> Tensor:
    """Teacher logits [N_teacher, V_teacher] at the aligned positions; no gradient, no state."""
    return answer_logits(teacher, batch["teacher_inputs"], batch["teacher_mask"])


def student_forward(student: nn.Module, batch: Batch) -> Tensor:
    """Student logits [N, V_student] at the aligned positions."""
    return answer_logits(student, batch["student_inputs"], batch["student_mask"])


def token_losses(
    objective: Objective,
    batch: Batch,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    pairing: Pairing | None,
    t: float | None = None,
) -> dict[str, Tensor]:
    """Every term of the objective per token of the student, {name: [N] nats}.

    `teacher_logits` and `pairing` may be None if no term needs a teacher. A token inside a chunk
    has no loss of its own against the teacher (0); the chunk's last one holds it.
    """
    losses = objective.on_data(student_logits, batch["labels"])
    if teacher_logits is not None and pairing is not None and objective.needs_teacher:
        losses |= _against_teacher(objective, batch, student_logits, teacher_logits, pairing, t)
    return losses


def advantage_weights(
    strength: float, batch: Batch, seeing: Tensor, unseeing: Callable[[Batch], Tensor]
) -> Tensor:
    """How much every token of the student counts [N], by what the teacher sees for it.

    All of a chunk weighs what the sum over its teacher's tokens says; tokens of records without an
    image weigh 1.

    Args:
        seeing: the teacher's negative log-likelihood of its tokens [N_teacher].
        unseeing: the same of another batch: this one, in which only the teacher's pixels differ.
    """
    degraded = batch["teacher_degraded"]
    if not degraded:
        return seeing.new_ones(len(batch["labels"]), dtype=torch.float32)
    blind = {**batch, "teacher_inputs": {**batch["teacher_inputs"], **degraded}}
    gain = unseeing(blind) - seeing
    if _has_chunks(batch):
        gain = _of_partners(batch, gain)
    return advantage_weight(gain, strength).where(batch["images"][batch["row"]] > 0, 1.0)


def compared_tokens(batch: Batch) -> Tensor | None:
    """Those of the student's N tokens that have a loss against the teacher (None: all)."""
    if not _has_chunks(batch):
        return None
    return torch.cat([batch["pair_student"], batch["chunk_last"]]).unique()


def _of_partners(batch: Batch, values: Tensor) -> Tensor:
    """Values of the teacher's tokens [N_teacher] as the student's [N] see them: the sum over its
    chunk, or else the partner's."""
    chunks = len(batch["chunk_last"]) + 1  # the last one holds what is in no chunk (-1)
    total = values.new_zeros(chunks).index_add(0, batch["chunk_teacher"] % chunks, values)
    single = values.new_zeros(len(batch["labels"])).index_copy(
        0, batch["pair_student"], values[batch["pair_teacher"]])
    return torch.where(batch["chunk_student"] < 0, single, total[batch["chunk_student"]])


def _against_teacher(
    objective: Objective, batch: Batch, student_logits: Tensor, teacher_logits: Tensor,
    pairing: Pairing, t: float | None,
) -> dict[str, Tensor]:
    def compare(vocabulary: VocabularyMap, s: Tensor, u: Tensor) -> dict[str, Tensor]:
        return objective.between(vocabulary.map_student(s), vocabulary.map_teacher(u), t)

    losses = _by_map(pairing, batch, student_logits, teacher_logits, compare)
    if not _has_chunks(batch):
        return losses
    tokens = len(student_logits)
    chunks = objective.between(*_chunk_logits(batch, student_logits, teacher_logits), t)
    return {name: values.new_zeros(tokens).index_add(0, batch["pair_student"], values)
            .index_add(0, batch["chunk_last"], chunks[name]) for name, values in losses.items()}


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
    figures = {"nll": Measured(divergence("ce", student_logits, None, labels=batch["labels"]))}
    if closely:
        figures |= {name: Measured(values)
                    for name, values in best_guess(student_logits, batch["labels"]).items()}
    if teacher_logits is None or pairing is None:
        return figures

    compare = functools.partial(compared_figures, closely=closely)
    compared = _by_map(pairing, batch, student_logits, teacher_logits, compare)
    theirs = divergence("ce", teacher_logits, None, labels=batch["teacher_labels"])
    if not _has_chunks(batch):
        return figures | {"teacher_nll": Measured(theirs)} | {
            name: Measured(values) for name, values in compared.items()}
    return figures | {"teacher_nll": Measured(_at_student(batch, theirs))} | {
        name: Measured(values, batch["pair_student"]) for name, values in compared.items()
    } | _chunk_figures(batch, student_logits, teacher_logits, closely)


def compared_figures(
    vocabulary: VocabularyMap, s: Tensor, u: Tensor, closely: bool = False
) -> dict[str, Tensor]:
    """Figures of student logits [n, V_student] against teacher logits [n, V_teacher]."""
    found = diagnose(vocabulary.map_student(s), vocabulary.map_teacher(u), closely)
    return found | vocabulary.unshared_mass(s, "student") | vocabulary.unshared_mass(u, "teacher")


def _chunk_figures(batch: Batch, s: Tensor, u: Tensor, closely: bool) -> dict[str, Measured]:
    figures = diagnose(*_chunk_logits(batch, s, u), closely)
    names = ("kl", "reverse_kl", "jsd") if closely else ("kl", "reverse_kl")
    return {f"chunk_{name}": Measured(figures[name], batch["chunk_last"]) for name in names}


def _has_chunks(batch: Batch) -> bool:
    return "chunk_last" in batch


def _chunk_logits(batch: Batch, s: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Student's and teacher's [chunks, 2]."""
    count = len(batch["chunk_last"])
    return (_of_chunks(s, batch["labels"], batch["chunk_student"], count),
            _of_chunks(u, batch["teacher_labels"], batch["chunk_teacher"], count))


def _of_chunks(logits: Tensor, labels: Tensor, chunk: Tensor, count: int) -> Tensor:
    inside = (chunk >= 0).nonzero()[:, 0]
    return chunk_logits(label_log_prob(logits[inside], labels[inside]), chunk[inside], count)


def _at_student(batch: Batch, values: Tensor) -> Tensor:
    """Values of the teacher's tokens [N_teacher], summed up at the student's [N]: each one at its
    partner, or at the end of its chunk."""
    counts = batch["chunk_student"] < 0
    counts[batch["chunk_last"]] = True
    return _of_partners(batch, values).where(counts, 0.0)


Compare = Callable[[VocabularyMap, Tensor, Tensor], dict[str, Tensor]]


def _by_map(
    pairing: Pairing, batch: Batch, student_logits: Tensor, teacher_logits: Tensor, compare: Compare
) -> dict[str, Tensor]:
    """Run `compare` on the pairs of tokens, under each one's vocabulary map."""
    if _has_chunks(batch):
        student_logits = student_logits[batch["pair_student"]]
        teacher_logits = teacher_logits[batch["pair_teacher"]]
    if len(pairing.maps) == 1:
        return compare(pairing.maps[0], student_logits, teacher_logits)
    joined: dict[str, Tensor] = {}
    for index, vocabulary in enumerate(pairing.maps):
        rows = (batch["map_index"] == index).nonzero()[:, 0]
        part = compare(vocabulary, student_logits[rows], teacher_logits[rows])
        for name, values in part.items():
            base = joined.get(name, values.new_zeros(len(student_logits)))
            joined[name] = base.index_copy(0, rows, values)
    return joined
