"""Numbers that go wrong: a step without a finite loss or gradient leaves no trace but its count."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training.runs import POISON, make_trainer, poison_teacher, rows, weights
from zoo import build, save

from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import TaidError
from taid_vlm.models.loading import load_model
from taid_vlm.records import parse_record


def poisoned(folder: Path, at: int | None, steps: int = 4, **options: Any) -> Any:
    """A run over text rows in order, whose teacher says NaN for the rows that begin so."""
    data = rows(4 * steps, text_only=True)
    if at is not None:
        data[4 * at + 2] = {"prompt": POISON, "completion": "blue square"}
    records: Any = [parse_record(row, f"row {index}") for index, row in enumerate(data)]
    trainer = make_trainer(folder, student="gemma2", teacher="qwen2", data=records, max_steps=steps,
                           per_device_train_batch_size=4, logging_steps=1, **options)
    trainer._get_train_sampler = lambda *_: None
    poison_teacher(trainer, math.nan)
    return trainer


@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_a_step_with_one_bad_record_is_not_applied(
    implementation: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = poisoned(tmp_path, at=1, loss_implementation=implementation)
    moved: list[Any] = []

    class Watch(type(trainer.recorder)):  # type: ignore[misc]
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            optimizer = trainer.optimizer
            counts = {float(s["step"]) for s in optimizer.state.values() if "step" in s}
            moved.append((weights(trainer), counts, trainer.schedule.t, trainer.answer_tokens))

    watch = Watch()
    watch.trainer = trainer
    trainer.add_callback(watch)
    trainer.train()
    (before, _, t, tokens), (after, counts, later, later_tokens) = moved[0], moved[1]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert counts == {1.0}
    assert (t, tokens) == (later, later_tokens)
    assert all(x.isfinite().all() for x in moved[-1][0].values())
    assert moved[-1][1] == {3.0}
    assert any(not torch.equal(after[name], moved[2][0][name]) for name in after)
    assert trainer.guard.skipped == {"loss or gradient not finite": 1}
    assert "Step 2 is not applied" in caplog.text
    assert "(row 6)" in caplog.text
    logged = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert math.isnan(logged[1]["loss"])
    assert all(math.isfinite(row["loss"]) for row in (logged[0], *logged[2:]))
    assert [row.get("skipped_steps") for row in logged] == [None, 1, 1, 1]


def test_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=20, learning_rate=1e30, max_nonfinite_steps=3,
                           lr_scheduler_type="constant")
    with pytest.raises(TaidError, match=r"3 steps in a row .*max_nonfinite_steps"):
        trainer.train()
    assert trainer.state.global_step < 6


def test_a_run_without_bad_numbers_counts_none(tmp_path: Path) -> None:
    trainer = poisoned(tmp_path, at=None)
    trainer.train()
    assert not trainer.guard.skipped
    assert not any("skipped_steps" in row for row in trainer.state.log_history)


def test_a_checkpoint_without_numbers_is_not_written(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    with pytest.raises(TaidError, match=r"checkpoint-1.* is not written: .* no numbers"):
        trainer.train()
    assert not (tmp_path / "checkpoint-1").exists()


@pytest.mark.parametrize("change", ["prefix", "lacking", "shape"])
def test_weights_that_do_not_match_are_refused(change: str, tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "model")
    path = Path(folder) / "model.safetensors"
    state = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    if change == "prefix":
        state = {f"module.x.{key}": x for key, x in state.items()}
    elif change == "lacking":
        state.pop(name)
    else:
        state[name] = state[name][:-1].contiguous()
    save_file(state, path, {"format": "pt"})
    with pytest.raises(TaidError, match=r"teacher: .*model") as refused:
        load_model(ModelSpec(str(folder)), "teacher")
    message = str(refused.value)
    if change == "prefix":
        assert "lacks" in message
        assert "instead" in message
    else:
        assert name in message


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads_need_not_be_stored(tied: bool, tmp_path: Path) -> None:
    folder = save(build("qwen2", tied=tied), tmp_path / "model")
    assert load_model(ModelSpec(str(folder)), "student") is not None
