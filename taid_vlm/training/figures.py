"""Held-out figures inside the student's forward: as many logits at a time as the loss has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from taid_vlm.alignment import Pairing
from taid_vlm.batch.figures import Measured, compared_figures
from taid_vlm.batch.forward import Batch
from taid_vlm.batch.losses import has_chunks
from taid_vlm.fused.divergence import FusedDivergence
from taid_vlm.fused.model_head import find_logit_transform, inside_forward, is_plain
from taid_vlm.fused.work import Rows
from taid_vlm.models.forward import Autocast, accept_distill, unwrap
from taid_vlm.models.head import LogitTransform
from taid_vlm.objectives import Objective, best_guess, data_nll
from taid_vlm.teachers import Teachers

HEAD = "head"
FIGURE_BYTES = 64  # per pair of logits, that the figures of some rows have in use, about


class FusedFigures:
    """All figures of held-out batches, by chunks of `memory_budget`.

    Not of pairs that split texts differently, several or sparse teachers, and heads that are not
    known: those are measured from all logits of a batch.

    Args:
        pairing: None without a teacher.
        processes: that measure batches of their own in step.
        known: what stands behind the student's head, as HEAD, once it is known (None: something
            that is not).
    """

    def __init__(
        self, pairing: Pairing | None, memory_budget: int, autocast: Autocast, processes: int = 1,
        known: dict[str, LogitTransform | None] | None = None,
    ) -> None:
        self.pairing, self.autocast, self.processes = pairing, autocast, processes
        maps = () if pairing is None else pairing.maps
        self.fused = FusedDivergence(Objective(()), maps, memory_budget=memory_budget)
        self.known = {} if known is None else known

    @torch.no_grad()
    def __call__(
        self, student: nn.Module, teacher: Any, batch: Batch
    ) -> dict[str, Measured] | None:
        """A batch's, or None where they need all of its logits."""
        if not self._can(student, teacher, batch):
            return None
        hidden = head = None
        if teacher is not None and self.pairing is not None:
            signal = teacher.hidden(batch)
            if signal is None:  # and it is not asked again, which costs it forward passes
                self.known[HEAD] = None
                return None
            hidden, head = signal

        transform = self.known[HEAD]
        assert transform is not None
        found = inside_forward(
            student, transform, batch, self.autocast, lambda own, own_head: self.fused(
                own, own_head, hidden, head, batch["labels"],
                map_index=batch["map_index"] if len(self.fused.maps) > 1 else None,
                measure=self._measuring(batch)))
        return {name: Measured(values) for name, values in found.figures.items()}

    def _measuring(self, batch: Batch) -> Callable[..., dict[str, Tensor]]:
        return functools.partial(
            figures_of_rows, batch, self.pairing, self.fused.memory_budget, closely=True)

    def _can(self, student: nn.Module, teacher: Any, batch: Batch) -> bool:
        plain = unwrap(student)
        head = plain.get_output_embeddings()
        # nothing here is of a batch alone: processes do the same, in step
        chunks = self.pairing is not None and self.pairing.has_chunks
        if chunks or isinstance(teacher, Teachers) or getattr(teacher, "top", None) is not None:
            return False
        if not is_plain(head) and any(isinstance(p, DTensor) for p in plain.parameters()):
            return False
        accept_distill(plain)
        if HEAD not in self.known:
            self._look(student, batch)
        return self.known.get(HEAD) is not None

    def _look(self, student: nn.Module, batch: Batch) -> None:
        """What stands behind the head, where every process has tokens to find out by."""
        own = len(batch["labels"]) > 0
        if all(gather_object([own])) if self.processes > 1 else own:
            with self.autocast():
                self.known[HEAD] = find_logit_transform(
                    student, batch["student_inputs"], batch["student_mask"])


def fused_figures(trainer: Any) -> FusedFigures | None:
    """A trainer's, with the room for logits that its loss has; None where its loss keeps all."""
    args, accelerator, step = trainer.args, trainer.accelerator, trainer._step
    if args.loss_implementation == "reference":
        return None
    found = FusedFigures(trainer.pairing, args.loss_memory_budget, accelerator.autocast,
                         accelerator.num_processes, trainer.behind_head)
    if (room := getattr(step, "fused", None)) is not None:
        found.fused.student_scratch = room.student_scratch
        found.fused.teacher_scratch = room.teacher_scratch
    return found


def figures_of_rows(
    batch: Batch, pairing: Pairing | None, memory_budget: int, index: int, rows: Rows, s: Tensor,
    u: Tensor | None, closely: bool = False,
) -> dict[str, Tensor]:
    """As `batch.figures.token_figures`, as many rows at a time as the budget holds; of pairs of
    tokens, where texts are split differently, what is compared.

    Args:
        index: of the vocabulary map. s: student logits [n, V_student] of the batch's `rows`.
        u: teacher logits [n, V_teacher].
    """
    parts = max(1, -(-len(s) * FIGURE_BYTES * s.shape[1] // memory_budget))
    found = []
    for part in (slice(i * len(s) // parts, (i + 1) * len(s) // parts) for i in range(parts)):
        figures = {}
        if u is None or not has_chunks(batch):
            labels = batch["labels"][rows][part]
            figures["nll"] = data_nll(s[part], labels)
            if closely:
                figures |= best_guess(s[part], labels)
        if u is not None and not has_chunks(batch):
            figures["teacher_nll"] = data_nll(u[part], batch["teacher_labels"][rows][part])
        if u is not None and pairing is not None:
            figures |= compared_figures(pairing.maps[index], s[part], u[part], closely)
        found.append(figures)
    return {name: torch.cat([figures[name] for figures in found]) for name in found[0]}
