"""`objective:` of a recipe: one class per loss, with the names it goes by and its parameters.

`{name: taid, t_start: 0.2}` is one loss, `{terms: [{name: taid}, {name: ce, weight: 0.1}]}` a
weighted sum; a bare name stands for `{name: ...}`. The function of a loss is in
`objectives/divergences.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self, Union, cast, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    create_model,
    model_validator,
)

from taid_vlm.config.kinds import (
    Finite,
    HalfOpen,
    Rate,
    Share,
    Weight,
    wanted,
)
from taid_vlm.config.messages import TAG
from taid_vlm.config.sampling import SamplingSpec
from taid_vlm.config.section import Section, check
from taid_vlm.errors import RecipeError, nearest


class Term(Section):
    """A loss.

    Args:
        name: Which loss, by any of its names.
        weight: What the loss is multiplied by.
    """

    bare: ClassVar[str] = "name"
    compares: ClassVar[bool] = True  # with the teacher

    name: str
    weight: Weight = 1.0

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The loss's own name, then others it is known by."""
        return get_args(cls.model_fields["name"].annotation)

    @classmethod
    def called(cls) -> str:
        return f" '{cls.names()[0]}'"

    @classmethod
    def parameters(cls) -> list[str]:
        """The keys that are the loss's own."""
        return [key for key in cls.model_fields if key not in Common.model_fields
                and key not in Term.model_fields]


# ----- losses per token ---------------------------------------------------------------------


class TokenTerm(Term):
    """A loss per token.

    Args:
        focus: Weighs a token by (1 - e^-loss)^focus, so that hard ones count more (of ce this is
            the focal loss, Lin et al., 2017); 0 weighs none.
        clip (nats): A token's loss is at most this, and above it has no gradient (OPSD clips at
            0.05); left out, it has no bound.
    """

    focus: Weight = 0.0
    clip: Rate | None = None


class ScheduleSpec(Section):
    """When TAID's t moves, and by how much (`objectives/schedule.py`).

    Args:
        t_start: t at the first step.
        t_end: t at the last step, at least t_start.
        alpha: Step size of the adaptive term; auto goes by the run's length.
        momentum: Decay of the running improvement (beta of the paper).
        adaptive: false leaves the linear schedule alone.
    """

    t_start: Share = 0.4
    t_end: Share = 1.0
    alpha: Annotated[Literal["auto"] | Weight, wanted("'auto' or a number >= 0")] = "auto"
    momentum: HalfOpen = 0.99
    adaptive: bool = True

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.t_start > self.t_end:
            raise ValueError(f"t_start = {self.t_start} is greater than t_end = {self.t_end}; t "
                             "only rises, so swap them.")
        return self


class Taid(TokenTerm, ScheduleSpec):
    """KL(p_t || q), p_t between student and teacher (TAID, Shing et al., ICLR 2025)."""

    name: Literal["taid"]

    def schedule(self) -> dict[str, Any]:
        """What of it is the schedule's."""
        return {key: getattr(self, key) for key in ScheduleSpec.model_fields
                if key in self.model_fields_set}


class Amid(TokenTerm):
    """KL(r || q), r a moving alpha-mixture of student and teacher (AMiD, Shin et al., 2026).

    r's probabilities are means of order (1 - alpha) / 2 of both models', normalised; t is the
    teacher's weight.

    Args:
        t_start: The teacher's share at the first step.
        t_end: The teacher's share at the last step, at least t_start.
        rate: Step size of the adaptive term (taid's alpha); auto goes by the run's length.
        momentum: Decay of the running improvement.
        adaptive: false leaves the linear schedule alone.
        alpha: Which mean: 1 the geometric one (taid), -1 the arithmetic one (skew towards the
            teacher), 3 the harmonic one.
    """

    name: Literal["amid", "alpha_mixture"]
    t_start: Share = 0.4
    t_end: Share = 1.0
    rate: Annotated[Literal["auto"] | Weight, wanted("'auto' or a number >= 0")] = "auto"
    momentum: HalfOpen = 0.99
    adaptive: bool = True
    alpha: Finite = 1.0

    @model_validator(mode="after")
    def _rising(self) -> Self:
        ScheduleSpec(t_start=self.t_start, t_end=self.t_end)
        return self

    def schedule(self) -> dict[str, Any]:
        """What of it is the schedule's, under the schedule's names."""
        names = {"rate": "alpha"}
        return {names.get(key, key): getattr(self, key) for key in self.model_fields_set
                if key in ("t_start", "t_end", "rate", "momentum", "adaptive")}


class ForwardKL(TokenTerm):
    """KL(p || q), the classic distillation loss (Hinton et al., 2015)."""

    name: Literal["forward_kl", "fkl", "kl"]


class ReverseKL(TokenTerm):
    """KL(q || p) (MiniLLM, Gu et al., 2024)."""

    name: Literal["reverse_kl", "rkl"]


class Jsd(TokenTerm):
    """Generalised Jensen-Shannon divergence (GKD, Agarwal et al., 2024).

    Args:
        beta: 0 is the forward and 1 the reverse KL.
    """

    name: Literal["jsd", "js", "gjs"]
    beta: Share = 0.5


class SkewKL(TokenTerm):
    """KL(p || lam p + (1 - lam) q) (DistiLLM, Ko et al., 2024).

    Args:
        lam: The teacher's share in the mixture.
    """

    name: Literal["skew_kl", "skl", "sfkl", "skew_fkl", "skew_forward_kl"]
    lam: HalfOpen = 0.1


class SkewRKL(TokenTerm):
    """KL(q || lam q + (1 - lam) p) (DistiLLM, Ko et al., 2024).

    Args:
        lam: The student's share in the mixture.
    """

    name: Literal["skew_rkl", "srkl", "skew_reverse_kl"]
    lam: HalfOpen = 0.1


class TotalVariation(TokenTerm):
    """Total variation distance (f-distill, Wen et al., 2023)."""

    name: Literal["tvd", "total_variation"]


class AdaptiveKL(TokenTerm):
    """Forward and reverse KL, weighted by the gaps in head and tail (Wu et al., 2024).

    Args:
        mu: The teacher's mass that counts as head.
    """

    name: Literal["adaptive_kl", "akl"]
    mu: Share = 0.5


class AlphaBeta(TokenTerm):
    """alpha-beta divergence (ABKD, Wang et al., 2025): (1, 0) is the forward KL, (0, 1) reverse.

    Args:
        alpha: Exponent of the teacher's probabilities.
        beta: Exponent of the student's probabilities.
    """

    name: Literal["alpha_beta", "ab", "abkd"]
    alpha: Finite = 0.2
    beta: Finite = 0.7


class ToDi(TokenTerm):
    """Forward and reverse KL, weighed entry by entry (ToDi, Jung et al., 2025)."""

    name: Literal["todi"]


class EntropySwitch(TokenTerm):
    """Forward KL where the teacher is unsure, reverse KL where it is not (after EOPD, 2026).

    Args:
        threshold (nats): The teacher's entropy from which on a token has the forward KL.
    """

    name: Literal["entropy_switch", "eopd"]
    threshold: Weight = 0.8


class CrossEntropy(TokenTerm):
    """Cross-entropy with the data's own tokens (SFT); alone it needs no teacher."""

    name: Literal["ce", "sft", "cross_entropy", "hard_label_ce"]
    compares = False


# ----- losses per image ---------------------------------------------------------------------


class VisualFeatures(Term):
    """1 - cosine of visual features, averaged over the cells of a grid.

    Args:
        grid: Cells along each side of an image.
    """

    name: Literal["visual_features"]
    grid: Annotated[int, Field(ge=1, le=32), wanted("a whole number from 1 to 32")] = 4


class VisualRelation(Term):
    """Squared differences of the cosines between all cells of an image.

    Args:
        grid: Cells along each side of an image.
    """

    name: Literal["visual_relation"]
    grid: Annotated[int, Field(ge=2, le=32), wanted("a whole number from 2 to 32")] = 4


# ----- losses on how the student works -------------------------------------------------------


class Router(Term):
    """Keeps the load of the student's experts even (Switch Transformers, Fedus et al., 2022)."""

    name: Literal["router", "router_aux", "load_balancing"]
    compares = False


SAMPLED_RKL = "sampled_rkl"  # of sampled answers alone (`objectives/estimates.py`)
ESTIMATES = (SAMPLED_RKL, "sampled_reverse_kl", "k1")
MOVING = ("taid", "amid")  # losses whose target moves with t
VISUAL = (VisualFeatures, VisualRelation)
TERMS: dict[str, type[Term]] = {kind.names()[0]: kind for kind in (
    Taid, Amid, ForwardKL, ReverseKL, Jsd, SkewKL, SkewRKL, TotalVariation, AdaptiveKL, AlphaBeta,
    ToDi, EntropySwitch, CrossEntropy, *VISUAL, Router)}
_CANONICAL = {alias: name for name, kind in TERMS.items() for alias in kind.names()}


def scheduled_keys(name: str) -> set[str]:
    """Those keys of a loss that say how its t moves."""
    if name == "taid":
        return {*ScheduleSpec.model_fields}
    return {*ScheduleSpec.model_fields, "rate"} - {"alpha"} if name in MOVING else set()


def canonical_name(name: object, valid: Mapping[str, str] = _CANONICAL) -> str:
    """Resolve a loss's name or alias; raises RecipeError with the nearest valid name."""
    key = str(name).lower().replace("-", "_").replace(" ", "_")
    if key not in valid:
        raise RecipeError(f"unknown loss '{name}'.{nearest(key, valid)}")
    return valid[key]


# ----- the objective ------------------------------------------------------------------------


class TokenWeights(Section):
    """Let tokens count more that the teacher needs the image for.

    Args:
        name: How tokens are weighed.
        strength: A token counts up to 1 + strength; the loss is not divided by the weights.
    """

    bare: ClassVar[str] = "name"

    name: Literal["visual_advantage"]
    strength: Weight = 1.0


class OnPolicy(SamplingSpec):
    """Learn part of the records from answers that the student gives itself, as it is at that step
    (GKD, Agarwal et al., 2024).

    Args:
        objective: For sampled answers; left out, the terms that compare with the teacher.
            sampled_rkl (k1) is the reverse KL's estimate from the sampled tokens alone.
    """

    objective: Annotated[str | dict[str, Any] | None, AfterValidator(lambda x: _for_sampled(x))] = \
        None

    @model_validator(mode="after")
    def _drawn_from_the_student(self) -> Self:
        drawn = {"temperature": 1.0, "top_p": 1.0, "max_age": 0}
        for key, value in drawn.items() if self.objective == SAMPLED_RKL else ():
            if getattr(self, key) != value:
                raise ValueError(f".objective = '{SAMPLED_RKL}' is the reverse KL on average only "
                                 "if answers are drawn as likely as the student finds them, and "
                                 f"{key} = {getattr(self, key):g}; set it to {value:g}.")
        return self


def _for_sampled(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, str) and value.lower().replace("-", "_") in ESTIMATES:
        return SAMPLED_RKL
    spec = read_objective(value)
    if spec.on_policy is not None:
        raise ValueError(".on_policy inside on_policy.objective has no meaning; take it out.")
    if not all(term.compares for term in spec.losses):
        raise ValueError(" has a term on the data (ce), but a sampled answer is no reference; "
                         "take it out.")
    if any(isinstance(term, VISUAL) for term in spec.losses):
        raise ValueError(" has a term on images, which answers do not change; take it out.")
    return value


class Common(Section):
    """What holds for all losses of an objective.

    Args:
        kd_temperature: Divides the logits of both models; losses are multiplied by its square. Not
            for ce.
        alignment: How models of different tokenizers may be compared; auto takes the most exact
            way.
        token_weights: Which tokens count more; {name: visual_advantage, strength: 1}.
        on_policy: Sample part of the answers from the student; {lmbda: 0.5, max_new_tokens: 128}.
    """

    kd_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False), wanted("positive")] = 1.0
    alignment: Literal["auto", "exact", "shared", "chunks"] = "auto"
    token_weights: TokenWeights | None = None
    on_policy: OnPolicy | None = None

    @property
    def losses(self) -> tuple[Term, ...]:
        return tuple(self.terms) if isinstance(self, Sum) else (cast(Term, self),)

    @property
    def needs_teacher(self) -> bool:
        return any(term.compares for term in self.losses)


def _named(value: Any) -> Any:
    value = {"name": value} if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise ValueError(f"a term must be a name or a mapping with 'name', got {value!r:.60}.")
    if "name" not in value:
        raise ValueError("every objective term needs a 'name'.")
    return {**value, "name": canonical_name(value["name"])}


def _tag(value: Any) -> str:
    return TAG + str(value.get("name", "terms"))


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(" must be a list of {name: ..., weight: ...}.")
    return list(value)


def _different(terms: list[Term]) -> list[Term]:
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise ValueError(f" names a loss twice: {', '.join(names)}.")
    return terms


_AnyTerm: Any = Annotated[
    Union[tuple(Annotated[kind, Tag(TAG + name)]  # noqa: UP007
                for name, kind in TERMS.items())],
    Discriminator(_tag), BeforeValidator(_named)]


class Sum(Common):
    """A weighted sum of losses.

    Args:
        terms: The losses, each by its name or as a mapping with `name`.
    """

    terms: Annotated[list[_AnyTerm], BeforeValidator(_listed), AfterValidator(_different)]


def _formed(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, Mapping) and "name" in value):
        return _named(value)
    if not isinstance(value, Mapping):
        raise ValueError(f" must be a name or a mapping with 'name', got {value!r:.60}.")
    if "terms" not in value:
        raise ValueError(" needs a 'name' (for example taid) or a list of 'terms'.")
    for key in value:
        if any(key in kind.model_fields for kind in TERMS.values()):
            raise ValueError(f"'{key}' stands beside 'terms'; put it into the term.")
    return value


def _sensible(objective: Common) -> Common:
    per_token = [term for term in objective.losses if not isinstance(term, (*VISUAL, Router))]
    if not per_token:
        named = ", ".join(term.name for term in objective.losses)
        raise ValueError(f" has {named} only, which says nothing about answers; add a loss on "
                         "tokens, for example taid.")
    weighed = objective.token_weights is not None and objective.token_weights.strength > 0
    if weighed and not any(term.compares for term in per_token):
        raise ValueError(".token_weights weighs the terms that compare with the teacher, and "
                         "there is none; add one, for example taid.")
    if objective.on_policy is not None and not any(term.compares for term in per_token):
        raise ValueError(".on_policy compares sampled answers with the teacher, and no term does; "
                         "add one, for example reverse_kl.")
    return objective


# a single loss may have the keys of the whole objective beside its own
ALONE: dict[str, Any] = {name: create_model(f"{kind.__name__}Alone", __base__=(Common, kind),
                                            __doc__=kind.__doc__) for name, kind in TERMS.items()}
ObjectiveSpec: Any = Annotated[
    Union[tuple(Annotated[kind, Tag(TAG + name)]  # noqa: UP007
                for name, kind in {**ALONE, "terms": Sum}.items())],
    Discriminator(_tag), BeforeValidator(_formed), AfterValidator(_sensible)]


@cache
def _adapter() -> TypeAdapter[Common]:
    return TypeAdapter(ObjectiveSpec)


def read_objective(value: Any) -> Common:
    """Check an objective; raises RecipeError with the key, the value and what would be valid."""
    return check(_adapter(), value, at=["objective"])
