"""Disks that fill up, folders that turn read-only, files that cannot be written, at random moments
of a run: it ends in one message, nothing is half-written, and the run that follows ends bit for
bit where the whole one does. A disk that is full in the midst of a file is a limit on the size of
files; where a file system can be mounted, one of a few hundred KB is.

The seed is printed; TAID_VLM_FAULTS_SEED chooses another, TAID_VLM_FAULTS_KILLS more; the default
is small enough for every change.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli.recipes import write_recipe
from cli.test_distill import minimal
from faults.folders import half_written
from faults.test_kills import KILLS, SEED, ends_alike, how_to_go_on
from faults.victims import FAILURES, Harm, Victim

STEPS = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "save_total_limit": 1,
         "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}


def assert_one_message(victim: Victim, codes: list[int], note: Any) -> None:
    """The first process, which is the one that cannot write, ends in one message; another may say
    that it has lost the first (status 1), or is ended."""
    assert codes[0] == 2 and set(codes) <= {0, 1, 2, -9, -15}, (note, codes, victim.error()[-3000:])
    for rank, code in enumerate(codes):
        text = victim.error(rank)
        if code != 1:
            assert "Traceback" not in text, (note, text[-3000:])
            errors = [line for line in text.splitlines() if line.startswith("error: ")]
            assert len(errors) == (code == 2), (note, code, text[-3000:])


def some_failure(rng: random.Random, counts: Counter[str], largest: int) -> Harm:
    if rng.random() < 0.4:
        return Harm(limit=rng.randrange(1, largest))
    return Harm(rng.choice(sorted(FAILURES)), "file", rng.randint(1, counts["file"]))


@pytest.mark.faults
@pytest.mark.parametrize("processes", [1, 2])
def test_what_cannot_be_written_ends_a_run_with_one_message(
    tmp_path: Path, checkpoints: Any, processes: int
) -> None:
    print(f"TAID_VLM_FAULTS_SEED={SEED}")
    rng, tree = random.Random(SEED), minimal(tmp_path, checkpoints, train=STEPS)
    whole, output, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    recipe = write_recipe(tmp_path, {**tree, "output_dir": str(whole)}, "whole.yaml")
    victim = Victim(["distill", recipe], whole, [Harm()] * processes, log)
    assert not any(victim.wait()), victim.error()
    counts = victim.counts()
    largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    recipe, does, stuck = write_recipe(tmp_path, tree), Counter[str](), set[str]()
    for number in range(KILLS // processes):
        harm = some_failure(rng, counts, largest)
        words = how_to_go_on(output)
        victim = Victim(["distill", recipe, *words], output,
                        [harm, *[Harm()] * (processes - 1)], log)
        codes, note = victim.wait(), (SEED, number, harm, words)
        does["ended first" if not any(codes) else "limit" if harm.limit else harm.does] += 1
        if any(codes):
            assert_one_message(victim, codes, note)
        torn = set(half_written(output, {})) - stuck
        if harm.does in ("read-only", "broken", "forbidden"):
            stuck |= torn  # what cannot be removed stays
        else:
            assert not torn, (note, torn)
    print(f"failed by: {dict(does)}")
    last = Victim(["distill", recipe, *how_to_go_on(output)], output, [Harm()] * processes, log)
    assert not any(last.wait()), last.error()
    assert set(half_written(output, {})) <= stuck
    ends_alike(output, whole, SEED)


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder],
                             capture_output=True, check=False).returncode == 0
    if not mounted:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=False)


@pytest.mark.faults
def test_a_small_disk_fills_up(tmp_path: Path, checkpoints: Any) -> None:
    rng, tree = random.Random(SEED), minimal(tmp_path, checkpoints, train=STEPS)
    whole = tmp_path / "whole"
    recipe = write_recipe(tmp_path, {**tree, "output_dir": str(whole)}, "whole.yaml")
    victim = Victim(["distill", recipe], whole, [Harm()], tmp_path / "log")
    assert not any(victim.wait()), victim.error()
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    for number in range(max(KILLS // 6, 1)):
        kilobytes = rng.randrange(16, size // 1024)
        disk = tmp_path / f"disk-{number}"
        with small_disk(disk, kilobytes):
            recipe = write_recipe(tmp_path, {**tree, "output_dir": str(disk / "out")})
            victim = Victim(["distill", recipe], disk, [Harm()], tmp_path / "log")
            codes = victim.wait()
            assert_one_message(victim, codes, (SEED, kilobytes))
            assert not [*half_written(disk, {})], (SEED, kilobytes)
