"""An objective: a weighted sum of per-token losses with one temperature and one schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from taid_vlm.errors import RecipeError, nearest, with_place
from taid_vlm.objectives.divergences import (
    LOSSES,
    canonical_name,
    check_parameters,
    divergence,
)
from taid_vlm.objectives.schedule import TaidSchedule

SCHEDULE_KEYS = ("t_start", "t_end", "alpha", "momentum", "adaptive")
ALIGNMENTS = ("auto", "exact", "shared", "chunks")
# losses on visual features, and the coarsest grid that says something (one cell has no relation)
VISUAL_TERMS = {"visual_features": 1, "visual_relation": 2}
FINEST_GRID, DEFAULT_GRID = 32, 4
TOKEN_WEIGHTS = ("visual_advantage",)


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
    grid: int = DEFAULT_GRID


@dataclass(frozen=True)
class Objective:
    """What the student is trained on; build it with `parse_objective`.

    alignment: which comparisons are allowed, see `taid_vlm.alignment.pair_models`.
    visual: losses on visual features, see `taid_vlm.training.visual`.
    visual_advantage: how much more tokens count that the teacher needs the image for; 0: all
        tokens count alike.
    """

    terms: tuple[Term, ...]
    kd_temperature: float = 1.0
    alignment: str = "auto"
    visual: tuple[VisualTerm, ...] = ()
    visual_advantage: float = 0.0

    @property
    def needs_teacher(self) -> bool:
        return bool(self.visual) or any(LOSSES[term.name].needs_teacher for term in self.terms)

    @property
    def taid_term(self) -> Term | None:
        return next((term for term in self.terms if term.name == "taid"), None)

    def schedule(self, total_steps: int) -> TaidSchedule | None:
        """The schedule of t for a run of `total_steps`, or None without a TAID term."""
        term = self.taid_term
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
            if LOSSES[term.name].needs_teacher:
                extra: dict[str, Any] = dict(term.parameters)
                if term.name == "taid" and t is not None:
                    extra["t"] = float(t)
                losses[term.name] = divergence(
                    term.name, student_logits, teacher_logits,
                    kd_temperature=self.kd_temperature, **extra,
                )
        return losses

    def on_data(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The terms on the data alone, {name: [N]} from the student's own logits [N, V]."""
        return {term.name: divergence(term.name, logits, None, labels=labels)
                for term in self.terms if not LOSSES[term.name].needs_teacher}

    def reweighted(
        self, losses: Mapping[str, Tensor], weight: Tensor | None
    ) -> dict[str, Tensor]:
        """The terms that compare student and teacher times a weight per token [N], if any."""
        return {name: values if weight is None or not LOSSES[name].needs_teacher
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
    more.

    Raises:
        RecipeError: unknown names or keys (with the nearest valid one), values out of range.
    """
    if isinstance(config, str):
        config = {"name": config}
    config = _mapping(config, "objective")
    temperature = config.pop("kd_temperature", 1.0)
    if not _is_number(temperature) or not temperature > 0:
        raise RecipeError(f"objective.kd_temperature = {temperature!r}, but it must be positive.")
    alignment = config.pop("alignment", "auto")
    if alignment not in ALIGNMENTS:
        raise RecipeError(f"objective.alignment = {alignment!r}.{nearest(alignment, ALIGNMENTS)}")
    strength = _parse_token_weights(config.pop("token_weights", None))
    if "terms" in config and "name" not in config:
        listed = config.pop("terms")
        if config:
            raise RecipeError(
                f"objective: '{next(iter(config))}' stands beside 'terms'; put it into the term."
            )
    elif "name" in config:
        listed = [config]
    else:
        raise RecipeError("objective needs a 'name' (for example taid) or a list of 'terms'.")
    terms = _parse_terms(listed)
    objective = Objective(
        tuple(term for term in terms if isinstance(term, Term)), float(temperature), alignment,
        tuple(term for term in terms if isinstance(term, VisualTerm)), strength)
    _check_visual(objective)
    return objective


def _parse_token_weights(config: Any) -> float:
    """The strength of the visual advantage; 0 where nothing is asked for."""
    if config is None:
        return 0.0
    where = "objective.token_weights"
    config = _mapping({"name": config} if isinstance(config, str) else config, where)
    name = config.pop("name", None)
    if name not in TOKEN_WEIGHTS:
        raise RecipeError(f"{where}.name = {name!r}.{nearest(name, TOKEN_WEIGHTS)}")
    strength = config.pop("strength", 1.0)
    for key in config:
        raise RecipeError(f"{where} has no key '{key}'.{nearest(key, ('name', 'strength'))}")
    if not _is_number(strength) or strength < 0:
        raise RecipeError(f"{where}.strength = {strength!r}, but it must be >= 0.")
    return float(strength)


def _check_visual(objective: Objective) -> None:
    if not objective.terms:
        named = ", ".join(term.name for term in objective.visual)
        raise RecipeError(f"objective.terms has {named} only, which says nothing about answers; "
                          "add a loss on tokens, for example taid.")
    if objective.visual_advantage and not any(
            LOSSES[term.name].needs_teacher for term in objective.terms):
        raise RecipeError("objective.token_weights weighs the terms that compare with the teacher, "
                          "and there is none; add one, for example taid.")


def _parse_terms(listed: Any) -> tuple[Term | VisualTerm, ...]:
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise RecipeError("objective.terms must be a list of {name: ..., weight: ...}.")
    terms = tuple(_parse_term({"name": t} if isinstance(t, str) else _mapping(t, "a term"))
                  for t in listed)
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise RecipeError(f"objective.terms names a loss twice: {', '.join(names)}.")
    return terms


def _parse_term(config: dict[str, Any]) -> Term | VisualTerm:
    if "name" not in config:
        raise RecipeError("every objective term needs a 'name'.")
    name = canonical_name(config.pop("name"), VISUAL_TERMS)
    weight = config.pop("weight", 1.0)
    if not _is_number(weight) or weight < 0:
        raise RecipeError(f"objective.{name}.weight = {weight!r}, but it must be >= 0.")
    if name in VISUAL_TERMS:
        return _parse_visual(name, float(weight), config)
    if name != "taid":
        check_parameters(name, config)
        return Term(name, float(weight), config)
    for key in config:
        if key not in SCHEDULE_KEYS:
            raise RecipeError(f"objective 'taid' has no key '{key}'.{nearest(key, SCHEDULE_KEYS)}")
    try:
        TaidSchedule(1, **config)  # the values are checked before anything is loaded
    except RecipeError as error:
        raise with_place(error, "objective") from None
    return Term(name, float(weight), {}, config)


def _parse_visual(name: str, weight: float, config: dict[str, Any]) -> VisualTerm:
    grid, least = config.pop("grid", DEFAULT_GRID), VISUAL_TERMS[name]
    for key in config:
        raise RecipeError(f"objective '{name}' has no key '{key}'."
                          f"{nearest(key, ('name', 'weight', 'grid'))}")
    if type(grid) is not int or not least <= grid <= FINEST_GRID:
        raise RecipeError(f"objective.{name}.grid = {grid!r}, but it must be a whole number from "
                          f"{least} to {FINEST_GRID}.")
    return VisualTerm(name, weight, grid)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where} must be a name or a mapping with 'name', got {value!r:.60}.")
    return dict(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
