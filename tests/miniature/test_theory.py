"""Rounds of kernel regression against figures of an independent program, and against its bounds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from miniature import theory

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "rounds.json").read_text())["cases"]
PAIRS = list(zip(theory.CASES, GOLDEN, strict=True))


def random_case(seed: int) -> theory.Case:
    rng = random.Random(seed)
    d = tuple(rng.uniform(0.2, 1.0) for _ in range(4))
    z0 = tuple(rng.gauss(0, 3) for _ in range(4))
    return theory.Case(str(seed), z0, d, rng.uniform(0.05, 0.4), rng.choice((10, 30, 60)))


@pytest.mark.parametrize(("case", "golden"), PAIRS, ids=lambda x: getattr(x, "name", ""))
def test_norms_and_lambdas_are_those_of_an_independent_program(case, golden):
    assert (list(case.z0), list(case.d), case.s, case.rounds) == tuple(
        golden[key] for key in ("z0", "d", "s", "T"))
    plain, taid = theory.run(case, taid=False), theory.run(case, taid=True)
    assert plain.norms == pytest.approx(golden["sd_norms"], rel=1e-10, abs=1e-14)
    assert taid.norms == pytest.approx(golden["taid_norms"], rel=1e-10)
    assert [x is None for x in taid.lambdas] == [x is None for x in golden["taid_lambdas"]]
    for ours, theirs in zip(taid.lambdas, golden["taid_lambdas"], strict=True):
        assert ours is None or ours == pytest.approx(theirs, rel=1e-10)


@pytest.mark.parametrize(("case", "golden"), PAIRS, ids=lambda x: getattr(x, "name", ""))
def test_collapse_and_bounds_are_those_of_an_independent_program(case, golden):
    assert theory.run(case, taid=False).collapse(case.s) == golden["sd_collapse_at"]
    assert theory.run(case, taid=True).collapse(case.s) == golden["taid_collapse_at"]
    assert theory.safe_rounds(case) == pytest.approx(golden["sd_bound_rounds"])
    assert theory.taid_safe_after(case) == pytest.approx(golden["taid_safe_after"])
    assert theory.sufficient_strength(case) == pytest.approx(golden["r0_sufficient_gamma1"])


def test_the_named_case_collapses_in_round_19_and_never_with_taid():
    strong = theory.CASES[0]
    taid = theory.run(strong, taid=True)
    assert theory.run(strong, taid=False).collapse(strong.s) == 19
    assert taid.collapse(strong.s) is None
    assert min(taid.norms) == pytest.approx(4.108, abs=5e-4) and taid.norms.index(
        min(taid.norms)) == 8


@pytest.mark.parametrize("seed", range(12))
def test_every_lambda_solves_its_equation(seed):
    case = random_case(seed)
    found = theory.solve_lambda(case.z0, case.d, case.s)
    left = [found / (found + e) * x for x, e in zip(case.z0, case.d, strict=True)]
    assert theory.norm(left) == pytest.approx(case.s, rel=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_the_floor_and_the_bounds_hold_where_they_are_promised(seed):
    case = random_case(seed)
    plain, taid = theory.run(case, taid=False), theory.run(case, taid=True)
    size = theory.norm(case.z0)
    assert all(found >= t / case.rounds * size * (1 - 1e-12) for t, found in enumerate(taid.norms))
    collapse = plain.collapse(case.s)
    assert collapse is None or collapse > theory.safe_rounds(case)
    late = [t for t, found in enumerate(taid.norms) if found <= case.s]
    assert all(t <= theory.taid_safe_after(case) for t in late)
    if case.strength >= theory.sufficient_strength(case):
        assert not late


def test_a_collapsed_fit_is_zero_and_self_distillation_stays_there():
    weak = theory.CASES[1]
    plain = theory.run(weak, taid=False)
    assert plain.lambdas[3:] == [None] * 47 and plain.norms[4:] == [0.0] * 47
    assert theory.run(weak, taid=True).norms[-1] == pytest.approx(theory.norm(weak.z0))
