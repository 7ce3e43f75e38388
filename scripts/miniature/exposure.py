"""Exposure bias: how far a model is from the truth in the texts that it writes itself.

A model learns after contexts of the language and then goes on after its own. Begun with a context
of the language, the weights with which it comes to every context at its n-th symbol follow from
its own laws: nothing is drawn, so that all figures are exact for any model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miniature.language import Language, figures, one_more

LENGTH = 64  # symbols of a text, in training and here
POSITIONS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)  # of the curves


def exposed(language: Language, logits: Tensor) -> dict[str, Tensor]:
    """`figures`, and beside them those of LENGTH symbols of the model's own texts, each [...].

    own_kl, own_reverse_kl, own_jeffreys: nats per symbol. LENGTH times own_reverse_kl is
    KL(model || truth) of whole texts. excess: own_jeffreys minus jeffreys.
    """
    forward, reverse = along(language, logits)
    own = {"own_kl": forward.mean(-1), "own_reverse_kl": reverse.mean(-1)}
    own["own_jeffreys"] = own["own_kl"] + own["own_reverse_kl"]
    standard = figures(language, logits)
    return {**standard, **own, "excess": own["own_jeffreys"] - standard["jeffreys"]}


def along(language: Language, logits: Tensor) -> tuple[Tensor, Tensor]:
    """KL(truth || model) and KL(model || truth) at every symbol of its own texts, [..., LENGTH]."""
    log_q, p = logits.double().log_softmax(-1), language.law
    q, log_p = log_q.exp(), p.log()
    each = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    weights, visited = language.weights.expand(q.shape[:-1]), list[Tensor]()
    for _ in range(LENGTH):
        visited.append(weights)
        weights = one_more(weights, q)
    forward, reverse = (torch.stack([(w * kl).sum(-1) for w in visited], -1) for kl in each)
    return forward, reverse


class OwnTexts:
    """Texts that R students write, `number` each: begun after a context of the language, gone on
    with by one symbol a step as the student is then, and begun anew after LENGTH symbols."""

    def __init__(self, language: Language, runs: int, number: int, seed: int) -> None:
        self.weights, self.symbols = language.weights.cpu(), language.symbols
        self.device = language.law.device
        self.generator = torch.Generator().manual_seed(seed)
        self.context = self._begun(runs, number)
        self.age = torch.arange(number, device=self.device) % LENGTH  # not all end at once

    def _begun(self, runs: int, number: int) -> Tensor:
        drawn = torch.multinomial(self.weights, runs * number, True, generator=self.generator)
        return drawn.view(runs, number).to(self.device)

    def go_on(self, logits: Tensor) -> None:
        """Every text by one symbol, drawn from logits [R, number, V]."""
        noise = torch.rand(logits.shape, generator=self.generator).to(self.device)
        said = (logits - (-noise.clamp(min=1e-30).log()).log()).argmax(-1)
        following = self.context % self.symbols * self.symbols + said
        self.age = (self.age + 1) % LENGTH
        self.context = torch.where(self.age == 0, self._begun(*following.shape), following)
