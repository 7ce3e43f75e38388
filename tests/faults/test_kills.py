"""Runs that are killed at random moments, and resumed, end bit for bit where the whole run ends.

The seed is printed; TAID_VLM_FAULTS_SEED chooses another, TAID_VLM_FAULTS_KILLS more or fewer.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli.recipes import write_recipe
from cli.test_distill import minimal
from safetensors.torch import load_file

SEED = int(os.environ.get("TAID_VLM_FAULTS_SEED", "1"))
KILLS = int(os.environ.get("TAID_VLM_FAULTS_KILLS", "6"))
STEPS = {"max_steps": 12, "save_steps": 2, "save_strategy": "steps", "save_total_limit": 2,
         "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 1}


def start(recipe: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "taid_vlm", "distill", str(recipe), *words], text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"})


def when_it_works(process: subprocess.Popen[str], output: Path) -> None:
    """Wait until the run has taken its folder; start-up is no moment worth a kill."""
    while process.poll() is None and not (output / "recipe.yaml").exists():
        time.sleep(0.05)


@pytest.mark.faults
def test_killed_runs_end_where_the_whole_one_ends(tmp_path: Path, checkpoints: Any) -> None:
    print(f"TAID_VLM_FAULTS_SEED={SEED}")
    rng = random.Random(SEED)
    tree = minimal(tmp_path, checkpoints, train=STEPS)
    whole = start(write_recipe(tmp_path, {**tree, "output_dir": str(tmp_path / "whole")}, "w.yaml"))
    assert whole.wait(300) == 0, whole.stderr and whole.stderr.read()
    recipe, output = write_recipe(tmp_path, tree), tmp_path / "out"
    resumed = False
    for kill in range(KILLS):
        words = ["--resume"] if any(output.glob("checkpoint-*/taid_vlm.json")) else ["--overwrite"]
        resumed = resumed or words == ["--resume"]
        process = start(recipe, *words)
        when_it_works(process, output)
        time.sleep(rng.uniform(0.0, 4.0))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break  # it was faster
        assert process.returncode == -signal.SIGKILL, (SEED, kill, process.stderr.read())
        for name in ("student", "results.json"):  # whole or absent
            path = output / name
            assert not path.exists() or path.is_file() or (path / "config.json").exists()
    if not (output / "results.json").exists():
        words = ["--resume"] if any(output.glob("checkpoint-*/taid_vlm.json")) else ["--overwrite"]
        last = start(recipe, *words)
        assert last.wait(300) == 0, (SEED, last.stderr and last.stderr.read())
    ours, theirs = (load_file(place / "student/model.safetensors")
                    for place in (output, tmp_path / "whole"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours), SEED
