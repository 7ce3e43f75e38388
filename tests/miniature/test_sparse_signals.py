"""A teacher's law cut down to a few entries, on a language whose laws are all known."""

from __future__ import annotations

import pytest
import torch
from fusing import side
from miniature.language import make_language
from torch import Tensor

from taid_vlm import divergence
from taid_vlm.alignment import Pairing, VocabularyMap
from taid_vlm.batch.sparse import EntrySignal, sparse_pair
from taid_vlm.errors import TaidError
from taid_vlm.objectives import parse_objective
from taid_vlm.teachers import SparseSignal
from taid_vlm.teachers.sparse import Signal, cut_down, drawn

SYMBOLS = 8
LAW = make_language(SYMBOLS).law.float()
STUDENT = torch.randn(len(LAW), SYMBOLS, generator=torch.Generator().manual_seed(1))
ALL = side("0 1 2 3 4 5 6 7", "", 8)
SAME = VocabularyMap(ALL, ALL, True, False)
# the student's ids are turned around, two tokens of either side are the other's rest, two padding
SHARED = VocabularyMap(side("0 1 2 3 4 5", "6 7", 8), side("5 4 3 2 1 0", "6 7", 10),
                       False, True)


def kept(vocabulary: VocabularyMap, signal: Signal, seed: bytes = b"language") -> SparseSignal:
    pairing = Pairing("b", "a language", (vocabulary,))
    tensors = cut_down(signal, pairing, torch.zeros(len(LAW), dtype=torch.long), LAW.log(), seed)
    return EntrySignal(tensors["entries"].long(), tensors["log_probs"], tensors["log_rest"])


def gradient(
    vocabulary: VocabularyMap, signal: SparseSignal | None, loss: str = "forward_kl",
    **options: float,
) -> Tensor:
    width = 8 if vocabulary.identity else 10
    s = torch.zeros(len(LAW), width)
    s[:, :SYMBOLS] = STUDENT
    s.requires_grad_()
    pair = (vocabulary.map_student(s), vocabulary.map_teacher(LAW.log())) if signal is None else \
        sparse_pair(vocabulary, s, signal)
    (found,) = torch.autograd.grad(divergence(loss, *pair, **options).sum(), s)
    return found


@pytest.mark.parametrize("vocabulary", [SAME, SHARED], ids=["same", "shared"])
@pytest.mark.parametrize(("loss", "options"), [("forward_kl", {}), ("taid", {"t": 0.3})])
def test_all_entries_are_the_dense_law(
    vocabulary: VocabularyMap, loss: str, options: dict[str, float]
) -> None:
    signal = kept(vocabulary, Signal("topk", vocabulary.width))
    dense = gradient(vocabulary, None, loss, **options)
    torch.testing.assert_close(gradient(vocabulary, signal, loss, **options), dense,
                               atol=1e-6, rtol=1e-5)


def test_the_rest_is_exact_and_the_kl_at_most_the_whole() -> None:
    signal = kept(SAME, Signal("topk", 3))
    torch.testing.assert_close(signal.log_rest.exp(),
                               LAW.sort(-1, descending=True).values[:, 3:].sum(-1))
    dense = divergence("forward_kl", STUDENT, LAW.log())
    assert (divergence("forward_kl", *sparse_pair(SAME, STUDENT, signal)) <= dense + 1e-6).all()


@pytest.mark.parametrize("vocabulary", [SAME, SHARED], ids=["same", "shared"])
def test_draws_are_right_on_average(vocabulary: VocabularyMap) -> None:
    """Their mean gradient is the dense one, within the errors that so many draws have."""
    draws, number = 4, 400
    runs = torch.stack([gradient(vocabulary, kept(vocabulary, Signal("sampled", draws),
                                                  f"{i:07d}".encode())) for i in range(number)])
    p = LAW if vocabulary.identity else torch.cat(
        [LAW[:, :6].flip(-1), LAW[:, 6:].sum(-1, keepdim=True).expand(-1, 2)], -1)
    error = (p * (1 - p) / (draws * number)).sqrt()
    off = (runs.mean(0) - gradient(vocabulary, None))[:, :SYMBOLS] / error
    assert 0.3 < off.square().mean() < 1.3
    assert off.mean().abs() < 0.2
    biased = (gradient(vocabulary, kept(vocabulary, Signal("topk", 3)), "forward_kl")
              - gradient(vocabulary, None))[:, :SYMBOLS] / error
    assert biased.square().mean() > 10  # what the same bound says of a law without its rest's shape


def test_most_likely_ones_without_a_rest_are_biased() -> None:
    """What is stated beside the figures: the bias does not fall with the number of steps."""
    signal = kept(SAME, Signal("topk", 3))
    renormalised = torch.zeros_like(LAW).scatter(-1, signal.ids, signal.log_probs.exp())
    renormalised /= renormalised.sum(-1, keepdim=True)
    bias = (LAW - renormalised).abs().sum(-1)  # of the gradient q - p
    torch.testing.assert_close(bias, 2 * signal.log_rest.exp(), atol=1e-5, rtol=1e-4)
    dense = gradient(SAME, None)
    with_rest = (gradient(SAME, signal) - dense).sum(-1)
    assert with_rest.abs().max() < 1e-5
    at_kept = (gradient(SAME, signal) - dense).gather(-1, signal.ids)
    assert at_kept.abs().max() < 1e-6  # where the rest is told, kept entries have no bias at all


def test_draws_of_one_record_are_the_same_in_every_build() -> None:
    one, again, other = (kept(SAME, Signal("sampled", 5), seed) for seed in (b"aaaaaaa", b"aaaaaaa",
                                                                             b"bbbbbbb"))
    assert torch.equal(one.ids, again.ids)
    assert not torch.equal(one.ids, other.ids)
    assert torch.equal(one.log_probs.exp().sum(-1).round(decimals=5), torch.ones(len(LAW)))
    assert all(len(set(row)) == len(row) for row in one.ids.tolist())


def test_draws_weigh_what_they_were_drawn() -> None:
    law = torch.tensor([[0.999999, 1e-6]]).log()
    signal = drawn(law, 2, torch.Generator().manual_seed(0))
    assert signal.ids.tolist() == [[0, 1]]
    assert signal.log_probs.exp().tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(("kind", "loss", "says"), [
    ("sampled", "taid", "not linear in the teacher's probabilities"),
    ("sampled", "reverse_kl", "forward_kl, ce"), ("topk", "reverse_kl", "forward_kl, taid, ce"),
])
def test_losses_that_need_the_dense_law_are_refused(kind: str, loss: str, says: str) -> None:
    with pytest.raises(TaidError, match=says):
        Signal(kind, 4).check(None, parse_objective(loss))


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_a_temperature_needs_the_dense_law(kind: str) -> None:
    objective = parse_objective({"name": "forward_kl", "kd_temperature": 2.0})
    with pytest.raises(TaidError, match="kd_temperature = 2 would change"):
        Signal(kind, 4).check(None, objective)
