"""The reverse KL from sampled tokens alone: its mean over all tokens is the exact one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from training.runs import make_trainer

from taid_vlm.alignment import VocabularyMap
from taid_vlm.alignment.vocabulary import SideMap
from taid_vlm.batch.losses import token_losses
from taid_vlm.batch.sparse import SparseSignal, sparse_losses
from taid_vlm.errors import RecipeError
from taid_vlm.objectives import divergence, parse_objective, sampled_reverse_kl

OBJECTIVE = parse_objective({"name": "rkl", "on_policy": {"objective": "k1"}}).sampled
assert OBJECTIVE is not None


def logits(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(1, width, dtype=torch.float64, generator=generator)).requires_grad_()


def test_it_is_the_textbooks_estimate_and_policy_gradient() -> None:
    s, u = logits(9, 0), logits(9, 1)
    token = torch.tensor([4])
    log_q, log_p = s.log_softmax(-1)[0, token], u.log_softmax(-1)[0, token]
    loss = sampled_reverse_kl(log_q, log_p)
    torch.testing.assert_close(loss, log_q - log_p, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), s, retain_graph=True)
    q = s.detach().softmax(-1)
    hot = torch.zeros_like(q).index_fill(1, token, 1.0)
    torch.testing.assert_close(gradient, (log_q - log_p).detach() * (hot - q), rtol=0, atol=1e-15)
    assert torch.autograd.grad(loss.sum(), u, allow_unused=True, retain_graph=True) == (None,)


def mean_over_all_tokens(loss: Tensor, s: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Of losses of every token [V], and of their gradients, each as often as it is drawn."""
    total = (q * loss).sum()
    return total, torch.autograd.grad(total, s, retain_graph=True)[0]


def exact(s: Tensor, u: Tensor, vocabulary: VocabularyMap | None = None) -> tuple[Tensor, Tensor]:
    mapped = (s, u) if vocabulary is None else (
        vocabulary.map_student(s), vocabulary.map_teacher(u))
    kl = divergence("reverse_kl", *mapped)[0]
    return kl, torch.autograd.grad(kl, s)[0]


@pytest.mark.parametrize("seed", range(4))
def test_its_mean_is_the_reverse_kl_and_its_gradient(seed: int) -> None:
    """Every token weighed by the student's own probability, which gets no gradient."""
    s, u = logits(50, seed), logits(50, seed + 9)
    log_q = s.log_softmax(-1)[0]
    loss = sampled_reverse_kl(log_q, u.log_softmax(-1)[0])
    for mean, whole in zip(mean_over_all_tokens(loss, s, log_q.detach().exp()), exact(s, u),
                           strict=True):
        torch.testing.assert_close(mean, whole, rtol=0, atol=1e-13)


def side(shared: list[int], rest: list[int], padding: list[int]) -> SideMap:
    return SideMap(*(torch.tensor(ids, dtype=torch.long) for ids in (shared, rest, padding)))


def test_through_a_vocabulary_map_it_is_that_of_the_entries() -> None:
    """Tokens of the student alone stand for the rest; rows without a token are never drawn."""
    vocabulary = VocabularyMap(side([1, 0, 4], [2, 3], []), side([0, 2, 3], [1, 4], [5]), False,
                               True)
    s, u = logits(6, 0), logits(5, 1)
    q = torch.cat([s[:, :5].detach().softmax(-1)[0], s.new_zeros(1)])
    batch = {"labels": torch.arange(6), "map_index": torch.zeros(6, dtype=torch.long)}
    losses = token_losses(OBJECTIVE, batch, s.expand(6, -1), u.expand(6, -1),
                          SimpleNamespace(maps=(vocabulary,)))["sampled_rkl"]
    assert losses[5] == 0  # no entry
    for mean, whole in zip(mean_over_all_tokens(losses, s, q), exact(s, u, vocabulary),
                           strict=True):
        torch.testing.assert_close(mean, whole, rtol=0, atol=1e-13)


def test_of_a_served_teacher_it_needs_the_tokens_own_probability() -> None:
    s, u = logits(12, 2), logits(12, 3)
    own = u.detach().log_softmax(-1)[0]
    signal = SparseSignal(torch.zeros(12, 1, dtype=torch.long), own[:1].expand(12, 1),
                          torch.zeros(12), own)
    batch = {"labels": torch.arange(12)}
    losses = sparse_losses(OBJECTIVE, batch, s.expand(12, -1), signal, None)["sampled_rkl"]
    q = s.detach().softmax(-1)[0]
    for mean, whole in zip(mean_over_all_tokens(losses, s, q), exact(s, u), strict=True):
        torch.testing.assert_close(mean, whole, rtol=0, atol=1e-13)


def test_a_run_learns_from_sampled_tokens_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2, logging_steps=1, kinds=["text"], objective={
        "name": "taid", "on_policy": {"max_new_tokens": 8, "objective": "sampled_rkl"}})
    trainer.train()
    line = next(log for log in trainer.state.log_history if "loss/sampled_rkl" in log)
    assert abs(line["loss/sampled_rkl"]) < 20 and line["on_policy/kl"] > 0
    assert trainer._steps["sampled"].report()["name"] == "reference"


@pytest.mark.parametrize(("own", "message"), [
    ({"temperature": 0.7}, "temperature = 0.7; set it to 1"),
    ({"top_p": 0.9}, "top_p = 0.9"), ({"max_age": 2}, "max_age = 2; set it to 0"),
])
def test_answers_drawn_otherwise_are_refused(own: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_objective({"name": "rkl", "on_policy": {"objective": "sampled_rkl", **own}})
