"""One batch through both models: per-token losses and figures. The trainer and the plain loop
share this file, so that what is trained is written once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taid_vlm.alignment import Pairing, VocabularyMap
from taid_vlm.models import answer_logits
from taid_vlm.objectives import Objective, diagnose, divergence

Batch = Mapping[str, Any]


@torch.no_grad()
def teacher_forward(teacher: nn.Module, batch: Batch) -> Tensor:
    """Teacher logits [N, V_teacher] at the aligned positions; no gradient, no state."""
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
    """Every term of the objective per aligned token, {name: [N] nats}.

    `teacher_logits` and `pairing` may be None if no term needs a teacher.
    """
    if teacher_logits is None or pairing is None:
        return objective.per_token(student_logits, None, batch["labels"])

    def compare(vocabulary: VocabularyMap, s: Tensor, u: Tensor, labels: Tensor):  # type: ignore[no-untyped-def]
        return objective.per_token(
            vocabulary.map_student(s), vocabulary.map_teacher(u), labels, own_logits=s, t=t
        )

    return _by_map(pairing, batch, student_logits, teacher_logits, compare)


@torch.no_grad()
def token_figures(
    batch: Batch, student_logits: Tensor, teacher_logits: Tensor | None, pairing: Pairing | None
) -> dict[str, Tensor]:
    """What is reported per aligned token, {name: [N]}: KL both ways, entropies, agreement,
    mass outside the shared vocabulary, and both models' negative log-likelihood of the data."""
    figures = {"nll": divergence("ce", student_logits, None, labels=batch["labels"])}
    if teacher_logits is None or pairing is None:
        return figures

    def compare(vocabulary: VocabularyMap, s: Tensor, u: Tensor, labels: Tensor):  # type: ignore[no-untyped-def]
        found = diagnose(vocabulary.map_student(s), vocabulary.map_teacher(u))
        found |= vocabulary.unshared_mass(s, "student") | vocabulary.unshared_mass(u, "teacher")
        return found

    figures["teacher_nll"] = divergence("ce", teacher_logits, None, labels=batch["teacher_labels"])
    return figures | _by_map(pairing, batch, student_logits, teacher_logits, compare)


Compare = Callable[[VocabularyMap, Tensor, Tensor, Tensor], dict[str, Tensor]]


def _by_map(
    pairing: Pairing, batch: Batch, student_logits: Tensor, teacher_logits: Tensor, compare: Compare
) -> dict[str, Tensor]:
    """Run `compare` under the vocabulary map of each token and bring the results together."""
    if len(pairing.maps) == 1:
        return compare(pairing.maps[0], student_logits, teacher_logits, batch["labels"])
    joined: dict[str, Tensor] = {}
    for index, vocabulary in enumerate(pairing.maps):
        rows = (batch["map_index"] == index).nonzero()[:, 0]
        part = compare(vocabulary, student_logits[rows], teacher_logits[rows],
                       batch["labels"][rows])
        for name, values in part.items():
            base = joined.get(name, values.new_zeros(len(batch["labels"])))
            joined[name] = base.index_copy(0, rows, values)
    return joined
