"""Per-token losses of a batch, from logits. The trainer and the plain loop share this file, so that
what is trained is written once. Shapes: `forward.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from taid_vlm.alignment import Pairing, VocabularyMap
from taid_vlm.batch.forward import Batch
from taid_vlm.config.objective import SAMPLED_RKL
from taid_vlm.objectives import (
    Objective,
    advantage_weight,
    chunk_logits,
    label_log_prob,
    sampled_reverse_kl,
)


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
    if objective.estimates and teacher_logits is not None and pairing is not None:
        return estimated(batch, student_logits, teacher_logits, pairing)
    losses = objective.on_data(student_logits, batch["labels"])
    if teacher_logits is not None and pairing is not None and objective.needs_teacher:
        losses |= _against_teacher(objective, batch, student_logits, teacher_logits, pairing, t)
    return losses


def estimated(
    batch: Batch, student_logits: Tensor, teacher_logits: Tensor, pairing: Pairing
) -> dict[str, Tensor]:
    """`sampled_reverse_kl` of the entries that the student's tokens are; 0 of a token that has
    none."""
    def compare(vocabulary: VocabularyMap, s: Tensor, u: Tensor) -> dict[str, Tensor]:
        entry = vocabulary.student_entries(labels[id(vocabulary)])
        known = entry >= 0
        s, u = vocabulary.map_student(s), vocabulary.map_teacher(u)
        own, other = (label_log_prob(x, entry.clamp(min=0)) for x in (s, u.detach()))
        return {SAMPLED_RKL: sampled_reverse_kl(own, other).where(known, 0.0)}

    several = len(pairing.maps) > 1
    labels = {id(vocabulary): batch["labels"][batch["map_index"] == index] if several
              else batch["labels"] for index, vocabulary in enumerate(pairing.maps)}
    return by_map(pairing, batch, student_logits, teacher_logits, compare)


def advantage_weights(
    strength: float, batch: Batch, seeing: Tensor, unseeing: Callable[[Batch], Tensor],
    in_step: bool = False,
) -> Tensor:
    """How much every token of the student counts [N], by what the teacher sees for it.

    All of a chunk weighs what the sum over its teacher's tokens says; tokens of records without an
    image weigh 1.

    Args:
        seeing: the teacher's negative log-likelihood of its tokens [N_teacher].
        unseeing: the same of another batch: this one, in which only the teacher's pixels differ.
        in_step: ask it of a batch without images, too, as other processes do of theirs.
    """
    blind = blinded(batch, in_step)
    if blind is None:
        return seeing.new_ones(len(batch["labels"]), dtype=torch.float32)
    gain = unseeing(blind) - seeing
    if has_chunks(batch):
        gain = of_partners(batch, gain)
    return advantage_weight(gain, strength).where(batch["images"][batch["row"]] > 0, 1.0)


def blinded(batch: Batch, in_step: bool = False) -> Batch | None:
    """This batch, in which the teacher sees degraded images; None where no row has one, unless it
    is to be asked with all others (`advantage_weights`)."""
    degraded = batch["teacher_degraded"]
    if not degraded and not in_step:
        return None
    return {**batch, "teacher_inputs": {**batch["teacher_inputs"], **degraded}}


def by_weight(batch: Batch, values: Tensor) -> Tensor:
    """Values of the student's tokens [N], each times what its answer counts."""
    return values * batch["weights"] if "weights" in batch else values


def weight_sum(batch: Batch) -> float:
    """What a batch's tokens count together: what the sum of its losses is divided by."""
    return float(batch["weights"].double().sum()) if "weights" in batch else len(batch["labels"])


def compared_tokens(batch: Batch) -> Tensor | None:
    """Those of the student's N tokens that have a loss against the teacher (None: all)."""
    if not has_chunks(batch):
        return None
    return torch.cat([batch["pair_student"], batch["chunk_last"]]).unique()


def of_partners(batch: Batch, values: Tensor) -> Tensor:
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

    losses = by_map(pairing, batch, student_logits, teacher_logits, compare)
    if not has_chunks(batch):
        return losses
    tokens = len(student_logits)
    chunks = objective.between(*chunk_pair_logits(batch, student_logits, teacher_logits), t)
    return {name: values.new_zeros(tokens).index_add(0, batch["pair_student"], values)
            .index_add(0, batch["chunk_last"], chunks[name]) for name, values in losses.items()}


def has_chunks(batch: Batch) -> bool:
    return "chunk_last" in batch


def chunk_pair_logits(batch: Batch, s: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Student's and teacher's [chunks, 2]."""
    return chunk_outcomes(batch, _in_chunks(s, batch["labels"], batch["chunk_student"]),
                          _in_chunks(u, batch["teacher_labels"], batch["chunk_teacher"]))


def _in_chunks(logits: Tensor, labels: Tensor, chunk: Tensor) -> Tensor:
    """[N] log-probabilities of the labels in chunks; 0 for others."""
    inside = (chunk >= 0).nonzero()[:, 0]
    found = label_log_prob(logits[inside], labels[inside])
    return found.new_zeros(len(chunk)).index_copy(0, inside, found)


def chunk_outcomes(batch: Batch, log_prob: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Student's and teacher's [chunks, 2] from log-probabilities of their labels, [N] and [M]."""
    count = len(batch["chunk_last"])
    return (chunk_logits(log_prob, batch["chunk_student"], count),
            chunk_logits(teacher, batch["chunk_teacher"], count))


Compare = Callable[[VocabularyMap, Tensor, Tensor], dict[str, Tensor]]


def by_map(
    pairing: Pairing, batch: Batch, student_logits: Tensor, teacher_logits: Tensor, compare: Compare
) -> dict[str, Tensor]:
    """Run `compare` on the pairs of tokens, under each one's vocabulary map."""
    if has_chunks(batch):
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
