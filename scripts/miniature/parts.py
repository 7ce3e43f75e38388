"""What is measured: jobs in two rounds, and the parts of results.json made of what they found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from miniature import claims, exact, pairs, theory
from miniature.claims import Claim
from miniature.crew import Jobs
from miniature.methods import CUT, EXPOSED, METHODS, SINCE
from miniature.scale import Scale

PARTS = ("language", "gap", "theory", "sweeps", "since", "cut", "exposure", "scenes", "pretrain")
SCRATCH = ("SFT", "KL", "RKL", "JSD", "TAID")  # trained from random weights, too
NEEDS_LANGUAGE = ("gap", "sweeps", "since", "cut")  # its learning rates, or what it has measured
TUNED = {"language": METHODS, "since": SINCE, "cut": CUT}  # alike, with the truth as the teacher
Found = Mapping[Any, Any]


@dataclass(frozen=True)
class Plan:
    """What to do; `data` holds the demo's worlds and models."""

    scale: Scale
    parts: tuple[str, ...]
    data: Path
    output: Path

    @property
    def texts(self) -> Path:
        return self.output / "pretrain"


def first_round(plan: Plan) -> Jobs:
    """Jobs that wait for nothing, the long ones first."""
    setup, models, jobs = plan.scale.exact, plan.scale.models, Jobs()
    if "pretrain" in plan.parts:
        jobs["prepare", "text"] = partial(pairs.prepare_text, models, plan.data, plan.texts)
    if "scenes" in plan.parts:
        jobs |= pairs.scene_jobs(models, plan.data, plan.output)
    jobs |= {(part, name): partial(exact.tuned, setup, name)
             for part, methods in TUNED.items() if part in plan.parts for name in methods}
    if "exposure" in plan.parts:
        jobs |= {("exposure", name): partial(exact.exposure, setup, name) for name in EXPOSED}
    if "language" in plan.parts:
        jobs["facts", "language"] = partial(exact.facts, setup)
    if "pretrain" in plan.parts:
        jobs |= {("scratch", name): partial(exact.tuned, setup, name, False) for name in SCRATCH}
    return jobs


def second_round(plan: Plan, found: Found) -> Jobs:
    """Jobs that need learning rates, or the texts and their teacher."""
    setup, models, jobs = plan.scale.exact, plan.scale.models, Jobs()
    if "pretrain" in plan.parts:
        jobs |= pairs.text_jobs(models, plan.texts)
    if "gap" in plan.parts:
        jobs |= {("gap", name): partial(exact.gap, setup, name, found["language", name]["rate"])
                 for name in METHODS if name != "SFT"}
        jobs["facts", "teachers"] = partial(exact.teacher_facts, setup)
    if "sweeps" in plan.parts:
        rate = found["language", "TAID"]["rate"]
        jobs |= {("sweeps", kind, value): partial(exact.sweep, setup, kind, value, rate)
                 for kind, values in exact.SWEEPS.items() for value in values}
    return jobs


@dataclass(frozen=True)
class Outcome:
    """The parts of results.json, and the claims."""

    parts: dict[str, Any]
    claims: list[Claim]


def assemble(plan: Plan, found: Found) -> Outcome:
    """Bring together what the jobs have found, part by part."""
    makers = {"language": _language, "gap": _gap, "theory": _theories, "sweeps": _sweeps,
              "since": _since, "cut": _cut, "exposure": _exposure, "scenes": _scenes,
              "pretrain": _pretrain}
    made = {name: makers[name](plan, found) for name in plan.parts}
    return Outcome({name: part for name, (part, _) in made.items()},
                   [claim for _, told in made.values() for claim in told])


Made = tuple[dict[str, Any], list[Claim]]


def _language(plan: Plan, found: Found) -> Made:
    facts, results = found["facts", "language"], _with_intervals(_under(found, "language"))
    return ({"facts": facts, "methods": results},
            claims.language_claims(results, facts["truth"]))


def _gap(plan: Plan, found: Found) -> Made:
    gaps = {name: [_with_interval(one) for one in each]
            for name, each in _under(found, "gap").items()}
    return {"teachers": found["facts", "teachers"], "methods": gaps}, claims.gap_claims(gaps)


def _theories(plan: Plan, found: Found) -> Made:
    """Worked out here, in milliseconds."""
    cases = {case.name: _theory(case) for case in theory.CASES}
    return cases, claims.theory_claims(cases)


def _sweeps(plan: Plan, found: Found) -> Made:
    kinds = {kind: _with_intervals({value: found["sweeps", kind, value] for value in values})
             for kind, values in exact.SWEEPS.items()}
    return kinds, claims.sweep_claims(kinds)


def _since(plan: Plan, found: Found) -> Made:
    results = _with_intervals(_under(found, "since"))
    return results, claims.since_claims({**_under(found, "language"), **results})


def _cut(plan: Plan, found: Found) -> Made:
    results = _with_intervals(_under(found, "cut"))
    return results, claims.cut_claims({**_under(found, "language"), **results},
                                      found["facts", "language"]["truth"])


def _exposure(plan: Plan, found: Found) -> Made:
    results = _with_intervals(_under(found, "exposure"))
    return results, claims.exposure_claims(results)


def _scenes(plan: Plan, found: Found) -> Made:
    arms = pairs.Arms("scenes", pairs.with_starts(found, "scenes", 1),
                      pairs.scene_truth(plan.data))
    return arms.as_json(), claims.arms_claims(arms, "instruction, scenes", "caption_kl",
                                              "caption KL to the truth")


def _pretrain(plan: Plan, found: Found) -> Made:
    arms = pairs.Arms("text", pairs.with_starts(found, "text", plan.scale.models.seeds), {})
    scratch = _with_intervals(_under(found, "scratch"))
    part = {"teacher": found["prepare", "text"], "text": arms.as_json(), "language": scratch}
    return part, [*claims.arms_claims(arms, "pre-training, plain text", "nll",
                                      "NLL of held-out text"), *claims.scratch_claims(scratch)]


def _under(found: Found, kind: str) -> dict[str, Any]:
    return {key[1]: result for key, result in found.items() if key[0] == kind}


def _with_interval(result: Mapping[str, Any]) -> dict[str, Any]:
    return {**result, "intervals": exact.summary(result)}


def _with_intervals(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _with_interval(result) for name, result in results.items()}


def _theory(case: theory.Case) -> dict[str, Any]:
    ways = {"self_distillation": theory.run(case, taid=False), "taid": theory.run(case, taid=True)}
    return {**asdict(case), "strength": case.strength, "condition": case.condition,
            "safe_rounds": theory.safe_rounds(case),
            "taid_safe_after": theory.taid_safe_after(case),
            "sufficient_strength": theory.sufficient_strength(case),
            **{name: {**asdict(way), "collapse_at": way.collapse(case.s)}
               for name, way in ways.items()}}
