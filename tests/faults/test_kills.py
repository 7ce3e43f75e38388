"""Runs that are killed at random moments, and resumed, end bit for bit where the whole run ends:
in steps, while a checkpoint or the student is written, while they evaluate; on one process and on
two, one of them killed or both.

The seed is printed; TAID_VLM_FAULTS_SEED chooses another, TAID_VLM_FAULTS_KILLS more kills; the
default is small enough for every change.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cli.recipes import write_recipe
from cli.test_distill import minimal
from faults.victims import Harm, Victim
from safetensors.torch import load_file

SEED = int(os.environ.get("TAID_VLM_FAULTS_SEED", "1"))
KILLS = int(os.environ.get("TAID_VLM_FAULTS_KILLS", "6"))
STEPS = {"max_steps": 12, "save_steps": 2, "save_strategy": "steps", "save_total_limit": 2,
         "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 1}
KILLED = -9
MOMENTS = ("file", "file", "step", "evaluate")


def how_to_go_on(output: Path) -> list[str]:
    return ["--resume"] if any(output.glob("checkpoint-*/taid_vlm.json")) else ["--overwrite"]


def assert_whole_or_absent(output: Path, note: Any) -> None:
    for name in ("student", "results.json"):
        path = output / name
        if path.is_dir():
            assert (path / "config.json").exists(), note
            load_file(path / "model.safetensors")
        elif path.exists():
            json.loads(path.read_text())


def ends_alike(output: Path, whole: Path, note: Any) -> None:
    """The student bit for bit, and all that was measured of it."""
    ours, theirs = (load_file(place / "student/model.safetensors") for place in (output, whole))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours), note
    ours, theirs = (json.loads((place / "results.json").read_text()) for place in (output, whole))
    assert ours["eval"] == theirs["eval"], note
    for key in ("steps", "answer_tokens", "t", "adaptive_share"):
        assert ours["train"][key] == theirs["train"][key], (key, note)
    losses = [[(line["step"], line["kl"]) for line in results["history"] if "kl" in line]
              for results in (ours, theirs)]
    assert losses[0] == losses[1], note
    assert ours["machine"]["processes"] == theirs["machine"]["processes"]


def some_moment(rng: random.Random, counts: Counter[str]) -> Harm:
    """In the first half of a whole run's moments: a run that goes on has fewer of them."""
    at = rng.choice(MOMENTS)
    return Harm("kill", at, rng.randint(1, counts[at] // 2), share=rng.random())


def kill_and_resume(
    rng: random.Random, recipe: Path, output: Path, whole: Path, counts: Sequence[Counter[str]],
    kills: int, log: Path,
) -> Counter[str]:
    """Kill a run so often, going on each time, then let it end; one that ends before it is killed
    is compared with the whole one and begun anew. Which moments it was killed in."""
    moments = Counter[str]()
    while (kill := moments.total() - moments["ended first"]) < kills:
        harms = [some_moment(rng, each) for each in counts]
        if len(harms) > 1 and rng.random() < 0.5:  # one of them alone
            harms[rng.randrange(len(harms))] = Harm()
        words = how_to_go_on(output)
        victim = Victim(["distill", recipe, *words], output, harms, log)
        codes = victim.wait()
        note = (SEED, kill, harms, words, codes, victim.error()[-2000:])
        assert any(code == KILLED for code in codes) or not any(codes), note
        moments["ended first" if not any(codes) else next(
            harm.at for harm, code in zip(harms, codes, strict=True) if code == KILLED)] += 1
        assert_whole_or_absent(output, note)
        if not any(codes):
            ends_alike(output, whole, note)
            shutil.rmtree(output)
    if not (output / "results.json").exists():
        last = Victim(["distill", recipe, *how_to_go_on(output)], output,
                      [Harm() for _ in counts], log)
        assert not any(last.wait()), (SEED, last.error())
    return moments


@pytest.mark.faults
def test_killed_runs_end_where_the_whole_one_ends(tmp_path: Path, checkpoints: Any) -> None:
    rng = random.Random(SEED)
    tree = minimal(tmp_path, checkpoints, train=STEPS)
    whole = tmp_path / "whole"
    recipe = write_recipe(tmp_path, {**tree, "output_dir": str(whole)}, "whole.yaml")
    victim = Victim(["distill", recipe], whole, [Harm()], tmp_path / "log")
    assert victim.wait() == [0], victim.error()
    counts = victim.counts()
    print(f"TAID_VLM_FAULTS_SEED={SEED}; moments of the whole run: {dict(counts)}")
    moments = kill_and_resume(rng, write_recipe(tmp_path, tree), tmp_path / "out", whole, [counts],
                              KILLS, tmp_path / "log")
    print(f"killed in: {dict(moments)}")
    ends_alike(tmp_path / "out", whole, SEED)


@pytest.mark.faults
def test_runs_on_two_processes_do_too(tmp_path: Path, checkpoints: Any) -> None:
    """The whole one is started by torchrun; those that are killed, as torchrun would."""
    rng = random.Random(SEED)
    tree = minimal(tmp_path, checkpoints, train={**STEPS, "max_steps": 8})
    whole = tmp_path / "whole"
    recipe = write_recipe(tmp_path, {**tree, "output_dir": str(whole)}, "whole.yaml")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", "-m", "taid_vlm", "distill", str(recipe)]
    run = subprocess.run(torchrun, capture_output=True, text=True, timeout=100, check=False,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    recipe, output = write_recipe(tmp_path, tree), tmp_path / "out"
    victim = Victim(["distill", recipe], output, [Harm(), Harm()], tmp_path / "log")
    assert victim.wait() == [0, 0], victim.error() + victim.error(1)
    counts = [victim.counts(rank) for rank in range(2)]
    print(f"TAID_VLM_FAULTS_SEED={SEED}; moments by process: {list(map(dict, counts))}")
    assert json.loads((output / "results.json").read_text())["machine"]["processes"] == 2
    ends_alike(output, whole, SEED)
    moments = kill_and_resume(rng, recipe, output, whole, counts, max(KILLS // 2, 2),
                              tmp_path / "log")
    print(f"killed in: {dict(moments)}")
    ends_alike(output, whole, SEED)
