"""Whole runs under FSDP2, in two gloo processes: the student on disk is that of one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.recipes import Checkpoints, write_recipe
from cli.test_distill import minimal
from safetensors.torch import load_file
from training.test_placement import LEAN, ZERO

from taid_vlm.config.recipe import parse_recipe
from taid_vlm.training.config import training_arguments

PEFT = {"r": 4, "target_modules": "all-linear"}


def run(
    folder: Path, checkpoints: Checkpoints, processes: int, peft: Any, *words: str,
    scenario: str = "pairs", objective: Any = "taid", **train: Any,
) -> Path:
    """The output folder of a run with batches of 4."""
    tree = minimal(folder, checkpoints, scenario, objective=objective, train={
        "max_steps": 3, "seed": 1, "learning_rate": 0.1, "optim": "sgd",
        "per_device_train_batch_size": 4 // processes, **train})
    tree["evaluate"] = {"examples": 2, "max_new_tokens": 4}
    if processes > 1:
        tree["teacher"]["sharding"] = "fsdp"
    if peft is not None:
        tree["student"]["peft"] = peft
    launcher = ["-m", "taid_vlm"] if processes == 1 else [
        "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
        str(Path(__file__).parents[1] / "fsdp_on_cpu.py")]
    done = subprocess.run(
        [sys.executable, *launcher, "distill", str(write_recipe(folder, tree)),
         *words], capture_output=True, text=True, timeout=400, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((folder / "out/results.json").read_text())
    assert results["machine"]["processes"] == processes
    return folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("peft", [None, PEFT], ids=["full", "lora"])
def test_the_student_is_that_of_one_process(
    peft: Any, tmp_path: Path, checkpoints: Checkpoints
) -> None:
    one = run(tmp_path / "one", checkpoints, 1, peft, scenario="image paths")
    two = run(tmp_path / "two", checkpoints, 2, peft, scenario="image paths", fsdp=True)
    name = "model.safetensors" if peft is None else "adapter_model.safetensors"
    whole, sharded = load_file(one / "student" / name), load_file(two / "student" / name)
    assert whole.keys() == sharded.keys()
    difference = max(float((whole[key] - sharded[key]).abs().max()) for key in whole)
    assert difference < 1e-5
    assert any("fsdp" in path.name for path in (two / "checkpoint-3").iterdir())
    assert (two / "eval_answers.jsonl").exists()
    said, other = (json.loads((out / "results.json").read_text())["examples"] for out in (one, two))
    assert said
    assert said == other


@pytest.mark.slow
@pytest.mark.parametrize("peft", [None, PEFT], ids=["full", "lora"])
def test_a_run_that_broke_off_goes_on_bit_for_bit(
    peft: Any, tmp_path: Path, checkpoints: Checkpoints
) -> None:
    """With AdamW, whose state is in the shards, too; in bf16 as most recipes train."""
    goes_on(tmp_path, checkpoints, peft, {"fsdp": True})


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_under_zero_goes_on_bit_for_bit(
    stage: int, tmp_path: Path, checkpoints: Checkpoints
) -> None:
    pytest.importorskip("deepspeed")
    zero = ZERO | {"zero_optimization": {"stage": stage} if stage == 2 else LEAN}
    goes_on(tmp_path, checkpoints, None, {"deepspeed": zero | {"bf16": {"enabled": "auto"}}})


@pytest.mark.slow
def test_sharded_students_sample_what_one_process_does(
    tmp_path: Path, checkpoints: Checkpoints
) -> None:
    """Micro-batches of two often have no sample or no reference, in one process or in both: each
    still finds its partner in every pass."""
    objective = {"name": "taid", "on_policy": {"lmbda": 0.8, "max_new_tokens": 8}}
    how = {"scenario": "image paths", "objective": objective, "max_steps": 6}
    one = run(tmp_path / "one", checkpoints, 1, None, **how)
    two = run(tmp_path / "two", checkpoints, 2, None, **how, fsdp=True)
    whole, sharded = (load_file(out / "student/model.safetensors") for out in (one, two))
    assert max(float((whole[key] - sharded[key]).abs().max()) for key in whole) < 1e-5
    own, of_two = (json.loads((out / "results.json").read_text())["train"]["on_policy"]
                   for out in (one, two))
    assert own["sampled"] >= 3 and own["look"]["kl_blank"] > 0
    same, of_one = ({**each, "seconds": 0, "look": None} for each in (of_two, own))
    assert same == of_one
    assert of_two["look"] == pytest.approx(own["look"], abs=1e-4)


def goes_on(
    tmp_path: Path, checkpoints: Checkpoints, peft: Any, sharding: dict[str, Any]
) -> None:
    how = {**sharding, "scenario": "image paths", "max_steps": 4, "save_steps": 2,
           "optim": "adamw_torch", "learning_rate": 1e-3, "bf16": True}
    out = run(tmp_path, checkpoints, 2, peft, **how)
    kept = "pytorch_model_fsdp" if "fsdp" in sharding else "global_step"
    assert any(path.name.startswith(kept) for path in (out / "checkpoint-2").iterdir())
    (out / "student").rename(tmp_path / "whole")
    shutil.rmtree(out / "checkpoint-4")
    (out / "results.json").unlink()
    run(tmp_path, checkpoints, 2, peft, "--resume", **how)
    results = json.loads((out / "results.json").read_text())
    assert results["train"]["resumed_from"] == "checkpoint-2"
    name = "model.safetensors" if peft is None else "adapter_model.safetensors"
    one, two = load_file(tmp_path / "whole" / name), load_file(out / "student" / name)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_student_without_weights_is_not_saved(
    tmp_path: Path, checkpoints: Checkpoints, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with shards that nobody gathers."""
    monkeypatch.setattr("taid_vlm.training.trainer.DistillationTrainer.save_model",
                        lambda self, folder, **_: Path(folder, "config.json").touch())
    tree = minimal(tmp_path, checkpoints, train={"max_steps": 1, "save_strategy": "no"})
    done = cli("distill", write_recipe(tmp_path, tree))
    assert done.status == 2
    assert "weights were not gathered" in done.err
    assert not (tmp_path / "out/student").exists()


def test_a_mapping_of_a_recipe_stays_as_it_was_written(tmp_path: Path) -> None:
    """It is compared with that of a checkpoint, and hashed."""
    written = {"non_blocking": True}
    recipe = parse_recipe({
        "student": "a", "objective": "ce", "data": {"train": "b"}, "output_dir": str(tmp_path),
        "train": {"use_cpu": True, "accelerator_config": dict(written),
                  "fsdp_config": {"min_num_params": 0}}})
    arguments = training_arguments(recipe)
    arguments.fsdp_config["version"] = 2
    assert recipe.train["fsdp_config"] == {"min_num_params": 0}
    assert recipe.train["accelerator_config"] == written


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_processes_of_a_launch_know_each_other_without_an_accelerator(tmp_path: Path) -> None:
    """accelerate joins them on a CPU only where that is said."""
    recipe = parse_recipe({"student": "a", "objective": "ce", "data": {"train": "b"},
                           "output_dir": str(tmp_path)})
    assert training_arguments(recipe).use_cpu
