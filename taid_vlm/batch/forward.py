"""One batch through both models: logits at the aligned positions.

N are the student's tokens that take part. Each of them has one partner of the teacher's, unless
the models split text differently: then the batch says which have one (`pair_student`,
`pair_teacher`), and which tokens of either model form a chunk (`chunk_student`, `chunk_teacher`);
a chunk's loss and figures stand at its last token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taid_vlm.models.forward import answer_logits

Batch = Mapping[str, Any]


@torch.no_grad()
def teacher_forward(teacher: nn.Module, batch: Batch) -> Tensor:
    """Teacher logits [N_teacher, V_teacher] at the aligned positions; no gradient, no state."""
    return answer_logits(teacher, batch["teacher_inputs"], batch["teacher_mask"])


def student_forward(student: nn.Module, batch: Batch) -> Tensor:
    """Student logits [N, V_student] at the aligned positions."""
    return answer_logits(student, batch["student_inputs"], batch["student_mask"])


