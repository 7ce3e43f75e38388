"""The same mathematics however a step is cut into batches, processes and padding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training.runs import make_trainer, rows, step_gradient, weights

TOLERANCE = 1e-5
ALTERNATIVES = {
    "4 x 2 accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "1 x 8 accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "left padding": {"padding_side": "left"},
}


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of any parameter, relative to the whole gradient's norm."""
    assert a.keys() == b.keys()
    norm = torch.stack([x.double().norm() for x in a.values()]).norm()
    assert norm > 1e-3
    return max(float((a[name] - b[name]).abs().max()) for name in a) / float(norm)


SGD = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0,
       "lr_scheduler_type": "constant"}


def in_processes(number: int, folder: Path, **runs: dict[str, object]) -> None:
    """Run each of `runs` in `number` gloo processes; results lie in folder / name."""
    for name in runs:
        (folder / name).mkdir(parents=True)
    listed = [{"output": str(folder / name), **options} for name, options in runs.items()]
    (folder / "options.json").write_text(json.dumps(listed))
    script = str(Path(__file__).with_name("runs.py"))
    launcher = [] if number == 1 else [
        "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    command = [sys.executable, *launcher, script, str(folder / "options.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode not in (0, -9):
        raise AssertionError(done.stderr[-3000:])


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of two processes, for the gradient and for the trajectory of t."""
    folder = tmp_path_factory.mktemp("two")
    in_processes(2, folder, gradient={**SGD, "per_device_train_batch_size": 4},
                 trajectory={"max_steps": 6, "per_device_train_batch_size": 4},
                 streamed={"max_steps": 3, "per_device_train_batch_size": 4, "streamed": True})
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return step_gradient(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_gradient_does_not_depend_on_batches(
    name: str, reference: dict[str, Tensor], tmp_path: Path
) -> None:
    assert relative(reference, step_gradient(tmp_path, **ALTERNATIVES[name])) < TOLERANCE


def test_gradient_is_the_token_weighted_mean_of_single_rows(tmp_path: Path) -> None:
    """Batch mates change nothing: rows alone, weighted by their tokens, give the batch."""
    data = rows(4)
    whole = step_gradient(tmp_path, data=data, per_device_train_batch_size=4)
    total, parts = 0, []
    for row in data:
        trainer = make_trainer(tmp_path, data=[row])
        tokens = len(trainer.data_collator([row])["labels"])
        parts.append((tokens, step_gradient(tmp_path, data=[row], per_device_train_batch_size=1)))
        total += tokens
    summed = {name: sum(n * part[name] for n, part in parts) / total for name in whole}
    assert relative(whole, summed) < TOLERANCE


def test_two_processes_give_the_gradient_of_one(
    reference: dict[str, Tensor], two_processes: Path, tmp_path: Path
) -> None:
    before = weights(make_trainer(tmp_path))
    after = load_file(two_processes / "gradient" / "final.safetensors")
    assert relative(reference, {name: before[name] - after[name] for name in before}) < TOLERANCE


def trajectory(folder: Path, **options: object) -> tuple[list[float], dict[str, Tensor]]:
    trainer = make_trainer(folder, max_steps=6, **options)
    trainer.train()
    return trainer.recorder.t, weights(trainer)


def test_t_moves_the_same_way_under_any_split(two_processes: Path, tmp_path: Path) -> None:
    plain, _ = trajectory(tmp_path / "plain")
    assert plain == sorted(plain)
    assert plain[-1] > 0.5
    for name, options in ALTERNATIVES.items():
        other, _ = trajectory(tmp_path / name, **options)
        assert other == pytest.approx(plain, abs=1e-6), name
    two = json.loads((two_processes / "trajectory" / "trajectory.json").read_text())
    assert two == pytest.approx(plain, abs=1e-6)


def test_streams_are_shared_between_processes(two_processes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=3, streamed=True)
    trainer.train()
    two = json.loads((two_processes / "streamed" / "trajectory.json").read_text())
    assert two == pytest.approx(trainer.recorder.t, abs=1e-6)


def test_evaluation_moves_no_state(tmp_path: Path) -> None:
    """Evaluating at every step leaves t and every weight as they were, bit for bit."""
    t, final = trajectory(tmp_path / "without", dropout=0.1)
    t_too, final_too = trajectory(
        tmp_path / "with", dropout=0.1, eval_strategy="steps", eval_steps=1)
    assert t == t_too
    assert all(torch.equal(final[name], final_too[name]) for name in final)


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3, "dropout": 0.1,
               "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    in_processes(1, tmp_path, killed={**options, "kill_at": 5})
    assert not (tmp_path / "killed" / "final.safetensors").exists()
    whole, resumed = (make_trainer(tmp_path / name, **options) for name in ("whole", "killed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-3"))
    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole.recorder.t[3:] == resumed.recorder.t
    assert whole.schedule.state_dict() == resumed.schedule.state_dict()
