"""An objective: a weighted sum of per-token losses with one temperature and one schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from taid_vlm.config.objective import (
    MOVING,
    SAMPLED_RKL,
    VISUAL,
    Amid,
    OnPolicy,
    Router,
    Taid,
    read_objective,
    scheduled_keys,
)
from taid_vlm.objectives.divergences import (
    LOSSES,
    divergence,
)
from taid_vlm.objectives.schedule import TaidSchedule


def compares(name: str) -> bool:
    """Whether a term needs a teacher."""
    return name == SAMPLED_RKL or LOSSES[name].needs_teacher


@dataclass(frozen=True)
class Term:
    """One loss of the sum; `schedule` holds TaidSchedule's arguments for the TAID term."""

    name: str
    weight: float = 1.0
    parameters: Mapping[str, float] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class VisualTerm:
    """A loss per image, on visual features averaged over grid x grid cells."""

    name: str
    weight: float = 1.0
    grid: int = 4


@dataclass(frozen=True)
class Objective:
    """What the student is trained on; build it with `parse_objective`.

    alignment: which comparisons are allowed, see `taid_vlm.alignment.pair_models`.
    visual: losses on visual features, see `taid_vlm.training.visual`.
    visual_advantage: how much more tokens count that the teacher needs the image for; 0: all
        tokens count alike.
    on_policy: how answers are sampled from the student; None: they are not.
    sampled: what such answers are trained on.

    Example:
        >>> import torch
        >>> from taid_vlm import parse_objective
        >>> objective = parse_objective({"terms": [{"name": "rkl"}, {"name": "ce", "weight": 0.5}]})
        >>> teacher = torch.tensor([[0.8, 0.2], [0.5, 0.5]]).log()  # [N, K]
        >>> losses = objective.per_token(torch.zeros(2, 2), teacher, labels=torch.tensor([0, 1]))
        >>> {name: [round(nats, 3) for nats in loss.tolist()] for name, loss in losses.items()}
        {'reverse_kl': [0.223, 0.0], 'ce': [0.693, 0.693]}
        >>> [round(nats, 3) for nats in objective.weighted(losses).tolist()]
        [0.57, 0.347]
    """

    terms: tuple[Term, ...]
    kd_temperature: float = 1.0
    alignment: str = "auto"
    visual: tuple[VisualTerm, ...] = ()
    visual_advantage: float = 0.0
    router: float = 0.0
    on_policy: OnPolicy | None = None
    sampled: Objective | None = None

    @property
    def needs_teacher(self) -> bool:
        return bool(self.visual) or any(compares(term.name) for term in self.terms)

    @property
    def estimates(self) -> bool:
        """Whether it is taken at sampled tokens alone, not over laws."""
        return self.terms[0].name == SAMPLED_RKL

    @property
    def moving_term(self) -> Term | None:
        """The term whose target moves with t (taid, amid); of references first."""
        own = self.sampled.terms if self.sampled is not None else ()
        return next((term for term in (*self.terms, *own) if term.name in MOVING), None)

    def schedule(self, total_steps: int) -> TaidSchedule | None:
        """The schedule of t for a run of `total_steps`, or None without such a term."""
        term = self.moving_term
        return None if term is None else TaidSchedule(total_steps, **term.schedule)

    def per_token(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
        *,
        own_logits: Tensor | None = None,
        t: float | None = None,
    ) -> dict[str, Tensor]:
        """Every term's loss per token, unweighted.

        Args:
            student_logits, teacher_logits: [N, K] over the entries both models share.
            labels: [N] the student's own next-token ids.
            own_logits: [N, V] over the student's whole vocabulary, for terms on the data;
                `student_logits` where absent.
            t: the interpolation parameter, for the TAID term.

        Returns:
            {term name: [N] nats per token}.
        """
        data = student_logits if own_logits is None else own_logits
        losses = self.on_data(data, labels) | self.between(student_logits, teacher_logits, t)
        return {term.name: losses[term.name] for term in self.terms}

    def between(
        self, student_logits: Tensor, teacher_logits: Tensor | None, t: float | None = None
    ) -> dict[str, Tensor]:
        """The terms that compare student and teacher, {name: [N]} from logits of one width."""
        losses = {}
        for term in self.terms:
            if compares(term.name):
                extra: dict[str, Any] = dict(term.parameters)
                if term.name in MOVING and t is not None:
                    extra["t"] = float(t)
                losses[term.name] = divergence(
                    term.name, student_logits, teacher_logits,
                    kd_temperature=self.kd_temperature, **extra,
                )
        return losses

    def on_data(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The terms on the data alone, {name: [N]} from the student's own logits [N, V]."""
        return {term.name: divergence(term.name, logits, None, labels=labels)
                for term in self.terms if not compares(term.name)}

    def reweighted(
        self, losses: Mapping[str, Tensor], weight: Tensor | None
    ) -> dict[str, Tensor]:
        """The terms that compare student and teacher times a weight per token [N], if any."""
        return {name: values if weight is None or not compares(name)
                else values * weight for name, values in losses.items()}

    def weighted(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the terms (any shape)."""
        return sum((term.weight * losses[term.name] for term in self.terms[1:]),
                   start=self.terms[0].weight * losses[self.terms[0].name])


def parse_objective(config: str | Mapping[str, Any]) -> Objective:
    """Read an objective from a recipe.

    `{name: taid, t_start: 0.2}` is one term; `{terms: [{name: taid}, {name: ce, weight: 0.1}],
    kd_temperature: 2}` a weighted sum. A bare name works too. `alignment` (auto, exact, shared or
    chunks) says how models of different vocabularies may be compared. `{name: visual_features,
    weight: 0.1, grid: 4}` and `visual_relation` among the terms compare visual features, and
    `token_weights: {name: visual_advantage, strength: 1}` lets tokens that need the image count
    more. `taid_vlm/config/objective.py` has every key.

    Args:
        config: a name, or a mapping as under `objective` of a recipe.

    Raises:
        RecipeError: unknown names or keys (with the nearest valid one), values out of range.

    Example:
        >>> from taid_vlm import parse_objective
        >>> objective = parse_objective({"terms": [{"name": "taid", "t_start": 0.2},
        ...                                        {"name": "ce", "weight": 0.1}]})
        >>> [(term.name, term.weight) for term in objective.terms]
        [('taid', 1.0), ('ce', 0.1)]
        >>> objective.schedule(total_steps=100).t
        0.2
        >>> parse_objective("jsd").schedule(total_steps=100) is None  # nothing moves
        True
    """
    spec = read_objective(config)
    terms, visual, router = list[Term](), list[VisualTerm](), 0.0
    for term in spec.losses:
        own = {key: getattr(term, key) for key in term.parameters() if key in term.model_fields_set}
        if isinstance(term, VISUAL):
            visual.append(VisualTerm(term.name, term.weight, term.grid))
        elif isinstance(term, Router):
            router = term.weight
        elif isinstance(term, (Taid, Amid)):
            kept = {key: own[key] for key in own if key not in scheduled_keys(term.name)}
            terms.append(Term(term.name, term.weight, kept, term.schedule()))
        else:
            terms.append(Term(term.name, term.weight, own))
    strength = 0.0 if spec.token_weights is None else spec.token_weights.strength
    plain = Objective(tuple(terms), spec.kd_temperature, spec.alignment, tuple(visual), strength,
                      router)
    if spec.on_policy is None:
        return plain
    sampled_spec = spec.on_policy.objective
    sampled = replace(plain, visual=(), router=0.0, terms=tuple(
        term for term in terms if compares(term.name))) if sampled_spec is None \
        else replace(plain, terms=(Term(SAMPLED_RKL),), visual=(), router=0.0, kd_temperature=1.0,
                     visual_advantage=0.0) if sampled_spec == SAMPLED_RKL \
        else parse_objective(sampled_spec)
    return replace(plain, on_policy=spec.on_policy, sampled=sampled)
