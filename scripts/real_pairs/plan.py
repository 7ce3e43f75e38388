"""Pairs, methods and blocks of arms, in the order of their worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

RATES = (2e-4, 5e-4, 1.2e-3)  # every method chooses among these
TUNING = Fraction(1, 5)  # of an arm's steps
TUNING_SEED = 1000  # no seed of a result


@dataclass(frozen=True)
class Pair:
    """keep: layers of the teacher that the student has, a share of them or a number; other: whether
    the teacher is --other, and the student cut from --teacher."""

    title: str
    keep: Fraction | int
    data: str = "gsm8k"
    other: bool = False


@dataclass(frozen=True)
class Method:
    """objective: of a recipe. signal: cached hidden states, cached top entries, the live teacher,
    or none. like: whose learning rate it takes; its own name where it is tuned."""

    title: str
    objective: Any
    signal: str = "hidden"
    like: str = ""


@dataclass(frozen=True)
class Block:
    """Methods on one pair, for `length` times the steps."""

    title: str
    pair: str
    methods: tuple[str, ...]
    length: Fraction = Fraction(1)
    again: bool = False  # the first method's first seed once more


@dataclass(frozen=True)
class Arm:
    """One run. rate: a candidate in tuning; None for a result, which takes the rate chosen."""

    pair: str
    method: str
    steps: int
    seed: int
    rate: float | None = None
    again: bool = False

    @property
    def name(self) -> str:
        which = f"seed-{self.seed}" if self.rate is None else f"rate-{self.rate:g}"
        return f"{self.pair}/{self.method}/{self.steps}/{which}{'-again' if self.again else ''}"


PAIRS = {
    "half": Pair("half of the teacher's layers", Fraction(1, 2)),
    "quarter": Pair("a quarter of the teacher's layers", Fraction(1, 4)),
    "two": Pair("two of the teacher's layers", 2),
    "text": Pair("half of the teacher's layers, plain text", Fraction(1, 2), "text"),
    "other": Pair("half of --teacher's layers; the teacher is --other, with another tokenizer",
                  Fraction(1, 2), "text", other=True),
}


def _own_answers(loss: str) -> dict[str, Any]:
    return {"name": loss, "on_policy": {"lmbda": 0.5, "max_new_tokens": 64}}


METHODS = {
    "sft": Method("SFT", "ce", "none"),
    "kl": Method("KL", "forward_kl"),
    "rkl": Method("RKL", "reverse_kl"),
    "jsd": Method("JSD", "jsd"),
    "skew": Method("skew KL", "skew_kl"),
    "taid": Method("TAID", "taid"),
    "amid": Method("AMiD, alpha 0", {"name": "amid", "alpha": 0.0}),
    "taid-at-kl": Method("TAID at KL's rate", "taid", like="kl"),
    "kl-at-taid": Method("KL at TAID's rate", "forward_kl", like="taid"),
    "kl+sft": Method("KL + 0.2 SFT", {"terms": ["forward_kl", {"name": "ce", "weight": 0.2}]},
                     like="kl"),
    "taid+sft": Method("TAID + 0.2 SFT", {"terms": ["taid", {"name": "ce", "weight": 0.2}]},
                       like="taid"),
    "taid-linear": Method("TAID, linear t", {"name": "taid", "adaptive": False}, like="taid"),
    "taid-low": Method("TAID, t from 0.2", {"name": "taid", "t_start": 0.2}, like="taid"),
    "taid-end": Method("TAID, t to 0.7", {"name": "taid", "t_end": 0.7}, like="taid"),
    "taid-alpha": Method("TAID, alpha 5e-4", {"name": "taid", "alpha": 5e-4}, like="taid"),
    "kl-live": Method("KL, live teacher", "forward_kl", "live", "kl"),
    "kl-top": Method("KL, cached top 64 and the rest", "forward_kl", "top", "kl"),
    "taid-top": Method("TAID, cached top 64 and the rest", "taid", "top", "taid"),
    "taid-own": Method("TAID, half on policy", _own_answers("taid"), "live", "taid"),
    "kl-own": Method("KL, half on policy", _own_answers("forward_kl"), "live", "kl"),
}
OFF_POLICY = ("kl", "taid", "sft", "rkl", "jsd", "skew", "amid")
BLOCKS = {
    "main": Block("The objectives", "half", OFF_POLICY),
    "again": Block("One arm once more", "half", ("kl",), again=True),
    "swapped": Block("Each at the other's rate", "half", ("taid-at-kl", "kl-at-taid")),
    "two": Block("A large gap", "two", ("kl", "taid", "sft")),
    "data": Block("With a term on the data", "half", ("taid+sft", "kl+sft")),
    "schedule": Block("Schedules of TAID", "half",
                      ("taid-linear", "taid-low", "taid-end", "taid-alpha")),
    "short": Block("A third of the steps", "half", ("kl", "taid"), Fraction(1, 3)),
    "policy": Block("On policy", "half", ("taid-own", "kl-own")),
    "signals": Block("Forms of the teacher's signal", "half", ("kl-live", "kl-top", "taid-top")),
    "text": Block("Plain text", "text", ("kl", "taid", "sft")),
    "quarter": Block("A gap between", "quarter", ("kl", "taid", "sft")),
    "long": Block("Three times the steps", "half", ("kl", "taid"), Fraction(3)),
    "other": Block("Another tokenizer", "other", ("kl", "taid", "sft")),
}


def tuned_as(method: str) -> str:
    return METHODS[method].like or method


def tuning_arms(pair: str, method: str, steps: int) -> list[Arm]:
    """The candidates for a method's rate on a pair; steps: of an arm of the block `main`."""
    short = max(1, round(steps * TUNING))
    return [Arm(pair, tuned_as(method), short, TUNING_SEED, rate) for rate in RATES]


def block_arms(block: Block, steps: int, seeds: int) -> list[Arm]:
    """A block's results, method by method; one whose seeds are all there can be compared."""
    length = max(1, round(steps * block.length))
    if block.again:
        return [Arm(block.pair, block.methods[0], length, 0, again=True)]
    return [Arm(block.pair, method, length, seed)
            for method in block.methods for seed in range(seeds)]


def all_arms(blocks: Sequence[str], steps: int, seeds: int) -> Iterator[Arm]:
    """Every arm once, a method's rate before its first result."""
    before: set[Arm] = set()
    for block in map(BLOCKS.__getitem__, blocks):
        for arm in block_arms(block, steps, seeds):
            for each in (*tuning_arms(arm.pair, arm.method, steps), arm):
                if each not in before:
                    before.add(each)
                    yield each


def best_rate(figures: Mapping[float, float]) -> float:
    """The rate with the lowest figure on validation records."""
    return min(figures, key=lambda rate: figures[rate])
