"""TAID's t: the public code's trajectories, what it may never do, and checkpoints."""

import json
import math
import random
from pathlib import Path

import pytest

from taid_vlm.errors import RecipeError
from taid_vlm.objectives import TaidSchedule

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "schedules.json").read_text())["runs"]
NAN, INF = float("nan"), float("inf")
PAPER = {"total_steps": 11720, "alpha": 5e-4}


def falling(steps):
    return [3 * math.exp(-2 * step / steps) for step in range(steps)]


def follow(schedule, losses, first_step=0):
    return [schedule.update(loss, step) for step, loss in enumerate(losses, start=first_step)]


def linear(schedule, step):
    rise = schedule.t_end - schedule.t_start
    return min(schedule.t_end, schedule.t_start + rise * step / schedule.total_steps)


# ----- figures ------------------------------------------------------------------------------


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["case"])
def test_golden_trajectories(golden):
    schedule = TaidSchedule(**golden["arguments"])
    for step, loss in enumerate(golden["loss"]):
        assert schedule.update(loss, step) == pytest.approx(golden["t_after"][step], abs=1e-6)
        momentum = golden["momentum_after"][step]
        assert schedule.state.momentum == pytest.approx(momentum, abs=1e-6)


def test_one_update_by_hand():
    schedule = TaidSchedule(1000, t_start=0.4, alpha=0.1, momentum=0.9)
    assert schedule.update(2.0, 0) == 0.4  # the first loss is only remembered
    m = 0.1 * (2.0 - 1.5) / 2.0
    t = 0.4 + 0.1 / (1 + math.exp(-m)) * 0.6
    assert schedule.update(1.5, 1) == pytest.approx(t, rel=1e-12)
    m = 0.9 * m + 0.1 * (1.5 - 1.8) / 1.5  # the loss rose: momentum falls, t still rises
    t += 0.1 / (1 + math.exp(-m)) * (1 - t)
    assert schedule.update(1.8, 2) == pytest.approx(t, rel=1e-12)


def test_paper_run_is_adaptive_from_the_start():
    """At the end the floor overtakes: t = 1 - 0.6 exp(-alpha n / 2) would stop at 0.97."""
    schedule = TaidSchedule(**PAPER)
    follow(schedule, falling(11720)[:5000])
    assert schedule.active_share == 1.0
    follow(schedule, falling(11720)[5000:], first_step=5000)
    assert 0.9 < schedule.active_share < 1.0
    assert schedule.t > 0.999


@pytest.mark.parametrize("steps", [50, 300, 2000, 3900])
def test_paper_alpha_never_acts_in_short_runs(steps):
    schedule = TaidSchedule(steps, alpha=5e-4)
    trajectory = follow(schedule, falling(steps))
    assert schedule.active_share == 0.0
    assert trajectory == [linear(schedule, step) for step in range(steps)]


@pytest.mark.parametrize("steps", [50, 300, 3900])
def test_auto_alpha_acts_in_short_runs(steps):
    schedule = TaidSchedule(steps)
    trajectory = follow(schedule, falling(steps))
    assert schedule.active_share > 0.9
    half = steps // 2
    assert trajectory[half] > linear(schedule, half) + 0.1


def test_auto_alpha_is_the_papers_in_the_papers_run():
    assert TaidSchedule(11720).alpha == pytest.approx(5e-4, rel=1e-6)
    assert TaidSchedule(1).alpha == 1.0  # and never above 1, so that t cannot overshoot


def test_without_adaptivity_t_is_linear():
    schedule = TaidSchedule(100, t_start=0.2, t_end=0.7, adaptive=False)
    trajectory = follow(schedule, falling(100))
    assert trajectory == pytest.approx([0.2 + 0.5 * step / 100 for step in range(100)])
    assert schedule.active_share == 0.0


# ----- what t may never do ------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_t_never_falls_and_stays_inside(seed):
    rng = random.Random(seed)
    t_start, t_end = sorted(rng.choice([0.0, 1.0, rng.random(), rng.random()]) for _ in range(2))
    steps = rng.choice([1, 2, 7, 200])
    schedule = TaidSchedule(
        steps, t_start=t_start, t_end=t_end, alpha=rng.choice(["auto", 0.0, 1e-3, 0.5, 5.0]),
        momentum=rng.choice([0.0, 0.9, 0.99]), adaptive=rng.random() < 0.8,
    )
    before = schedule.t
    for step in range(steps + 5):  # a few more than planned: the end holds
        loss = rng.choice([rng.uniform(0, 5), 0.0, 1e-30, 1e30, -0.1, NAN, INF, -INF])
        t = schedule.update(loss, step)
        assert t_start <= before <= t <= t_end
        assert -1 <= schedule.state.momentum <= 1
        before = t
    assert 0 <= schedule.active_share <= 1


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("position", [0, 1, 5])
def test_losses_that_are_not_finite_are_skipped_and_counted(bad, position):
    clean, hit = TaidSchedule(100), TaidSchedule(100)
    losses = falling(100)[:10]
    for step, loss in enumerate(losses):
        if step == position:
            before = hit.state_dict()
            assert hit.update(bad, step) == before["t"]
            assert hit.state_dict() == {**before, "skipped": 1}
        assert hit.update(loss, step) == clean.update(loss, step)


@pytest.mark.parametrize(("jump", "limit"), [(1e12, -1.0), (1e300, -1.0), (-1e300, 1.0)])
def test_one_huge_jump_counts_as_one(jump, limit):
    """Without the clamp one outlier of 1e12 would hold the momentum down for thousands of steps."""
    schedule = TaidSchedule(1000, momentum=0.9)
    follow(schedule, [1.0, jump])
    assert schedule.state.momentum == pytest.approx(0.1 * limit)


def test_loss_of_zero_divides_nothing_by_zero():
    schedule = TaidSchedule(1000, momentum=0.9)
    follow(schedule, [0.0, 0.0, 1.0])
    assert schedule.state.momentum == pytest.approx(-0.1)


# ----- checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 2, 37, 99])
def test_state_goes_through_json_and_continues_exactly(cut):
    rng = random.Random(cut)
    losses = [rng.uniform(0.5, 3) if rng.random() < 0.9 else NAN for _ in range(100)]
    straight, first, second = (TaidSchedule(100, t_start=0.3) for _ in range(3))
    trajectory = follow(straight, losses)
    follow(first, losses[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.t == first.t
    assert follow(second, losses[cut:], first_step=cut) == trajectory[cut:]
    assert second.state_dict() == straight.state_dict()
    assert second.active_share == straight.active_share


def test_state_dict_is_a_copy():
    schedule = TaidSchedule(10)
    schedule.state_dict()["t"] = 0.9
    assert schedule.t == 0.4


@pytest.mark.parametrize("state", [{"t": 0.5, "velocity": 1.0}, {"momentum": 0.0}, {}])
def test_foreign_state_is_refused(state):
    schedule = TaidSchedule(10)
    with pytest.raises(RecipeError, match="not a TaidSchedule state"):
        schedule.load_state_dict(state)
    assert schedule.t == 0.4


# ----- arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
    ({"t_start": 0.8, "t_end": 0.5}, r"t_start = 0.8 is greater than t_end = 0.5"),
    ({"t_start": -0.1}, r"t_start = -0.1.*\[0, 1\]"),
    ({"t_start": NAN}, "t_start = nan"),
    ({"t_end": 1.1}, r"t_end = 1.1.*\[0, 1\]"),
    ({"alpha": -1e-4}, "alpha = -0.0001.*'auto' or a number >= 0"),
    ({"alpha": "fast"}, "alpha = 'fast'.*'auto' or a number >= 0"),
    ({"momentum": 1.0}, r"momentum = 1.0.*\[0, 1\)"),
    ({"momentum": -0.5}, r"momentum = -0.5.*\[0, 1\)"),
    ({"total_steps": 0}, "total_steps = 0.*>= 1"),
])
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(RecipeError, match=message):
        TaidSchedule(**{"total_steps": 10, **arguments})


def test_equal_ends_hold_t():
    schedule = TaidSchedule(20, t_start=0.7, t_end=0.7)
    assert set(follow(schedule, falling(20))) == {0.7}
    assert schedule.active_share == 0.0


@pytest.mark.parametrize("change", [
    {"t_start": "0.4"}, {"t_start": None}, {"momentum": "0.9"}, {"alpha": None},
    {"alpha": float("nan")}, {"adaptive": "no"},
])
def test_values_of_a_wrong_kind(change):
    with pytest.raises(RecipeError, match=next(iter(change))):
        TaidSchedule(10, **change)
