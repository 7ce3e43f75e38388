"""Micro-batches by tokens: every record once, equally many for all, lazily, and bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training.runs import make_trainer, rows, step_gradient, weights
from training.test_invariance import in_processes, relative
from zoo import build
from zoo.images import image

from taid_vlm import DistillationConfig
from taid_vlm.adapters import make_adapter
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.batch.lengths import Lengths
from taid_vlm.config.training import train_spec
from taid_vlm.errors import TaidError
from taid_vlm.training.budget import WINDOW, BudgetBatches, planned

torch.set_num_threads(1)

# ----- batches ------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_row_is_in_one_batch_that_fits(packing: bool, processes: int) -> None:
    rng = np.random.default_rng(processes)
    for number, budget in itertools.product((1, 2, 7, 200), (16, 100, 1000)):
        lengths = rng.integers(0, 120, (number, 2))
        groups = planned(lengths, budget, packing, processes, rng)
        assert {len(group) for group in groups} == {processes}
        batches = [batch for group in groups for batch in group if batch]
        assert sorted(itertools.chain.from_iterable(batches)) == list(range(number))
        for batch in batches:
            cost = lengths[batch].sum(0).max() if packing else len(batch) * lengths[batch].max()
            assert cost <= budget or len(batch) == 1


def test_batches_are_of_like_lengths_and_in_no_order_of_length() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, (1000, 2))
    groups = planned(lengths, 4000, False, 1, np.random.default_rng(0))
    longest = [lengths[batch].max() for (batch,) in groups]
    spread = [lengths[batch].max(1).max() - lengths[batch].max(1).min() for (batch,) in groups]
    assert np.mean(spread) < 20
    assert longest != sorted(longest)
    real = lengths.max(1).sum() / sum(len(b) * lengths[b].max() for (b,) in groups)
    assert real > 0.95  # of the tokens that are computed


class Counted:
    """Rows of the lengths that their numbers say, which note that they are read."""

    def __init__(self, number: int) -> None:
        self.number, self.read = number, list[int]()

    def __len__(self) -> int:
        return self.number

    def lengths(self) -> Any:
        lengths = Lengths(self, DistillationCollator(_text_adapter()))
        lengths.measure = self._measure  # type: ignore[method-assign]
        return lengths

    def _measure(self, index: int) -> list[int]:
        self.read.append(index)
        return [20 + index % 50]


def _text_adapter() -> Any:
    return make_adapter(build("llama").processor, "student")


def test_lengths_are_taken_when_a_window_is_reached_and_once() -> None:
    data = Counted(3 * WINDOW)
    batches = iter(BudgetBatches(data.lengths(), 500, False, 0))
    next(batches)
    assert len(data.read) == WINDOW
    seen = 0
    while seen < 2 * len(data):
        seen += len(next(batches))
    assert sorted(data.read) == list(range(len(data)))


def test_processes_share_the_work_and_the_rows() -> None:
    data = Counted(3000)
    known = data.lengths()
    known.known[:, 0] = [data._measure(i)[0] for i in range(len(data))]
    sides = [BudgetBatches(known, 500, False, 0, 1.0, (rank, 2)) for rank in (0, 1)]
    number = sides[0].steps(1)
    assert number == sides[1].steps(1)
    drawn = [list(itertools.islice(side, number)) for side in sides]
    everything = [row for side in drawn for batch in side for row in batch]
    assert sorted(everything) == list(range(len(data)))
    assert next(itertools.islice(sides[0], number, None)) == []  # behind the last pass


@pytest.mark.parametrize("done", [0, 5, 100, 231])
def test_going_on_looks_at_nothing_that_is_done(done: int) -> None:
    data = Counted(2 * WINDOW + 100)
    first = BudgetBatches(data.lengths(), 500, False, 3)
    whole = list(itertools.islice(first, 300))
    ends = list(itertools.accumulate(first.counts))
    data.read.clear()
    again = BudgetBatches(data.lengths(), 500, False, 3)
    again.go_on(first.state_dict(), done)
    drawn = itertools.islice(again, done, 300)
    assert next(drawn) == whole[done]
    begun = max((end for end in ends if end <= done), default=0)
    assert set(data.read) == set(itertools.chain.from_iterable(
        whole[begun:min(end for end in ends if end > done)]))
    assert list(drawn) == whole[done + 1:]
    other = BudgetBatches(data.lengths(), 600, False, 3)
    other.go_on(first.state_dict(), done)
    assert not other.counts  # another run's


def test_passes_are_counted_by_records() -> None:
    data = Counted(WINDOW + WINDOW // 2)
    batches = BudgetBatches(data.lengths(), 500, False, 0)
    list(itertools.islice(batches, 400))
    first, second = batches.counts[:2]
    assert batches.passed(0) == 0
    assert batches.passed(first) == pytest.approx(2 / 3)
    assert batches.passed(first + second) == 1
    assert batches.passed(first + second + batches.counts[2]) == pytest.approx(5 / 3)


# ----- lengths ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "smolvlm", "qwen3_vl", "internvl", "paligemma"])
def test_lengths_are_those_of_a_batch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pictures of a size that was seen before, too, and those are not decoded."""
    built = build(family)
    collator = DistillationCollator(make_adapter(built.processor, "student", 2000))
    data = [{"prompt": "<image>what", "completion": "a " * n, "images": [image(kind, seed=n)]}
            for n, kind in enumerate(("square", "wide", "tall", "square", "wide"), 1)]
    lengths = Lengths(data, collator)
    assert [lengths.measure(i) for i in range(3)] == [real(collator, row) for row in data[:3]]
    monkeypatch.setattr("taid_vlm.records.images.ImageRef.load", None)
    measured = [lengths.measure(i) for i in (3, 4)]
    monkeypatch.undo()
    assert measured == [real(collator, row) for row in data[3:]]


def real(collator: DistillationCollator, row: dict[str, Any]) -> list[int]:
    return [int(collator([row])["student_inputs"]["attention_mask"].sum())]


def test_what_is_left_out_has_no_length_and_a_text_is_cut() -> None:
    collator = DistillationCollator(make_adapter(build("llama").processor, "student", 30))
    data: list[Any] = [{"prompt": "what", "completion": "word " * 100}, {"text": "word " * 100},
                       {"prompt": "no answer"}, {"prompt": "what", "completion": "red"}]
    lengths = Lengths(data, collator)
    assert [lengths.measure(i) for i in range(4)] == [[0], [30], [0], real(collator, data[3])]


# ----- training -----------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_the_gradient_is_that_of_any_other_split(packing: bool, tmp_path: Path) -> None:
    data = rows(12)
    whole = step_gradient(tmp_path, data=data, per_device_train_batch_size=12)
    trainer = make_trainer(tmp_path, data=data, tokens_per_batch=200, packing=packing,
                           max_steps=-1, num_train_epochs=1)
    number = trainer.budget.steps(1)
    assert 3 <= number < 12
    split = step_gradient(tmp_path, data=data, tokens_per_batch=200, packing=packing,
                          gradient_accumulation_steps=number)
    assert relative(whole, split) < 1e-6


def test_passes_are_whole(tmp_path: Path) -> None:
    """As many steps as they have, and every record as often; figures are by passes."""
    trainer = make_trainer(tmp_path, tokens_per_batch=300, max_steps=-1, num_train_epochs=2,
                           gradient_accumulation_steps=2, eval_strategy="epoch", logging_steps=1)
    trainer.train()
    assert trainer.intake.rows == {"read": 64, "used": 64}
    assert trainer.state.epoch == 2
    epochs = [log["epoch"] for log in trainer.state.log_history if "loss" in log]
    assert epochs == sorted(epochs)
    assert epochs[0] == pytest.approx(2 / trainer.state.max_steps, rel=0.3)
    assert [int(log["epoch"]) for log in trainer.state.log_history if "eval_kl" in log] == [1, 2]


def test_workers_change_nothing(tmp_path: Path) -> None:
    options = {"tokens_per_batch": 200, "max_steps": 4}
    runs = [make_trainer(tmp_path, dataloader_num_workers=workers, **options)
            for workers in (0, 2)]
    for trainer in runs:
        trainer.train()
    first, second = map(weights, runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    """In its second pass; the first window's records are not measured again."""
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 3, "dropout": 0.1,
               "gradient_accumulation_steps": 2, "tokens_per_batch": 300}
    in_processes(1, tmp_path, killed={**options, "kill_at": 8})
    assert not (tmp_path / "killed" / "final.safetensors").exists()
    whole, resumed = (make_trainer(tmp_path / name, **options) for name in ("whole", "killed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-6"))
    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole.recorder.t[6:] == resumed.recorder.t
    assert whole.state.epoch == resumed.state.epoch
    assert whole.state.epoch > 1


# ----- refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "named"), [
    ({"per_device_train_batch_size": 4}, "per_device_train_batch_size = 4"),
    ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy = .*sequential"),
    ({"window": 64}, "window = 64"),
    ({"tokens_per_batch": 8}, "tokens_per_batch = 8"),
    ({"objective": {"name": "kl", "on_policy": {"lmbda": 0.5, "max_new_tokens": 4}}}, "on_policy"),
])
def test_what_cannot_be_beside_it_is_refused(
    arguments: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(TaidError, match=named):
        DistillationConfig(str(tmp_path), **{"tokens_per_batch": 100, **arguments})


def test_a_recipe_names_one_size() -> None:
    """Also where the other one is its default."""
    with pytest.raises(ValueError, match="per_device_train_batch_size = 8 has no effect"):
        train_spec()(tokens_per_batch=100, per_device_train_batch_size=8)


def test_streams_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaidError, match="tokens_per_batch sorts records by length"):
        make_trainer(tmp_path, student="qwen2", teacher="llama", streamed=True,
                     tokens_per_batch=100)
