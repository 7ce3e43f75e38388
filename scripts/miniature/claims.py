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
from miniature.methods import POLICIES, SINCE
from miniature.pairs import START, Arms
from miniature.pooling import interval_of

Sign = Literal["<", ">"]
Verdict = Literal["reproduced", "tie", "not reproduced"]
OTHERS = ("SFT", "KL", "RKL", "JSD", "Skew KL", "Skew RKL", "TVD", "Adaptive KL", "Alpha-beta")
SAID_TO_DEGRADE = ("KL", "RKL", "Skew KL")
LABELS = {"jeffreys": "Jeffreys", "own_jeffreys": "own-text Jeffreys", "excess": "exposure bias",
          "entropy": "entropy", "head": "head mass", "junk": "junk mass"}


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


def exposure_claims(results: Results) -> list[Claim]:
    """`results`: "KL, off policy" -> result; none of it is in the paper."""
    part, claims = "exposure bias", list[Claim]()

    def claim(text: str, *contrasts: Contrast) -> None:
        claims.append(Claim(part, text, contrasts, paper=False))

    for name in ("KL", "RKL", "TAID"):
        off, half, on = (f"{name}, {policy}" for policy in POLICIES)
        claim(f"{name} off policy is further from the truth in its own texts than in the "
              "language's.", Contrast(f"exposure bias of {off}", ">",
                       interval(_values(results, off, "excess"))))
        claim(f"{name} on policy is nearer to the truth in its own texts than off policy.",
              _between(results, on, off, "own_jeffreys", "<"))
        claim(f"{name} with half of each is, too.",
              _between(results, half, off, "own_jeffreys", "<"))
        claim(f"{name} on policy has less exposure bias than off policy.",
              _between(results, on, off, "excess", "<"))
        claim(f"{name} on policy pays for it in the language's texts.",
              _between(results, on, off, "jeffreys", ">"))
    for other in ("KL", "RKL"):
        claim(f"On policy, TAID beats {other} in the student's own texts.",
              _between(results, "TAID, on policy", f"{other}, on policy", "own_jeffreys", "<"))
    return claims


def since_claims(results: Results) -> list[Claim]:
    """`results`: those of the objectives since TAID, and of KL and TAID."""
    return [Claim("objectives since TAID", f"{name} beats {other} (Jeffreys).",
                  [_between(results, name, other, "jeffreys", "<")], paper=False)
            for name in SINCE for other in ("KL", "TAID")]


def cut_claims(results: Results, truth: Mapping[str, Sequence[float]]) -> list[Claim]:
    """`results`: those of losses that see a few entries, and of KL and RKL."""
    def claim(text: str, *contrasts: Contrast) -> Claim:
        return Claim("a few entries of the law", text, contrasts, paper=False)

    alone, rest, draws = (f"KL, {signal}" for signal in ("top 4 alone", "top 4 and rest",
                                                         "4 draws"))
    head = truth["head"][0]
    return [
        claim("The top 4 alone are biased: less entropy than KL on whole laws.",
              _between(results, alone, "KL", "entropy", "<")),
        claim("With the rest, the top 4 beat the top 4 alone (Jeffreys).",
              _between(results, rest, alone, "jeffreys", "<")),
        claim("4 draws beat the top 4 alone (Jeffreys).",
              _between(results, draws, alone, "jeffreys", "<")),
        claim("With the rest, the top 4 are behind KL on whole laws (Jeffreys).",
              _between(results, rest, "KL", "jeffreys", ">")),
        claim("4 draws are behind KL on whole laws (Jeffreys).",
              _between(results, draws, "KL", "jeffreys", ">")),
        claim("Reverse KL over the top 4 alone collapses: less mass on heads than the truth.",
              _against(results, "RKL, top 4 alone", "head", head, "<")),
        claim("With the rest it does not: more mass on heads than the truth.",
              _against(results, "RKL, top 4 and rest", "head", head, ">")),
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
