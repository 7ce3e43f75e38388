"""The paper's theory on its own ground: distillation round after round in kernel regression.

In the basis of the kernel's eigenvectors (eigenvalues d), a round fits targets z as well as a
budget of error s allows: the fit is A z with A = D (lambda I + D)^-1, and lambda solves
||lambda (lambda I + D)^-1 z|| = s. Self-distillation hands the fit on as the next round's targets,
z_t = A z_(t-1), and every round shrinks them. TAID's targets are
z_t = (1 - t / T) A z_(t-1) + (t / T) z_0, so that ||z_t|| >= (t / T) ||z_0|| whatever happens.
Where ||z_t|| <= s the best fit is 0 (collapse): A = 0, and self-distillation never comes back.
Python's floats are float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Vector = Sequence[float]
ROUNDS = 200  # of bisection: the bracket then is as narrow as float64 has it


@dataclass(frozen=True)
class Case:
    """z0: first targets; d: eigenvalues; s: error allowed, sqrt(N epsilon); rounds: T."""

    name: str
    z0: tuple[float, ...]
    d: tuple[float, ...]
    s: float
    rounds: int

    @property
    def strength(self) -> float:
        """||z0|| / s."""
        return norm(self.z0) / self.s

    @property
    def condition(self) -> float:
        """Largest over smallest eigenvalue."""
        return max(self.d) / min(self.d)


CASES = (
    Case("strong signal", (4.0, 3.0, 2.0), (1.0, 0.5, 0.25), 0.3, 50),
    Case("weak signal", (1.0, 0.5, 0.25), (1.0, 0.5, 0.25), 0.3, 50),
)


@dataclass(frozen=True)
class Rounds:
    """Norms of z_0 to z_T, lambda of every round (None: collapsed), the first collapsed round."""

    norms: list[float]
    lambdas: list[float | None]

    def collapse(self, s: float) -> int | None:
        return next((t for t, size in enumerate(self.norms) if size <= s), None)


def norm(z: Vector) -> float:
    return math.sqrt(math.fsum(x * x for x in z))


def solve_lambda(z: Vector, d: Vector, s: float) -> float | None:
    """The lambda of one round; None where even the fit 0 is within the budget."""
    size = norm(z)
    if size <= s:
        return None
    # the solution of a single eigenvalue e is e s / (||z|| - s), and increasing in e
    low, high = (e * s / (size - s) for e in (min(d), max(d)))
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        left = norm([middle / (middle + e) * x for x, e in zip(z, d, strict=True)])
        low, high = (middle, high) if left < s else (low, middle)
    return (low + high) / 2


def run(case: Case, taid: bool) -> Rounds:
    """All rounds of one case: TAID, or plain self-distillation."""
    z, norms, lambdas = list(case.z0), [norm(case.z0)], []
    for t in range(1, case.rounds + 1):
        found = solve_lambda(z, case.d, case.s)
        lambdas.append(found)
        fit = [0.0 if found is None else e / (found + e) * x
               for x, e in zip(z, case.d, strict=True)]
        share = t / case.rounds if taid else 0.0
        z = [(1 - share) * f + share * x for f, x in zip(fit, case.z0, strict=True)]
        norms.append(norm(z))
    return Rounds(norms, lambdas)


def safe_rounds(case: Case) -> float:
    """Rounds that self-distillation survives for certain: (r0 - 1) / kappa (Mobahi et al.)."""
    return (case.strength - 1) / case.condition


def taid_safe_after(case: Case) -> float:
    """From this round on TAID cannot have collapsed, as (t / T) ||z0|| > s: T / r0."""
    return case.rounds / case.strength


def sufficient_strength(case: Case, gamma: float = 1.0) -> float:
    """||z0|| / s at which TAID never collapses: the root of (r0 - 1) / (kappa + gamma) = T / r0.

    Early rounds survive as in self-distillation, with gamma paid for the moving targets; from
    T / r0 on the floor holds.
    """
    return (1 + math.sqrt(1 + 4 * case.rounds * (case.condition + gamma))) / 2
