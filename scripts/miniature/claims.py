"""The paper's claims, each as differences with a claimed sign, and what the measurements say.

The rule, the same for all: a claim is *reproduced* if the whole 95 % interval of each of its
differences lies on the claimed side of zero; *not reproduced* if the whole interval of any of them
lies on the other side; otherwise it is a *tie*. Nothing is corrected for how many claims there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from miniature.intervals import Interval, interval, paired
from miniature.pairs import START, Arms
from miniature.pooling import interval_of

Sign = Literal["<", ">"]
Verdict = Literal["reproduced", "tie", "not reproduced"]
OTHERS = ("SFT", "KL", "RKL", "JSD", "Skew KL", "Skew RKL", "TVD", "Adaptive KL", "Alpha-beta")
SAID_TO_DEGRADE = ("KL", "RKL", "Skew KL")
LABELS = {"jeffreys": "Jeffreys", "entropy": "entropy", "head": "head mass", "junk": "junk mass"}


@dataclass(frozen=True)
class Contrast:
    """A difference, and the side of zero that the claim puts it on."""

    name: str
    sign: Sign
    found: Interval

    @property
    def outcome(self) -> Literal["as claimed", "unclear", "opposite"]:
        above, below = self.found.low > 0, self.found.high < 0
        if not above and not below:
            return "unclear"
        return "as claimed" if above == (self.sign == ">") else "opposite"


@dataclass(frozen=True)
class Claim:
    """`paper`: False for what the paper does not say but a reader would ask next."""

    part: str
    text: str
    contrasts: Sequence[Contrast]
    paper: bool = True

    @property
    def verdict(self) -> Verdict:
        outcomes = {contrast.outcome for contrast in self.contrasts}
        if "opposite" in outcomes:
            return "not reproduced"
        return "tie" if "unclear" in outcomes else "reproduced"

    def as_json(self) -> dict[str, Any]:
        return {"part": self.part, "claim": self.text, "in_the_paper": self.paper,
                "verdict": self.verdict,
                "contrasts": [{"name": c.name, "claimed": f"{c.sign} 0", "outcome": c.outcome,
                               **c.found.as_json()} for c in self.contrasts]}


# ----- the exact language ------------------------------------------------------------------------

Results = Mapping[str, Mapping[str, Any]]  # method -> result


def _values(results: Results, method: str, figure: str) -> list[float]:
    return list(results[method]["figures"][figure])


def _between(results: Results, first: str, second: str, figure: str, sign: Sign) -> Contrast:
    return Contrast(f"{LABELS[figure]} of {first} − {second}", sign, paired(
        _values(results, first, figure), _values(results, second, figure)))


def _against(results: Results, method: str, figure: str, truth: float, sign: Sign) -> Contrast:
    return Contrast(f"{LABELS[figure]} of {method} − truth", sign, interval(
        [value - truth for value in _values(results, method, figure)]))


def language_claims(results: Results, truth: Mapping[str, Sequence[float]]) -> list[Claim]:
    true = {name: values[0] for name, values in truth.items()}
    part = "exact language"
    return [
        Claim(part, "Forward KL averages modes: more entropy and more junk than the truth.", [
            _against(results, "KL", "entropy", true["entropy"], ">"),
            _against(results, "KL", "junk", true["junk"], ">")]),
        Claim(part, "Reverse KL seeks modes: less entropy and more head than the truth.", [
            _against(results, "RKL", "entropy", true["entropy"], "<"),
            _against(results, "RKL", "head", true["head"], ">")]),
        Claim(part, "TAID balances the two: its entropy and its junk lie between theirs.", [
            contrast for figure in ("entropy", "junk") for contrast in (
                _between(results, "TAID", "KL", figure, "<"),
                _between(results, "TAID", "RKL", figure, ">"))]),
        Claim(part, "TAID beats forward KL (Jeffreys).", [
            _between(results, "TAID", "KL", "jeffreys", "<")]),
        Claim(part, "TAID beats every other objective (Jeffreys).", [
            _between(results, "TAID", other, "jeffreys", "<") for other in OTHERS]),
        Claim(part, "With t to 0.7 instead of 1, TAID beats forward KL (Jeffreys).", [
            _between(results, "TAID, t to 0.7", "KL", "jeffreys", "<")], paper=False),
    ]


def scratch_claims(results: Results) -> list[Claim]:
    return [Claim("pre-training, exact language", f"TAID beats {other} (Jeffreys).",
                  [_between(results, "TAID", other, "jeffreys", "<")])
            for other in results if other != "TAID"]


def gap_claims(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Claim]:
    """`results`: method -> one result per teacher, the worst teacher first."""
    part = "capacity gap"

    def step(method: str, later: int, earlier: int, sign: Sign) -> Contrast:
        found = {str(i): result for i, result in enumerate(results[method])}
        name = f"Jeffreys of {method}, teacher {later + 1} − teacher {earlier + 1}"
        return Contrast(name, sign, _between(
            found, str(later), str(earlier), "jeffreys", sign).found)

    last = len(results["TAID"]) - 1
    best = {method: each[-1] for method, each in results.items()}
    return [
        Claim(part, "TAID gets better with every better teacher (Jeffreys).",
              [step("TAID", i + 1, i, "<") for i in range(last)]),
        *[Claim(part, f"{method} gets worse from the worst to the best teacher (Jeffreys).",
                [step(method, last, 0, ">")]) for method in SAID_TO_DEGRADE],
        *[Claim(part, f"With the best teacher, TAID beats {method} (Jeffreys).",
                [_between(best, "TAID", method, "jeffreys", "<")]) for method in SAID_TO_DEGRADE],
    ]


def sweep_claims(results: Mapping[str, Results]) -> list[Claim]:
    alpha = results["alpha"]
    linear, paper = "linear (adaptive off)", "5e-4, as in the paper"
    return [
        Claim("schedule", "The adaptive t beats the linear one (Jeffreys; alpha: auto).",
              [_between(alpha, "auto", linear, "jeffreys", "<")]),
        Claim("schedule", "The same with the paper's constant alpha, in a run this short.",
              [_between(alpha, paper, linear, "jeffreys", "<")], paper=False),
        Claim("schedule", "Starting t at 0.4 beats starting at 0 (Jeffreys).",
              [_between(results["t_start"], "0.4", "0", "jeffreys", "<")], paper=False),
    ]


def theory_claims(cases: Mapping[str, Mapping[str, Any]]) -> list[Claim]:
    """Exact, so intervals have no width; the figure is the smallest norm beyond the budget s."""
    strong = cases["strong signal"]

    def margin(name: str) -> Interval:
        value = min(strong[name]["norms"]) - strong["s"]
        return Interval(value, 0.0, value, value, 1)

    return [Claim("theory", "Self-distillation collapses; TAID with a strong signal never does.", [
        Contrast("smallest norm beyond the budget, self-distillation", "<",
                 margin("self_distillation")),
        Contrast("smallest norm beyond the budget, TAID", ">", margin("taid"))])]


# ----- small models ------------------------------------------------------------------------------


def arms_claims(arms: Arms, part: str, figure: str, label: str) -> list[Claim]:
    """TAID against the start and every other arm, by one figure that is lower where better."""
    def against(other: str) -> Contrast:
        name = "its start" if other == START else other
        return Contrast(f"{label} of TAID − {name}", "<",
                        interval_of(arms.difference("TAID", other, figure)))

    return [Claim(part, f"TAID beats {'what it started from' if other == START else other} "
                  f"({label}).", [against(other)])
            for other in (START, *(arm for arm in arms.trained if arm != "TAID"))]
