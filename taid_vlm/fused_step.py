"""A batch's loss in two implementations: from logits in memory, and from hidden states.

The fused loss runs inside the student's own forward (`distill=...`), so that what wraps the model
(DDP, FSDP, autocast) sees an ordinary forward whose output is the loss. Without that argument the
forward is the model's own.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from taid_vlm.alignment import Pairing
from taid_vlm.errors import TaidError
from taid_vlm.fused import MEMORY_BUDGET, FusedDivergence, FusedLoss
from taid_vlm.heads import Bend, Head, ModuleHead
from taid_vlm.models import (
    answer_hidden,
    answer_logits,
    evaluation_mode,
    head_rows,
    unwrap,
)
from taid_vlm.objectives import Objective, divergence
from taid_vlm.step import (
    Batch,
    Measured,
    advantage_weights,
    compared_figures,
    student_forward,
    teacher_forward,
    token_figures,
    token_losses,
)

logger = logging.getLogger(__name__)

Autocast: TypeAlias = Callable[[], contextlib.AbstractContextManager[Any]]
IMPLEMENTATIONS = ("auto", "fused", "reference")
FIGURE_BYTES = 64  # per pair of logits, that the figures of a logged step have in use, about
CHECKED_POSITIONS = 8  # at which head(hidden) must be the model's own logits
SCALES = ("logit_scale", "lm_head_multiplier")  # config keys of factors behind a head
DIVISORS = ("logits_scaling",)


class StepLoss(NamedTuple):
    """What a batch gives: the differentiable weighted sum over its tokens, every term per token
    (unweighted), what tokens weigh (None: 1), and figures where they were asked for."""

    loss: Tensor
    losses: dict[str, Tensor]
    weight: Tensor | None
    figures: dict[str, Measured]


class ReferenceStep:
    """All logits of the answer positions in memory: every objective, every pair."""

    def __init__(self, objective: Objective, pairing: Pairing | None) -> None:
        self.objective, self.pairing = objective, pairing

    def __call__(
        self, model: nn.Module, teacher: nn.Module | None, batch: Batch, t: float | None,
        with_figures: bool,
    ) -> StepLoss:
        u = weight = None
        if teacher is not None and self.objective.needs_teacher:
            u = teacher_forward(teacher, batch)
            if self.objective.visual_advantage:
                weight = advantage_weights(self.objective.visual_advantage, teacher, batch, u)
        s = student_forward(model, batch)
        losses = token_losses(self.objective, batch, s, u, self.pairing, t)
        sums = {name: x.sum() for name, x in self.objective.reweighted(losses, weight).items()}
        figures = token_figures(batch, s, u, self.pairing) if with_figures else {}
        return StepLoss(self.objective.weighted(sums), losses, weight, figures)


class FusedStep:
    """The fused objective inside the student's forward; nothing of size [N, V] is kept.

    Args:
        student: wrapped or not; its innermost forward takes one argument more from now on.
        bends: what student and teacher do behind their heads.
        memory_budget: bytes that a chunk of logits may take.
    """

    def __init__(
        self, objective: Objective, pairing: Pairing, student: nn.Module,
        bends: Mapping[str, Bend], memory_budget: int, autocast: Autocast,
    ) -> None:
        self.objective, self.pairing, self.bends = objective, pairing, bends
        self.autocast = autocast
        self.fused = FusedDivergence(objective, pairing.maps, memory_budget=memory_budget)
        accept_distill(unwrap(student))

    def __call__(
        self, model: nn.Module, teacher: nn.Module | None, batch: Batch, t: float | None,
        with_figures: bool,
    ) -> StepLoss:
        their_hidden, their_head = None, None
        if teacher is not None and self.objective.needs_teacher:
            with torch.no_grad(), self.autocast():
                inner = unwrap(teacher)
                their_hidden = answer_hidden(inner, batch["teacher_inputs"], batch["teacher_mask"])
                their_head = output_head(inner, self.bends["teacher"])
        figures: dict[str, Measured] = {}

        def distill(student: PreTrainedModel, inputs: Mapping[str, Tensor]) -> FusedLoss:
            with self.autocast():
                hidden = answer_hidden(student, inputs, batch["student_mask"])
                head = output_head(student, self.bends["student"])
                if with_figures:
                    figures.update(self._figures(batch, hidden, head, their_hidden, their_head))
                return self.fused(hidden, head, their_hidden, their_head, batch["labels"], t=t,
                                  map_index=batch["map_index"])

        found = model(**batch["student_inputs"], distill=distill)
        return StepLoss(found.loss, found.per_token, None, figures)

    @torch.no_grad()
    def _figures(
        self, batch: Batch, s: Tensor, s_head: Head | ModuleHead, u: Tensor | None,
        u_head: Head | ModuleHead | None,
    ) -> dict[str, Measured]:
        """As `token_figures`, a few rows at a time."""
        names: dict[str, list[Tensor]] = {}
        order: list[Tensor] = []
        ours_of, theirs_of = (None if head is None else head.open() for head in (s_head, u_head))
        assert ours_of is not None
        at_once = max(1, self.fused.memory_budget // (FIGURE_BYTES * s_head.rows))
        for index, vocabulary in enumerate(self.pairing.maps):
            of_map = (batch["map_index"] == index).nonzero()[:, 0]
            for rows in of_map.split(at_once):
                order.append(rows)
                ours = ours_of.logits(s[rows])
                found = {"nll": divergence("ce", ours, None, labels=batch["labels"][rows])}
                if u is not None and theirs_of is not None:
                    theirs = theirs_of.logits(u[rows])
                    found["teacher_nll"] = divergence(
                        "ce", theirs, None, labels=batch["teacher_labels"][rows])
                    found |= compared_figures(vocabulary, ours, theirs)
                for name, values in found.items():
                    names.setdefault(name, []).append(values)
        return {name: Measured(torch.cat(parts), torch.cat(order)) for name, parts in names.items()}


# ----- the student's forward ----------------------------------------------------------------


def accept_distill(model: PreTrainedModel) -> None:
    """Let this instance's forward take `distill`, a function of the model and its inputs.

    With it, forward returns what the function returns; without, it is what it was (`generate` and
    saving do not notice). Calling it twice changes nothing.
    """
    original = model.forward
    if getattr(original, "accepts_distill", False):
        return

    @functools.wraps(original)
    def forward(*args: Any, distill: Any = None, **inputs: Any) -> Any:
        return original(*args, **inputs) if distill is None else distill(model, inputs)

    forward.accepts_distill = True  # type: ignore[attr-defined]
    model.forward = forward  # type: ignore[method-assign]


def output_head(model: PreTrainedModel, bend: Bend) -> Head | ModuleHead:
    """The model's head as the fused objective takes it."""
    module = model.get_output_embeddings()
    if type(module) is nn.Linear:
        return Head(module.weight, module.bias, bend)
    return ModuleHead(module, head_rows(model), bend)


# ----- which one ----------------------------------------------------------------------------


def choose_step(
    implementation: str, objective: Objective, pairing: Pairing | None, student: nn.Module,
    teacher: nn.Module | None, probe: Batch, memory_budget: int = MEMORY_BUDGET,
    autocast: Autocast = contextlib.nullcontext,
) -> ReferenceStep | FusedStep:
    """The implementation asked for; "auto" takes the fused one where it gives the same.

    Args:
        probe: a batch, at some positions of which head(hidden) is compared with the models' own
            logits. Moves no random state.
        autocast: a new context of mixed precision, if the run has one.

    Raises:
        TaidError: "fused" for something only the reference can do, with the reason.
    """
    reason = obstacle(objective, pairing)
    bends: dict[str, Bend] = {}
    if reason is None and implementation != "reference":
        models = {"student": student, "teacher": teacher if objective.needs_teacher else None}
        for role, model in models.items():
            bend = None if model is None else find_bend(unwrap(model), role, probe)
            if model is not None and bend is None:
                reason = (f"the {role} ({unwrap(model).config.model_type}) does something behind "
                          "its head that is not known here")
            elif bend is not None:
                bends[role] = bend
    if implementation == "reference" or (implementation == "auto" and reason is not None):
        if implementation == "auto":
            logger.warning("The loss keeps the logits of all answer positions: %s.", reason)
        return ReferenceStep(objective, pairing)
    if reason is not None:
        raise TaidError(f"loss_implementation = 'fused', but {reason}. Use auto or reference.")
    assert pairing is not None
    return FusedStep(objective, pairing, student, bends, memory_budget, autocast)


def obstacle(objective: Objective, pairing: Pairing | None) -> str | None:
    """What only the reference can do."""
    if pairing is None:
        return "there is no teacher"
    if pairing.has_chunks:
        return "the models split some texts differently, and chunks need single tokens' logits"
    if objective.visual_advantage:
        return "visual_advantage compares the teacher's logits with and without the image"
    return None


@torch.no_grad()
def find_bend(model: PreTrainedModel, role: str, probe: Batch) -> Bend | None:
    """What the model does between its head and its logits; None if it is not known here."""
    mask = probe[f"{role}_mask"].clone()
    places = mask.nonzero()[CHECKED_POSITIONS:]
    mask[places[:, 0], places[:, 1]] = False
    device = model.device
    inputs = {key: value.to(device) for key, value in probe[f"{role}_inputs"].items()}
    with evaluation_mode(model):
        own = answer_logits(model, inputs, mask.to(device))
        hidden = answer_hidden(model, inputs, mask.to(device))
    for bend in known_bends(model.config.get_text_config()):
        if torch.allclose(output_head(model, bend).open().logits(hidden).float(), own.float(),
                          rtol=1e-3, atol=1e-3 * float(own.float().abs().max())):
            return bend
    return None


def known_bends(config: Any) -> Iterator[Bend]:
    """Nothing, or what the config names."""
    scale, softcap = 1.0, getattr(config, "final_logit_softcapping", None)
    for name in SCALES:
        scale *= getattr(config, name, None) or 1.0
    for name in DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    yield Bend()
    yield Bend(scale, softcap)
