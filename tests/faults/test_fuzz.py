"""Inputs broken at random: every command ends in success or in one message, soon, and leaves
nothing half-written; never in a traceback.

The seed is printed; TAID_VLM_FAULTS_SEED chooses another, TAID_VLM_FAULTS_INPUTS more inputs (300
take about a minute and a half of CPU, the default much less).
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli.recipes import Outcome
from cli.test_distill import minimal
from faults.breaking import changed, flipped, noise
from faults.folders import Finished, Words, half_written, snapshot
from faults.test_kills import SEED

Cli = Callable[..., Outcome]
INPUTS = int(os.environ.get("TAID_VLM_FAULTS_INPUTS", "60"))
ONLY = os.environ.get("TAID_VLM_FAULTS_ONLY")  # the number of one input, to look at it
LONGEST = 20.0  # seconds of CPU of one command; on the clock, where others work, three times that


class Hang(BaseException):
    """A command took too long."""


def too_long(number: int, frame: Any) -> None:
    raise Hang


class World:
    """A recipe with its data and models, whole; `broken` breaks one thing of it."""

    def __init__(self, folder: Path, checkpoints: Any) -> None:
        self.folder = folder
        self.tree = minimal(folder, checkpoints, "image paths", {"max_steps": 1})
        self.models = {role: Path(self.tree[role]["model_name_or_path"])
                       for role in ("teacher", "student")}
        self.finished = Finished(folder, self.tree)

    def broken(self, rng: random.Random, number: int) -> tuple[str, Words]:
        if number % 2:
            return self.finished.broken(rng)
        kind, recipe = self.broken_recipe(rng)
        words = ("inspect", recipe, "--all") if number % 3 else ("distill", recipe, "--overwrite")
        return kind, words

    def broken_recipe(self, rng: random.Random) -> tuple[str, Path]:
        kind = rng.choice(("recipe", "recipe bytes", "records", "record bytes", "image", "model"))
        tree = copy.deepcopy(self.tree)
        data = Path(tree["data"]["train"] if isinstance(tree["data"]["train"], str)
                    else tree["data"]["train"]["path"])
        fresh = self.folder / "broken"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        lines = data.read_text(encoding="utf-8").splitlines()
        if kind == "recipe":
            tree = changed(rng, tree)
        elif kind == "records":
            at = rng.randrange(len(lines))
            lines[at] = json.dumps(changed(rng, json.loads(lines[at])))
        elif kind == "image":
            lines[0] = json.dumps({"prompt": "<image>what", "completion": "red",
                                   "image": str(noise(rng, fresh))})
        elif kind == "model":
            role = rng.choice(("teacher", "student"))
            shutil.copytree(self.models[role], fresh / role)
            file = rng.choice([path for path in sorted((fresh / role).iterdir())
                               if path.is_file()])
            if file.suffix == ".json" and rng.random() < 0.5:
                file.write_text(json.dumps(changed(rng, json.loads(file.read_text()))))
            else:
                file.write_bytes(flipped(rng, file.read_bytes()))
            tree[role]["model_name_or_path"] = str(fresh / role)
            kind = f"model: {role}/{file.name}"
        if kind in ("records", "image", "record bytes"):
            text = "\n".join(lines).encode()
            # beside the whole data, from where images are named
            target = data.with_name("broken.jsonl")
            target.write_bytes(flipped(rng, text) if kind == "record bytes" else text)
            tree["data"] = {**tree["data"], "train": str(target)}
        recipe = fresh / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        if kind == "recipe bytes":
            recipe.write_bytes(flipped(rng, recipe.read_bytes()))
        return kind, recipe


def problem_of(cli: Cli, words: Words, folder: Path, outcomes: Counter[int]) -> str:
    """What is wrong with how a command ends; "" where nothing is."""
    before, started = snapshot(folder), time.process_time()
    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, 3 * LONGEST)
    try:
        done = cli(*words)
    except (Exception, Hang) as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    took = time.process_time() - started
    outcomes[done.status] += 1
    if done.status not in (0, 2) or (done.status == 2) != (len(done.errors) == 1):
        return f"status {done.status}: {done.err[-400:]}"
    if took > LONGEST:
        return f"took {took:.0f} s"
    return "; ".join(half_written(folder, before))


@pytest.mark.faults
def test_broken_inputs_end_in_success_or_one_message(
    tmp_path: Path, checkpoints: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    print(f"TAID_VLM_FAULTS_SEED={SEED}")
    monkeypatch.chdir(tmp_path)
    world, failures = World(tmp_path, checkpoints), list[Any]()
    outcomes, kinds = Counter[int](), Counter[str]()
    for number in range(INPUTS):
        if ONLY is not None and number != int(ONLY):
            continue
        kind, words = world.broken(random.Random(f"{SEED}-{number}"), number)
        problem = problem_of(cli, words, tmp_path, outcomes)
        kinds[kind.partition(":")[0]] += 1
        if problem:
            failures.append((number, kind, *map(str, words[:1]), *words[2:3], problem))
            print(failures[-1], flush=True)
    print(f"ended in success: {outcomes[0]}, in one message: {outcomes[2]}; {dict(kinds)}")
    assert ONLY is not None or (outcomes[0] and outcomes[2])
    assert not failures, f"seed {SEED}:\n" + "\n".join(map(str, failures))
