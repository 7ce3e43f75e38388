"""A language with a known law: the next symbol depends on the last two, and all laws are given.

V symbols, so V * V contexts; context c = V * a + b stands for "a, then b". Nothing that is said
about a model of it is an estimate: every figure is a sum over all contexts and symbols, weighted
by how often the language itself visits a context.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

HEAD = 0.5  # a context's head: its likeliest symbols, up to and with the one that passes this mass
TAIL = 0.98  # its junk: what comes after this mass
FLOOR = 1e-4  # mass that is spread evenly, so that every logarithm is finite
FIGURES = ("kl", "reverse_kl", "jeffreys", "tv", "entropy", "head", "junk")


@dataclass(frozen=True)
class Language:
    """The law of the next symbol after every context, [V * V, V] in float64."""

    law: Tensor

    @property
    def symbols(self) -> int:
        return self.law.shape[-1]

    @cached_property
    def weights(self) -> Tensor:
        """How often each context stands in a long text, [V * V]."""
        return stationary(self.law)

    @cached_property
    def head(self) -> Tensor:
        """1 where a symbol is in its context's head, [V * V, V]."""
        return self._by_mass(lambda before: before < HEAD)

    @cached_property
    def junk(self) -> Tensor:
        """1 where a symbol is one that the context (almost) never goes on with, [V * V, V]."""
        return self._by_mass(lambda before: before >= TAIL)

    def _by_mass(self, chosen: Callable[[Tensor], Tensor]) -> Tensor:
        """Marks symbols by the mass of those that are likelier in the same context."""
        mass, order = self.law.sort(dim=-1, descending=True, stable=True)
        inside = chosen(mass.cumsum(-1) - mass).to(self.law.dtype)
        return torch.zeros_like(self.law).scatter(-1, order, inside)

    def to(self, device: str) -> Language:
        return Language(self.law.to(device))


def make_language(symbols: int, seed: int = 0, width: int = 48, spread: float = 4.0) -> Language:
    """Laws from a random two-layer network over both symbols' random vectors.

    Close in meaning are contexts that share a symbol, so there is something to generalise over;
    `spread` makes them sharp (a few likely symbols and a long tail each).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    vectors, size = normal(2, symbols, 16), 32
    a, b = contexts(symbols)
    hidden = torch.cat([vectors[0][a], vectors[1][b]], -1) @ normal(size, width)
    logits = spread * torch.tanh(1.6 * hidden / math.sqrt(size)) @ normal(width, symbols)
    law = (logits / math.sqrt(width)).softmax(-1)
    return Language((1 - FLOOR) * law + FLOOR / symbols)


def contexts(symbols: int) -> tuple[Tensor, Tensor]:
    """First and second symbol of every context, both [V * V]."""
    every = torch.arange(symbols * symbols)
    return every // symbols, every % symbols


def stationary(law: Tensor, rounds: int = 10_000, tolerance: float = 1e-13) -> Tensor:
    """The weights [V * V] that one more symbol leaves as they are.

    Raises:
        ArithmeticError: no such weights were reached (a law that goes round in circles).
    """
    symbols = law.shape[-1]
    weights = law.new_full((symbols * symbols,), 1 / symbols**2)
    for _ in range(rounds):
        after = one_more(weights, law)
        if (after - weights).abs().sum() < tolerance:
            return after
        weights = after
    raise ArithmeticError(f"no stationary law within {rounds} rounds")


def one_more(weights: Tensor, law: Tensor) -> Tensor:
    """The weights [..., V * V] of contexts after one more symbol of a law [..., V * V, V]."""
    symbols = law.shape[-1]
    joint = (weights[..., None] * law).unflatten(-2, (symbols, symbols))
    return joint.sum(-3).flatten(-2)  # (a, b) then x is context (b, x)


def figures(language: Language, logits: Tensor) -> dict[str, Tensor]:
    """Exact figures of models of a language, each [...] float64.

    kl: KL(truth || model), reverse_kl: KL(model || truth), jeffreys: their sum, tv: total
    variation, entropy, and the model's mass on heads and on junk, all per symbol of a text that
    the language itself has written. In nats where they are divergences or entropies.

    Args:
        logits: [..., V * V, V], of every context.
    """
    log_q, p = logits.double().log_softmax(-1), language.law
    q, log_p = log_q.exp(), p.log()

    def mean(terms: Tensor) -> Tensor:
        return (terms.sum(-1) * language.weights).sum(-1)

    forward, reverse = mean(p * (log_p - log_q)), mean(q * (log_q - log_p))
    return {"kl": forward, "reverse_kl": reverse, "jeffreys": forward + reverse,
            "tv": mean((p - q).abs() / 2), "entropy": mean(-q * log_q),
            "head": mean(q * language.head), "junk": mean(q * language.junk)}
