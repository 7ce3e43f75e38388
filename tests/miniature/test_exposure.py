"""Texts that students write themselves, and losses that see but a few entries of a law."""

from __future__ import annotations

import itertools

import pytest
import torch
from miniature import exact
from miniature.cut import CUT_LOSSES, KEPT
from miniature.exposure import LENGTH, OwnTexts, along, exposed
from miniature.language import make_language
from miniature.methods import CUT, EXPOSED, SINCE
from miniature.scale import Exact
from miniature.students import Course, Shape, Students, train

from taid_vlm import divergence

WORLD = make_language(5)
LOGITS = torch.randn(2, 25, 5, generator=torch.Generator().manual_seed(0))
SMALL = Exact(symbols=5, student=Shape(2, 4), steps=6, batch=16, seeds=2, tuning_seeds=2,
              rates=(1e-2, 1e-1), teachers=(Shape(2, 4),))


# ----- own texts ---------------------------------------------------------------------------------


def test_the_third_symbols_kl_is_the_sum_over_all_texts_so_far():
    """Every context and every two symbols, written out."""
    forward, reverse = along(WORLD, LOGITS)
    q, p = LOGITS[1].double().softmax(-1), WORLD.law
    want = [0.0, 0.0]
    for c in range(25):
        for x in range(5):
            for y in range(5):
                d = (c % 5) * 5 + x
                e = (d % 5) * 5 + y
                weight = WORLD.weights[c] * q[c, x] * q[d, y]
                want[0] += float(weight * (p[e] * (p[e] / q[e]).log()).sum())
                want[1] += float(weight * (q[e] * (q[e] / p[e]).log()).sum())
    assert forward[1, 2].item() == pytest.approx(want[0])
    assert reverse[1, 2].item() == pytest.approx(want[1])
    assert forward.shape == (2, LENGTH)


def test_the_first_symbol_stands_after_the_languages_contexts_and_the_truth_has_no_bias():
    found = exposed(WORLD, LOGITS)
    forward, reverse = along(WORLD, LOGITS)
    assert torch.allclose(forward[:, 0], found["kl"])
    assert torch.allclose(reverse[:, 0], found["reverse_kl"])
    assert torch.allclose(found["excess"], found["own_jeffreys"] - found["jeffreys"])
    of_truth = exposed(WORLD, WORLD.law.log())
    assert of_truth["excess"].item() == pytest.approx(0, abs=1e-12)


def test_own_texts_come_to_contexts_as_their_laws_say():
    texts, visits = OwnTexts(WORLD, 2, 400, 0), torch.zeros(2, 25)
    for step in range(4 * LENGTH):
        if step >= LENGTH:
            visits += torch.stack([torch.bincount(row, minlength=25) for row in texts.context])
        texts.go_on(LOGITS.gather(1, texts.context[..., None].expand(-1, -1, 5)))
    weights, want = WORLD.weights.expand(2, 25), torch.zeros(2, 25, dtype=torch.float64)
    chain = torch.zeros(2, 25, 25, dtype=torch.float64)
    for c in range(25):
        chain[:, c, (c % 5) * 5:(c % 5) * 5 + 5] = LOGITS[:, c].double().softmax(-1)
    for _ in range(LENGTH):
        want += weights / LENGTH
        weights = (weights[:, None] @ chain)[:, 0]
    assert torch.allclose(visits.double() / visits.sum(-1, keepdim=True), want, atol=6e-3)


def test_on_policy_no_context_is_the_languages_but_the_first(monkeypatch):
    seen = []
    whole = Students.__call__
    monkeypatch.setattr(Students, "__call__", lambda self, context: seen.append(
        context.clone()) or whole(self, context))
    students = Students(Shape(2, 4), 5, [0, 1], "cpu")
    train(students, EXPOSED["KL, half"], WORLD, WORLD.law.log().float(), [0.1, 0.1],
          Course(4, 16, 0))
    steps = [context for context in seen if context.shape == (2, 16)]
    going_on = [(b[:, :8] // 5 == a[:, :8] % 5).float().mean().item() for a, b in
                itertools.pairwise(steps)]
    fresh = [(b[:, 8:] // 5 == a[:, 8:] % 5).float().mean().item() for a, b in
             itertools.pairwise(steps)]
    assert going_on == [1.0] * 3 and max(fresh) < 0.8


@pytest.mark.parametrize("name", [*SINCE, *CUT, *EXPOSED])
def test_runs_side_by_side_do_not_touch_each_other(name):
    method = {**SINCE, **CUT, **EXPOSED}[name]

    def weights(*rates):
        students = Students(Shape(2, 4), 5, [0, 1], "cpu")
        train(students, method, WORLD, WORLD.law.log().float(), rates, Course(4, 8, 0))
        return students.weights

    for one, other in zip(weights(0.01, 0.02), weights(0.01, 0.3), strict=True):
        assert torch.allclose(one[0], other[0], atol=1e-6)
        # a loss above its clip moves nothing, and at the start no loss is below this one
        assert torch.equal(one[1], other[1]) == (name == "KL, clip 0.05")


def test_rates_are_chosen_by_own_texts_and_positions_begin_with_the_language():
    found = exact.exposure(SMALL, "TAID, on policy")
    tried = dict(map(tuple, found["tuning"]["tried"]))
    assert found["rate"] == min(tried, key=tried.get)
    (first, value), *_ = found["positions"]["kl"]
    assert first == 1 and value == pytest.approx(sum(found["figures"]["kl"]) / 2)
    assert found["active_share"] is not None


# ----- a few entries -----------------------------------------------------------------------------


S, U = (torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))


def gradient(name):
    s = S.clone().requires_grad_()
    loss = CUT_LOSSES[name](s, U, torch.Generator().manual_seed(0))
    return loss, torch.autograd.grad(loss.sum(), s)[0]


def test_the_top_alone_pull_towards_a_law_without_its_rest():
    p = U.softmax(-1)
    kept = p * (p >= p.topk(KEPT, -1).values[..., -1:])
    torch.testing.assert_close(gradient("top_kl")[1], S.softmax(-1) - kept / kept.sum(
        -1, keepdim=True))


@pytest.mark.parametrize(("name", "loss"), [("top_kl_rest", "forward_kl"),
                                            ("top_rkl_rest", "reverse_kl")])
def test_with_the_rest_it_is_the_kl_of_laws_with_one_entry_for_it(name, loss):
    top = U.topk(KEPT, -1).indices
    p, q = (x.softmax(-1).gather(-1, top) for x in (U, S))
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1).log() for x in (p, q))
    torch.testing.assert_close(gradient(name)[0], divergence(loss, q, p))


def test_draws_pull_towards_the_law_on_average():
    generator, p = torch.Generator().manual_seed(0), U.softmax(-1)
    s, total = S.clone().requires_grad_(), torch.zeros_like(S)
    for _ in range(2000):
        total += torch.autograd.grad(CUT_LOSSES["drawn_kl"](s, U, generator).sum(), s)[0]
    assert (total / 2000 - (S.softmax(-1) - p)).abs().max() < 0.03


def test_reverse_kl_over_the_top_alone_pulls_mass_away_from_it():
    """At agreement, where it has nothing to learn."""
    s = U.clone().requires_grad_()
    loss = CUT_LOSSES["top_rkl"](s, U, torch.Generator())
    (found,) = torch.autograd.grad(loss.sum(), s)
    assert (found.gather(-1, U.topk(KEPT, -1).indices) > 0).all()
    s = U.clone().requires_grad_()
    (found,) = torch.autograd.grad(CUT_LOSSES["top_rkl_rest"](s, U, torch.Generator()).sum(), s)
    assert found.abs().max() < 1e-6
