"""A loss far above those before: not applied where that is asked for, however a step is cut."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from training.runs import POISON, make_trainer, rows, weights
from training.test_invariance import in_processes

from taid_vlm import DistillationConfig
from taid_vlm.errors import RecipeError, TaidError
from taid_vlm.objectives import divergence, parse_objective
from taid_vlm.records import parse_record
from taid_vlm.report.run import _account
from taid_vlm.training.guard import NONFINITE, OVERFLOW, SPIKE, StepGuard, comparable_loss

AT, STEPS = 6, 9  # the step that spikes, counted from 0


def data(*at: int) -> list[dict[str, Any]]:
    """Four rows per step; the third one of these steps is one that the teacher is loud about."""
    made = rows(4 * STEPS, text_only=True)
    for step in at:
        made[4 * step + 2] = {"prompt": POISON, "completion": "blue square " * 20}
    return made


def options(*at: int, **more: Any) -> dict[str, Any]:
    return {"student": "gemma2", "teacher": "qwen2", "data": data(*at), "max_steps": STEPS,
            "per_device_train_batch_size": 4, "logging_steps": 1, "poison": 40.0,
            "spike_factor": 1.5, "spike_window": 4, **more}


def run(folder: Path, *at: int, **more: Any) -> Any:
    chosen = options(*at, **more)
    chosen["data"] = [parse_record(row, f"row {i}") for i, row in enumerate(chosen["data"])]
    trainer = make_trainer(folder, **chosen)
    moved: list[Any] = []

    class Watch(type(trainer.recorder)):  # type: ignore[misc]
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            counts = {float(s["step"]) for s in trainer.optimizer.state.values() if "step" in s}
            t = trainer.schedule.t if trainer.schedule else None
            moved.append((weights(trainer), counts, t, trainer.lr_scheduler.last_epoch))

    watch = Watch()
    watch.trainer = trainer
    trainer.add_callback(watch)
    trainer.train()
    return trainer, moved


def test_a_spike_is_not_applied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, moved = run(tmp_path, AT)
    (before, _, t, _), (after, counts, later, _) = moved[AT - 1], moved[AT]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert t == later
    assert counts == {float(AT)}
    assert moved[-1][1] == {float(STEPS - 1)}
    assert moved[-1][3] == STEPS  # the rate goes by the step, as after a step that is no number
    assert moved[-1][2] > later
    assert trainer.guard.skipped == {SPIKE: 1}
    assert f"Step {AT + 1} is not applied: its loss is a spike (row {4 * AT + 2}, " in caplog.text
    logged = [row.get("skipped_steps") for row in trainer.state.log_history if "grad_norm" in row]
    assert logged == [None] * AT + [1] * (STEPS - AT)


def test_it_is_applied_unless_asked(tmp_path: Path) -> None:
    trainer, moved = run(tmp_path, AT, spike_factor=None)
    assert not trainer.guard.skipped
    assert moved[-1][1] == {float(STEPS)}
    assert not trainer.guard.state_dict()["recent"]


def test_the_moving_target_is_no_spike(tmp_path: Path) -> None:
    """t goes from 0.1 to 1 while the student stands still, so that TAID's loss grows a lot."""
    objective = {"name": "taid", "t_start": 0.1}
    trainer, _ = run(tmp_path, objective=objective, learning_rate=1e-9, poison=1.0)
    losses = [row["loss"] for row in trainer.state.log_history if "grad_norm" in row]
    assert any(loss > 1.5 * statistics.median(losses[at - 4:at])
               for at, loss in enumerate(losses) if at >= 4)
    assert not trainer.guard.skipped
    recent = trainer.guard.state_dict()["recent"]
    assert max(recent) < 1.1 * min(recent)


@pytest.mark.parametrize("scale", [1.0, 3.0, 5.0])
def test_taids_loss_over_t_squared(scale: float) -> None:
    torch.manual_seed(0)
    s, u, objective = torch.randn(99, 500) * scale, torch.randn(99, 500) * scale, "taid"
    losses = [comparable_loss(parse_objective(objective), {
        "tokens": 99.0, "loss/taid": float(divergence("taid", s, u, t=t).sum())}, t)
        for t in (0.4, 0.6, 0.8, 1.0)]
    assert None not in losses
    assert max(losses) < 2 * min(losses)  # type: ignore[type-var, operator]


def test_what_is_compared() -> None:
    objective = parse_objective({"terms": ["taid", {"name": "ce", "weight": 0.5}]})
    sums = {"tokens": 4.0, "loss/taid": 1.0, "loss/ce": 8.0}
    assert comparable_loss(objective, sums, 0.5) == pytest.approx(0.25 / 0.25 + 0.5 * 2)
    assert comparable_loss(objective, sums, 0.0) is None
    assert comparable_loss(objective, {**sums, "tokens": 0.0}, 0.5) is None


def test_many_spikes_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(TaidError, match=r"2 steps in a row .*spike_factor.*row 26.*max_nonfinite"):
        run(tmp_path, AT - 1, AT, max_nonfinite_steps=2)


def test_the_decision_is_that_of_the_global_loss(tmp_path: Path) -> None:
    """One process, two micro-batches, and two processes: the same steps, t and weights."""
    whole, _ = run(tmp_path / "whole", AT)
    halves, _ = run(tmp_path / "halves", AT, per_device_train_batch_size=2,
                    gradient_accumulation_steps=2)
    in_processes(2, tmp_path, two=options(AT, per_device_train_batch_size=2))
    told = [json.loads((tmp_path / "two" / f"guard-{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1]
    assert told[0]["processes"] == 2
    assert told[0]["skipped"] == whole.guard.skipped == halves.guard.skipped == {SPIKE: 1}
    for recent in (told[0]["recent"], halves.guard.state_dict()["recent"]):
        assert recent == pytest.approx(whole.guard.state_dict()["recent"], rel=1e-4)
    t = json.loads((tmp_path / "two" / "trajectory.json").read_text())
    assert t == pytest.approx(whole.recorder.t, abs=1e-6)


@pytest.mark.parametrize("at", [3, 5])  # where the checkpoint lies: before the spike or after it
def test_a_killed_run_goes_on_bit_for_bit(at: int, tmp_path: Path) -> None:
    more = options(4, AT, save_strategy="steps", save_steps=at, spike_window=3)
    in_processes(1, tmp_path, killed={**more, "kill_at": at + 1})
    whole, resumed = (make_trainer(tmp_path / name, **more) for name in ("whole", "killed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / f"checkpoint-{at}"))
    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole.recorder.t[at:] == resumed.recorder.t
    assert whole.guard.skipped == {SPIKE: 2}
    assert whole.guard.state_dict() == resumed.guard.state_dict()


# ----- with a scaler, and how often the device is waited for --------------------------------


def judged(scaler: Any, gradient: float, loss: float, before: list[float]) -> tuple[Any, Any]:
    """A guard and a weight after one step of Adam with this gradient and this loss."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    accelerator: Any = SimpleNamespace(scaler=scaler, reduce=lambda x, how: x)
    guard = StepGuard(accelerator, 10, 3.0, 2)
    guard.load_state_dict({"recent": before})
    weight.grad = torch.full((2,), gradient) * (scaler.get_scale() if scaler else 1)
    if scaler is not None:
        scaler.scale(torch.zeros(()))  # makes it ready
        scaler.unscale_(optimizer)
    batch: Any = {"labels": torch.zeros(1), "sources": ["row 0"], "row": torch.zeros(1).long()}
    losses = {"fkl": torch.tensor([loss])}
    guard.note(batch, losses)
    sums = {"tokens": torch.ones((), dtype=torch.float64),
            "loss/forward_kl": losses["fkl"][0].double()}
    guard.judge(sums, weight.grad.norm(), [weight], 1, parse_objective("fkl"), None)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return guard, (weight.detach(), optimizer.state)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("gradient", "loss", "reason"), [
    (1.0, 1.0, None), (float("inf"), 1.0, OVERFLOW), (1.0, float("inf"), NONFINITE),
    (1.0, 9.0, SPIKE)])
def test_reasons(scaled: bool, gradient: float, loss: float, reason: str | None) -> None:
    """What counts as not applied moved nothing, and a scale falls for an overflow alone."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    guard, (weight, state) = judged(scaler, gradient, loss, [1.0, 1.0])
    reason = NONFINITE if reason == OVERFLOW and not scaled else reason
    assert guard.skipped == ({} if reason is None else {reason: 1})
    assert guard.applied == (reason is None)
    assert torch.equal(weight, torch.ones(2)) == (reason is not None)
    assert bool(state) == (reason is None)
    assert guard.in_a_row == (reason in (NONFINITE, SPIKE))
    if scaler is not None:
        assert scaler.get_scale() == (4.0 if reason == OVERFLOW else 8.0)


def test_one_wait_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, **options(max_steps=2, logging_steps=50))
    counted: list[str] = []
    plain: dict[str, Any] = {}
    inside = [False]
    for name in ("tolist", "item", "__bool__", "__float__", "__int__", "cpu"):
        def count(self: Any, *args: Any, name: str = name) -> Any:
            if inside[0]:
                counted.append(name)
            return plain[name](self, *args)

        plain[name] = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, count)

    def watched(function: Any) -> Any:
        def call(*args: Any) -> Any:
            inside[0] = True
            try:
                return function(*args)
            finally:
                inside[0] = False
        return call

    trainer.guard.judge = watched(trainer.guard.judge)
    trainer.finish_step = watched(trainer.finish_step)
    trainer.train()
    assert counted == ["tolist"] * 2


# ----- keys ---------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 0.5, "five", float("inf")])
def test_a_factor_is_above_one(factor: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"spike_factor .*a number above 1"):
        DistillationConfig(str(tmp_path), spike_factor=factor)


def test_the_report_names_them() -> None:
    train = SimpleNamespace(records_left_out={}, adaptive_share=None, skipped_steps={SPIKE: 2},
                            without_effect={}, sources={}, unread_columns={}, on_policy=None)
    results: Any = SimpleNamespace(train=train, canary=None, alignment=None, teachers={},
                                   models={"student": SimpleNamespace(parts={})})
    assert "Steps not applied: 2 x loss spike." in _account(results)
    train.skipped_steps = {}
    assert not any("not applied" in line for line in _account(results))
