"""The exact language: its figures against naive sums, its students against single trainings."""

from __future__ import annotations

import math

import pytest
import torch
from miniature import exact, language
from miniature.intervals import interval, paired, student_t
from miniature.methods import METHODS, Method, Objective
from miniature.scale import Exact
from miniature.students import Adam, Course, Shape, Stream, Students, factor, train

from taid_vlm import divergence

SMALL = Exact(symbols=5, student=Shape(2, 4), steps=6, batch=16, seeds=2, tuning_seeds=2,
              rates=(1e-2, 1e-1), teachers=(Shape(2, 4), Shape(3, 8)))


@pytest.fixture(scope="module")
def world():
    return exact.language(SMALL)


# ----- the language ------------------------------------------------------------------------------


def test_laws_are_laws_and_the_same_every_time(world):
    assert world.law.shape == (25, 5) and world.law.dtype == torch.float64
    assert torch.allclose(world.law.sum(-1), torch.ones(25, dtype=torch.float64))
    assert world.law.min() >= language.FLOOR / 5
    assert torch.equal(language.make_language(5).law, world.law)
    assert not torch.equal(language.make_language(5, seed=1).law, world.law)


def test_the_weights_are_those_of_a_long_text(world):
    """The left eigenvector of the 25 x 25 chain over contexts, written out."""
    chain = torch.zeros(25, 25, dtype=torch.float64)
    for a in range(5):
        for b in range(5):
            for x in range(5):
                chain[5 * a + b, 5 * b + x] = world.law[5 * a + b, x]
    values, vectors = torch.linalg.eig(chain.T)
    one = vectors[:, (values - 1).abs().argmin()].real
    assert torch.allclose(world.weights, one / one.sum(), atol=1e-10)


def test_weights_that_do_not_settle_are_an_error():
    with pytest.raises(ArithmeticError, match="within 3 rounds"):
        language.stationary(language.make_language(6).law, rounds=3)


def test_every_figure_is_its_textbook_sum(world):
    torch.manual_seed(0)
    logits = torch.randn(2, 25, 5)
    found = language.figures(world, logits)
    for run in range(2):
        want = naive_figures(world, logits[run].double())
        assert {name: values[run].item() for name, values in found.items()} == pytest.approx(want)
    assert tuple(found) == language.FIGURES


def naive_figures(world, logits):
    want = dict.fromkeys(language.FIGURES, 0.0)
    for c in range(25):
        p, q = world.law[c].tolist(), logits[c].softmax(-1).tolist()
        ranked = sorted(range(5), key=lambda x: -p[x])
        before = {x: sum(p[y] for y in ranked[:i]) for i, x in enumerate(ranked)}
        each = {
            "kl": sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
            "reverse_kl": sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)),
            "tv": sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
            "entropy": -sum(b * math.log(b) for b in q),
            "head": sum(q[x] for x in range(5) if before[x] < language.HEAD),
            "junk": sum(q[x] for x in range(5) if before[x] >= language.TAIL)}
        each["jeffreys"] = each["kl"] + each["reverse_kl"]
        for name, value in each.items():
            want[name] += world.weights[c].item() * value
    return want


def test_the_truth_is_at_no_distance_from_itself(world):
    found = language.figures(world, world.law.log())
    assert [found[name].item() for name in ("kl", "reverse_kl", "tv")] == pytest.approx([0, 0, 0])
    assert found["junk"] <= 1 - language.TAIL and found["head"] >= language.HEAD


# ----- students ----------------------------------------------------------------------------------


def test_text_is_drawn_by_the_language_and_the_same_every_time(world):
    def drawn():
        return Stream(world, 2, Course(1, 100_000, 3)).draw()

    (context, label), again = drawn(), drawn()
    assert torch.equal(context, again[0]) and torch.equal(label, again[1])
    share = torch.bincount(context.flatten(), minlength=25) / context.numel()
    assert torch.allclose(share.double(), world.weights, atol=5e-3)
    common = int(world.weights.argmax())
    law = torch.bincount(label[context == common], minlength=5) / (context == common).sum()
    assert torch.allclose(law.double(), world.law[common], atol=0.02)


def test_a_student_is_the_network_it_says(world):
    students = Students(Shape(2, 4), 5, [0, 7], "cpu")
    context = torch.tensor([[0, 7, 24], [3, 3, 11]])
    found = students(context)
    for run in range(2):
        first, second, inner, b1, outer, b2 = (w[run] for w in students.weights)
        for n, c in enumerate(context[run].tolist()):
            x = torch.cat([first[c // 5], second[c % 5]])
            want = torch.tanh(x @ inner + b1[0]) @ outer + b2[0]
            assert torch.allclose(found[run, n], want, atol=1e-6)
    assert sum(w[0].numel() for w in students.weights) == Shape(2, 4).parameters(5)
    assert torch.equal(students.laws()[1, 11], students(torch.tensor([[11], [11]]))[1, 0])


def test_adam_is_torchs_with_a_rate_for_every_run():
    torch.manual_seed(0)
    start, rates = torch.randn(2, 3, 4), (0.1, 0.003)
    ours = [start.clone()]
    adam = Adam(ours)
    theirs = [start[i].clone().requires_grad_() for i in range(2)]
    optimizers = [torch.optim.Adam([w], rate, (0.9, 0.98), eps=1e-8)
                  for w, rate in zip(theirs, rates, strict=True)]
    for step in range(5):
        gradient = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(step))
        adam.step([gradient], torch.tensor(rates)[:, None, None])
        for i, optimizer in enumerate(optimizers):
            theirs[i].grad = gradient[i].clone()
            optimizer.step()
    assert torch.allclose(ours[0], torch.stack(theirs).detach(), atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_runs_side_by_side_do_not_touch_each_other(world, name):
    """Another learning rate in one run changes that run alone."""
    def weights(*rates):
        students = Students(Shape(2, 4), 5, [0, 1], "cpu")
        train(students, METHODS[name], world, world.law.log().float(), rates, Course(4, 8, 0))
        return students.weights

    for one, other in zip(weights(0.01, 0.02), weights(0.01, 0.3), strict=True):
        assert torch.allclose(one[0], other[0], atol=1e-6)
        assert not torch.allclose(one[1], other[1], atol=1e-4)


def test_every_run_of_taid_has_a_t_of_its_own():
    objective = Objective(Method("taid"), 2, 10)
    for step, losses in enumerate(([1.0, 1.0], [0.1, 5.0], [0.05, 9.0])):
        objective.update(torch.tensor(losses), step)
    assert objective.t[0] > objective.t[1] > 0.4
    s, u = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    want = [divergence("taid", s[i], u[i], t=objective.t[i]).mean() for i in range(2)]
    assert torch.allclose(objective(s, u, torch.zeros(2, 3, dtype=torch.long)),
                          torch.stack(want))


def test_the_learning_rate_warms_up_and_ends_near_zero():
    found = [factor(step, 100) for step in range(100)]
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(found) == 1.0 and 0 < found[-1] < 1e-3


# ----- tuning and measuring ----------------------------------------------------------------------


def test_the_lowest_score_wins_and_failures_never_do():
    assert exact.choose({0.01: 2.0, 0.1: 1.0, 1.0: 3.0}) == 0.1
    assert exact.choose({0.1: 1.0, 0.01: 1.0}) == 0.01
    assert exact.choose({0.01: 5.0, 0.1: math.nan, 1.0: math.inf}) == 0.01
    with pytest.raises(ArithmeticError, match="no learning rate"):
        exact.choose({0.1: math.nan})


def test_learning_rates_are_chosen_on_seeds_that_are_not_reported():
    found = exact.tune(SMALL, METHODS["KL"])
    tried = dict(found["tried"])
    assert list(tried) == [0.01, 0.1] and found["rate"] == min(tried, key=tried.get)
    assert found["at_the_edge"]
    reported, tuning = (exact.starts(SMALL, first, 2, True).weights[0]
                        for first in (exact.REPORTED, exact.TUNING))
    assert not any(torch.equal(a, b) for a in reported for b in tuning)


def test_a_measurement_leaves_the_shared_start_as_it_was_and_repeats_exactly():
    before = [w.clone() for w in exact.starts(SMALL, exact.REPORTED, 2, True).weights]
    runs = [exact.measure(SMALL, METHODS["TAID"], 0.1, exact.truth(SMALL)) for _ in range(2)]
    after = exact.starts(SMALL, exact.REPORTED, 2, True).weights
    assert runs[0] == runs[1]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert len(runs[0]["figures"]["kl"]) == 2 and runs[0]["curves"]["t"][0] == (0, 0.4)


def test_the_papers_alpha_does_not_act_in_a_short_run():
    shares = {value: exact.sweep(SMALL, "alpha", value, 0.1)["active_share"]
              for value in exact.SWEEPS["alpha"]}
    assert shares["5e-4, as in the paper"] == shares["linear (adaptive off)"] == 0
    assert 0 < shares["auto"] <= shares["4 x auto"]
    schedule = Objective(Method("taid", exact.sweep_schedule(
        exact.Exact(steps=1000), "alpha", "4 x auto")), 1, 1000).schedules[0]
    auto = Objective(Method("taid"), 1, 1000).schedules[0]
    assert schedule.alpha == pytest.approx(4 * auto.alpha)


# ----- intervals ---------------------------------------------------------------------------------


def test_intervals_are_students():
    found = interval([1.0, 2.0, 4.0])
    assert (found.value, found.n) == (pytest.approx(7 / 3), 3)
    assert found.stderr == pytest.approx(math.sqrt(7 / 3 / 3))  # variance 7/3 over 3
    assert found.high - found.value == pytest.approx(4.302653 * found.stderr, rel=1e-4)
    assert paired([1.0, 2.0], [0.5, 1.5]).stderr == 0.0
    assert math.isnan(interval([1.0]).low)


@pytest.mark.parametrize(("freedom", "want"), [(1, 12.7062), (4, 2.77645), (10, 2.22814),
                                               (11, 2.20099), (15, 2.13145), (60, 2.00030)])
def test_students_quantiles(freedom, want):
    assert student_t(freedom) == pytest.approx(want, abs=2e-4)
