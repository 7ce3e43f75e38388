"""Losses against the k most likely tokens and the rest, held against sums in float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from taid_vlm.alignment import Pairing, VocabularyMap
from taid_vlm.alignment.vocabulary import SideMap
from taid_vlm.batch.losses import token_losses
from taid_vlm.batch.sparse import (
    SparseSignal,
    check_one_by_one,
    check_sparse,
    sparse_figures,
    sparse_losses,
    sparse_pair,
)
from taid_vlm.errors import TaidError
from taid_vlm.objectives import parse_objective

V, N = 13, 6
OBJECTIVE = parse_objective({"terms": ["taid", "forward_kl", {"name": "ce", "weight": 0.3}]})


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def same() -> VocabularyMap:
    side = SideMap(torch.arange(V), ids(), ids())
    return VocabularyMap(side, side, True, False)


def other(has_rest: bool) -> VocabularyMap:
    """Eight shared tokens; the teacher's ids 8 to 10 are its own, and two rows have no name."""
    teacher = SideMap(ids(3, 1, 0, 2, 7, 6, 5, 4), ids(8, 9, 10), ids(11, 12))
    own = ids(8, 9) if has_rest else ids()
    return VocabularyMap(teacher, SideMap(ids(0, 2, 4, 6, 1, 3, 5, 7), own, ids()), False, has_rest)


def top(u: Tensor, k: int) -> SparseSignal:
    log_p = u.log_softmax(-1)
    values, index = log_p.topk(k, dim=-1)
    rest = torch.log1p(-values.exp().sum(-1).clamp(max=1.0))
    return SparseSignal(index, values, rest if k < u.shape[1] else rest.fill_(-torch.inf))


def logits(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(N, width, dtype=torch.float64, generator=generator)


def batch() -> dict[str, Tensor]:
    return {"labels": torch.arange(N), "teacher_labels": torch.arange(N)}


def pairing(vocabulary: VocabularyMap) -> Pairing:
    return Pairing("a" if vocabulary.identity else "b", "", (vocabulary,))


def kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.log()), 0.0).sum(-1)


@pytest.mark.parametrize("vocabulary", [same(), other(True), other(False)],
                         ids=["same", "rest", "no rest"])
def test_all_tokens_are_the_dense_loss(vocabulary: VocabularyMap) -> None:
    """k = V: loss and gradient of the whole law, through the same map."""
    width = V if vocabulary.identity else 8 + 2 * vocabulary.has_rest
    u = logits(V, 1)
    if not vocabulary.identity:
        u[:, vocabulary.teacher.padding] = -torch.inf
    results = []
    for dense in (True, False):
        s = logits(width, 2).requires_grad_()
        losses = OBJECTIVE.per_token(
            vocabulary.map_student(s), vocabulary.map_teacher(u), batch()["labels"],
            own_logits=s, t=0.4) if dense else sparse_losses(
            OBJECTIVE, batch(), s, top(u, V), pairing(vocabulary), 0.4)
        OBJECTIVE.weighted(losses).sum().backward()
        results.append((losses, s.grad))
    (dense_losses, dense_grad), (losses, grad) = results
    assert losses.keys() == dense_losses.keys()
    for name, values in losses.items():
        torch.testing.assert_close(values, dense_losses[name], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad, dense_grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize("has_rest", [True, False])
def test_entries_by_hand(k: int, has_rest: bool) -> None:
    """Other ids and one-sided tokens: probabilities added up entry by entry."""
    vocabulary, u = other(has_rest), logits(V, 3)
    s = logits(8 + 2 * has_rest, 4).requires_grad_()
    signal = top(u, k)
    losses = sparse_losses(OBJECTIVE, batch(), s, signal, pairing(vocabulary), 0.25)
    student_of = dict(zip(vocabulary.teacher.shared.tolist(), vocabulary.student.shared.tolist(),
                          strict=True))
    q, expected = s.softmax(-1), []
    for n in range(N):
        known = [(lp, student_of[i]) for i, lp in zip(signal.ids[n].tolist(),
                 signal.log_probs[n], strict=True) if i in student_of]
        moved = [lp.exp() for i, lp in zip(signal.ids[n].tolist(), signal.log_probs[n],
                 strict=True) if i in (8, 9, 10) and has_rest]
        mass = signal.log_rest[n].exp() + sum(moved, u.new_zeros(()))
        p = torch.stack([*(lp.exp() for lp, _ in known), mass])
        mine = [q[n, i] for _, i in known]
        law = torch.stack([*mine, 1 - sum(mine, q.new_zeros(()))])
        p = p / p.sum()
        mixed = (0.75 * law.detach().log() + 0.25 * p.log()).softmax(-1)
        expected.append((kl(p, law), kl(mixed, law)))
    by_hand = {name: torch.stack(values) for name, values in
               zip(("forward_kl", "taid"), zip(*expected, strict=True), strict=True)}
    for name, values in by_hand.items():
        torch.testing.assert_close(losses[name], values, rtol=1e-9, atol=1e-11)
        grad, = torch.autograd.grad(losses[name].sum(), s, retain_graph=True)
        wanted, = torch.autograd.grad(values.sum(), s, retain_graph=True)
        torch.testing.assert_close(grad, wanted, rtol=1e-8, atol=1e-11)


def test_every_token_is_compared_under_its_own_map() -> None:
    """As the dense loss does it; an answer's first token has one where templates glue to it."""
    first, others, u = other(True), other(False), logits(V, 11)
    u[:, first.teacher.padding] = -torch.inf
    pair = Pairing("b", "", (others, first))
    mapped = batch() | {"map_index": torch.tensor([1, 0, 0, 1, 0, 0])}
    s = logits(10, 12)
    losses = sparse_losses(OBJECTIVE, mapped, s, top(u, V), pair, 0.4)
    dense = token_losses(OBJECTIVE, mapped, s, u, pair, 0.4)
    for name, values in losses.items():
        torch.testing.assert_close(values, dense[name], rtol=1e-9, atol=1e-12)
    kl_of = sparse_figures(mapped, s, top(u, V), pair)["kl"].values
    torch.testing.assert_close(kl_of.double(), losses["forward_kl"], rtol=1e-5, atol=1e-6)


def test_never_above_the_whole_law() -> None:
    """Coarse-graining only loses: the loss grows with k up to the dense one."""
    s, u = logits(V, 5), logits(V, 6)
    objective = parse_objective("forward_kl")
    values = [sparse_losses(objective, batch(), s, top(u, k), pairing(same()))["forward_kl"]
              for k in range(1, V + 1)]
    for less, more in itertools.pairwise(values):
        assert bool((less <= more + 1e-12).all())


def test_half_precision_and_ruled_out_tokens_stay_finite() -> None:
    s = logits(V, 7).bfloat16()
    s[:, 0] = -torch.inf
    s.requires_grad_()
    signal = top(logits(V, 8).float(), 4)
    losses = sparse_losses(OBJECTIVE, batch() | {"labels": torch.arange(1, N + 1)}, s, signal,
                           pairing(same()), 0.5)
    OBJECTIVE.weighted(losses).sum().backward()
    assert all(values.isfinite().all() for values in losses.values())
    assert s.grad is not None
    assert s.grad.isfinite().all()


def test_figures() -> None:
    s, u = logits(V, 9), logits(V, 10)
    signal = top(u, 5)._replace(own=u.log_softmax(-1)[torch.arange(N), torch.arange(N)])
    figures = sparse_figures(batch(), s, signal, pairing(same()), closely=True)
    student, teacher = sparse_pair(same(), s, signal)
    torch.testing.assert_close(figures["kl"].values.double(),
                               kl(teacher.softmax(-1), student.softmax(-1)), rtol=1e-5, atol=1e-6)
    agreement = (s.argmax(-1) == u.argmax(-1)).float()
    assert torch.equal(figures["agreement"].values, agreement)
    assert signal.own is not None
    assert torch.equal(figures["teacher_nll"].values, -signal.own)
    assert {"nll", "agreement", "confidence", "token_accuracy"} <= figures.keys()


@pytest.mark.parametrize(("objective", "named"), [
    ("reverse_kl", "'reverse_kl'"), ({"terms": ["taid", "jsd"]}, "'jsd'"),
    ({"name": "taid", "kd_temperature": 2.0}, "kd_temperature = 2"),
    ({"name": "taid", "token_weights": "visual_advantage"}, "token_weights"),
    ({"terms": ["taid", "visual_relation"]}, "'visual_relation'"),
])
def test_what_needs_the_whole_law_is_refused_by_name(objective: object, named: str) -> None:
    with pytest.raises(TaidError, match=named):
        check_sparse(parse_objective(objective), "a served teacher")  # type: ignore[arg-type]


def test_what_is_not_refused() -> None:
    for objective in ("taid", "forward_kl", "ce", {"name": "ce", "kd_temperature": 2.0}):
        check_sparse(parse_objective(objective), "a served teacher")
    check_one_by_one(pairing(same()), "a served teacher")
    with pytest.raises(TaidError, match="splits texts differently"):
        check_one_by_one(dataclasses.replace(pairing(same()), case="c"), "a served teacher")
