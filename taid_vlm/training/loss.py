"""A batch's loss in two implementations: from logits in memory, and from hidden states.

The fused loss runs inside the student's own forward (`distill=...`), so that what wraps the model
(DDP, FSDP, autocast) sees an ordinary forward whose output is the loss. Without that argument the
forward is the model's own.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from taid_vlm.alignment import Pairing
from taid_vlm.batch.figures import Measured, compared_figures, token_figures
from taid_vlm.batch.forward import Batch, student_forward, teacher_forward
from taid_vlm.batch.losses import advantage_weights, token_losses
from taid_vlm.config.training import MEMORY_BUDGET
from taid_vlm.errors import TaidError
from taid_vlm.fused.divergence import FusedDivergence, FusedLoss, Rows
from taid_vlm.fused.heads import Head, ModuleHead
from taid_vlm.models.forward import answer_hidden, answer_logits, evaluation_mode, head_rows, unwrap
from taid_vlm.models.head import LogitTransform, known_logit_transforms
from taid_vlm.objectives import Objective, divergence, parse_objective

logger = logging.getLogger(__name__)

Autocast: TypeAlias = Callable[[], contextlib.AbstractContextManager[Any]]
FIGURE_BYTES = 64  # per pair of logits, that the figures of a logged step have in use, about
CHECKED_POSITIONS = 8  # at which head(hidden) must be the model's own logits


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
                weight = _advantage(self.objective, teacher, batch, u)
        s = student_forward(model, batch)
        losses = token_losses(self.objective, batch, s, u, self.pairing, t)
        sums = {name: x.sum() for name, x in self.objective.reweighted(losses, weight).items()}
        figures = token_figures(batch, s, u, self.pairing) if with_figures else {}
        return StepLoss(self.objective.weighted(sums), losses, weight, figures)


@torch.no_grad()
def _advantage(objective: Objective, teacher: nn.Module, batch: Batch, u: Tensor) -> Tensor:
    def nll(logits: Tensor) -> Tensor:
        return divergence("ce", logits, None, labels=batch["teacher_labels"])

    return advantage_weights(objective.visual_advantage, batch, nll(u),
                             lambda blind: nll(teacher_forward(teacher, blind)))


class Answers(NamedTuple):
    """One model's hidden states at the answer positions [N, H], and its head."""

    hidden: Tensor
    head: Head | ModuleHead


class FusedStep:
    """The fused objective inside the student's forward; nothing of size [N, V] is kept.

    Args:
        pairing: None without a teacher.
        student: wrapped or not; its innermost forward takes one argument more from now on.
        transforms: what student and teacher do behind their heads.
        memory_budget: bytes that a chunk of logits may take.
    """

    def __init__(
        self, objective: Objective, pairing: Pairing | None, student: nn.Module,
        transforms: Mapping[str, LogitTransform], memory_budget: int, autocast: Autocast,
    ) -> None:
        self.objective, self.pairing, self.transforms = objective, pairing, transforms
        self.autocast = autocast
        maps = pairing.maps if pairing is not None and objective.needs_teacher else ()
        self.fused = FusedDivergence(objective, maps, memory_budget=memory_budget)
        self.likelihood = FusedDivergence(parse_objective("ce"), memory_budget=memory_budget)
        accept_distill(unwrap(student))

    def __call__(
        self, model: nn.Module, teacher: nn.Module | None, batch: Batch, t: float | None,
        with_figures: bool,
    ) -> StepLoss:
        theirs = weight = None
        if teacher is not None and self.objective.needs_teacher:
            with torch.no_grad(), self.autocast():
                theirs = self._answers(unwrap(teacher), "teacher", batch)
                if self.objective.visual_advantage:
                    weight = self._advantage(unwrap(teacher), batch, theirs)

        def distill(student: PreTrainedModel, inputs: Mapping[str, Tensor]) -> FusedLoss:
            with self.autocast():
                ours = self._answers(student, "student", {**batch, "student_inputs": inputs})
                their_hidden, their_head = theirs or (None, None)
                return self.fused(
                    ours.hidden, ours.head, their_hidden, their_head, batch["labels"], t=t,
                    map_index=batch["map_index"] if len(self.fused.maps) > 1 else None,
                    token_weights=weight,
                    measure=functools.partial(self._measure, batch) if with_figures else None)

        found = model(**batch["student_inputs"], distill=distill)
        figures = {name: Measured(values) for name, values in found.figures.items()}
        return StepLoss(found.loss, found.per_token, weight, figures)

    def _answers(self, model: PreTrainedModel, role: str, batch: Batch) -> Answers:
        return Answers(answer_hidden(model, batch[f"{role}_inputs"], batch[f"{role}_mask"]),
                       output_head(model, self.transforms[role]))

    def _advantage(self, teacher: PreTrainedModel, batch: Batch, seeing: Answers) -> Tensor:
        def nll(answers: Answers) -> Tensor:
            return self.likelihood(*answers, labels=batch["teacher_labels"]).per_token["ce"]

        return advantage_weights(
            self.objective.visual_advantage, batch, nll(seeing),
            lambda blind: nll(self._answers(teacher, "teacher", blind)))

    def _measure(
        self, batch: Batch, index: int, rows: Rows, s: Tensor, u: Tensor | None
    ) -> dict[str, Tensor]:
        """As `token_figures`, as many rows at a time as the budget holds."""
        at_once = max(1, self.fused.memory_budget // (FIGURE_BYTES * s.shape[1]))
        parts = []
        for part in (slice(i, i + at_once) for i in range(0, max(1, len(s)), at_once)):
            found = {"nll": divergence("ce", s[part], None, labels=batch["labels"][rows][part])}
            if u is not None and self.pairing is not None:
                partners = batch["teacher_labels"][rows][part]
                found["teacher_nll"] = divergence("ce", u[part], None, labels=partners)
                found |= compared_figures(self.pairing.maps[index], s[part], u[part])
            parts.append(found)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


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


def output_head(model: PreTrainedModel, transform: LogitTransform) -> Head | ModuleHead:
    """The model's head as the fused objective takes it."""
    module = model.get_output_embeddings()
    if type(module) is nn.Linear:
        return Head(module.weight, module.bias, transform)
    return ModuleHead(module, head_rows(model), transform)


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
    transforms: dict[str, LogitTransform] = {}
    if reason is None and implementation != "reference":
        models = {"student": student, "teacher": teacher if objective.needs_teacher else None}
        for role, model in models.items():
            transform = None if model is None else find_logit_transform(unwrap(model), role, probe)
            if model is not None and transform is None:
                reason = (f"the {role} ({unwrap(model).config.model_type}) does something behind "
                          "its head that is not known here")
            elif transform is not None:
                transforms[role] = transform
    if implementation == "reference" or (implementation == "auto" and reason is not None):
        if implementation == "auto":
            logger.warning("The loss keeps the logits of all answer positions: %s.", reason)
        return ReferenceStep(objective, pairing)
    if reason is not None:
        raise TaidError(f"loss_implementation = 'fused', but {reason}. Use auto or reference.")
    return FusedStep(objective, pairing, student, transforms, memory_budget, autocast)


def obstacle(objective: Objective, pairing: Pairing | None) -> str | None:
    """What only the reference can do."""
    if pairing is not None and pairing.has_chunks and objective.needs_teacher:
        return "the models split some texts differently, and chunks need single tokens' logits"
    return None


@torch.no_grad()
def find_logit_transform(model: PreTrainedModel, role: str, probe: Batch) -> LogitTransform | None:
    """What the model does between its head and its logits; None if it is not known here."""
    mask = probe[f"{role}_mask"].clone()
    places = mask.nonzero()[CHECKED_POSITIONS:]
    mask[places[:, 0], places[:, 1]] = False
    device = model.device
    inputs = {key: value.to(device) for key, value in probe[f"{role}_inputs"].items()}
    with evaluation_mode(model):
        own = answer_logits(model, inputs, mask.to(device))
        hidden = answer_hidden(model, inputs, mask.to(device))
    for transform in known_logit_transforms(model.config.get_text_config()):
        if torch.allclose(output_head(model, transform).open().logits(hidden).float(), own.float(),
                          rtol=1e-3, atol=1e-3 * float(own.float().abs().max())):
            return transform
    return None


