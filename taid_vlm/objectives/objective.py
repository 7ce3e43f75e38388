"""An objective: a weighted sum of per-token losses with one temperature and one schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from taid_vlm.errors import RecipeError, nearest
from taid_vlm.objectives.divergences import (
    LOSSES,
    canonical_name,
    check_parameters,
    divergence,
)
from taid_vlm.objectives.schedule import TaidSchedule

SCHEDULE_KEYS = ("t_start", "t_end", "alpha", "momentum", "adaptive")


@dataclass(frozen=True)
class Term:
    """One loss of the sum; `schedule` holds TaidSchedule's arguments for the TAID term."""

    name: str
    weight: float = 1.0
    parameters: Mapping[str, float] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """What the student is trained on; build it with `parse_objective`."""

    terms: tuple[Term, ...]
    kd_temperature: float = 1.0

    @property
    def needs_teacher(self) -> bool:
        return any(LOSSES[term.name].needs_teacher for term in self.terms)

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
            else:
                logits = student_logits if own_logits is None else own_logits
                losses[term.name] = divergence(term.name, logits, None, labels=labels)
        return losses

    def weighted(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the terms (any shape)."""
        return sum((term.weight * losses[term.name] for term in self.terms[1:]),
                   start=self.terms[0].weight * losses[self.terms[0].name])


def parse_objective(config: str | Mapping[str, Any]) -> Objective:
    """Read an objective from a recipe.

    `{name: taid, t_start: 0.2}` is one term; `{terms: [{name: taid}, {name: ce, weight: 0.1}],
    kd_temperature: 2}` a weighted sum. A bare name works too.

    Raises:
        RecipeError: unknown names or keys (with the nearest valid one), values out of range.
    """
    if isinstance(config, str):
        config = {"name": config}
    config = _mapping(config, "objective")
    temperature = config.pop("kd_temperature", 1.0)
    if not _is_number(temperature) or not temperature > 0:
        raise RecipeError(f"objective.kd_temperature = {temperature!r}, but it must be positive.")
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
    return Objective(_parse_terms(listed), float(temperature))


def _parse_terms(listed: Any) -> tuple[Term, ...]:
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise RecipeError("objective.terms must be a list of {name: ..., weight: ...}.")
    terms = tuple(_parse_term({"name": t} if isinstance(t, str) else _mapping(t, "a term"))
                  for t in listed)
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise RecipeError(f"objective.terms names a loss twice: {', '.join(names)}.")
    return terms


def _parse_term(config: dict[str, Any]) -> Term:
    if "name" not in config:
        raise RecipeError("every objective term needs a 'name'.")
    name = canonical_name(config.pop("name"))
    weight = config.pop("weight", 1.0)
    if not _is_number(weight) or weight < 0:
        raise RecipeError(f"objective.{name}.weight = {weight!r}, but it must be >= 0.")
    if name != "taid":
        check_parameters(name, config)
        return Term(name, float(weight), config)
    for key in config:
        if key not in SCHEDULE_KEYS:
            raise RecipeError(f"objective 'taid' has no key '{key}'.{nearest(key, SCHEDULE_KEYS)}")
    try:
        TaidSchedule(1, **config)  # the values are checked before anything is loaded
    except RecipeError as error:
        raise RecipeError(f"objective: {error}") from None
    return Term(name, float(weight), {}, config)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where} must be a name or a mapping with 'name', got {value!r:.60}.")
    return dict(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
