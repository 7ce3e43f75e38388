"""A run's folder is a contract: what is written over, removed, gone on from, and what never is."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.recipes import Outcome, write_recipe
from cli.test_distill import minimal

from taid_vlm.io.manifest import NAME, damage, read_manifest, seal

Cli = Callable[..., Outcome]
STEPS = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}


@pytest.fixture
def tree(tmp_path: Path, checkpoints: Any) -> dict[str, Any]:
    return minimal(tmp_path, checkpoints, train=STEPS)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_an_input_is_never_written_over(
    role: str, tree: dict[str, Any], cli: Cli, tmp_path: Path
) -> None:
    base = tmp_path / "out/student"
    shutil.copytree(tree[role]["model_name_or_path"], base)
    before = contents(base)
    done = cli("distill", write_recipe(tmp_path, {**tree, role: str(base)}))
    assert done.status == 2
    assert f"{role}.model_name_or_path = '{base}'" in done.err
    assert contents(tmp_path / "out") == {f"student/{key}": x for key, x in before.items()}


@pytest.mark.parametrize("name", ["student", "checkpoint-500"])
def test_what_no_run_has_written_is_left(
    name: str, tree: dict[str, Any], cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "mine.txt").write_text("precious")
    done = cli("distill", write_recipe(tmp_path, tree))
    assert done.status == 2
    assert f"out/{name}'" in done.err
    assert contents(tmp_path / "out") == {f"{name}/mine.txt": b"precious"}


@pytest.mark.parametrize(("name", "is_folder"), [
    ("report.html", True), ("results.json", True), ("eval_answers.jsonl", True),
    ("recipe.yaml", True), (".lock", True), ("student", False), ("checkpoint-2", False)])
@pytest.mark.parametrize("word", ["--overwrite", "--resume"])
def test_what_stands_in_the_way_is_named_before_training(
    name: str, is_folder: bool, word: str, tree: dict[str, Any], cli: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("taid_vlm.runs.run.gather", None)  # nothing is opened
    path = tmp_path / "out" / name
    path.parent.mkdir()
    path.mkdir() if is_folder else path.write_text("mine")
    done = cli("distill", write_recipe(tmp_path, tree), word)
    assert done.status == 2
    assert f"'{path}' is" in done.err and "move it away" in done.err
    assert path.exists()


def test_other_peoples_files_survive_a_whole_run(
    tree: dict[str, Any], cli: Cli, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    (output / "checkpoint-best").mkdir(parents=True)
    (output / "checkpoint-best/mine.txt").write_text("precious")
    (output / "checkpoint-old.zip").write_text("precious")
    recipe = write_recipe(tmp_path, tree)
    assert cli("distill", recipe, "train.save_total_limit=1").status == 0
    assert cli("distill", recipe, "--overwrite").status == 0
    assert (output / "checkpoint-best/mine.txt").read_text() == "precious"
    assert (output / "checkpoint-old.zip").read_text() == "precious"


@pytest.fixture
def stopped(tree: dict[str, Any], cli: Cli, tmp_path: Path) -> Path:
    """The recipe of a run that has checkpoints and is not finished."""
    recipe = write_recipe(tmp_path, tree)
    assert cli("distill", recipe).status == 0
    for name in ("results.json", "report.html", "eval_answers.jsonl"):
        (tmp_path / "out" / name).unlink(missing_ok=True)
    return recipe


@pytest.mark.parametrize(("change", "named"), [
    ("train.learning_rate=0.5", "train.learning_rate was"),
    ("objective.name=jsd", "objective.name was 'taid', now 'jsd'"),
    ("train.seed=99", "train.seed was"),
])
def test_another_recipe_does_not_go_on(
    change: str, named: str, stopped: Path, cli: Cli, tmp_path: Path
) -> None:
    before = contents(tmp_path / "out")
    done = cli("distill", stopped, "--resume", change)
    assert done.status == 2
    assert named in done.err
    assert contents(tmp_path / "out") == before


def test_more_steps_and_other_logging_go_on(stopped: Path, cli: Cli, tmp_path: Path) -> None:
    done = cli("distill", stopped, "--resume", "train.max_steps=6", "train.logging_steps=1")
    assert done.status == 0, done.err
    train = json.loads((tmp_path / "out/results.json").read_text())["train"]
    assert (train["resumed_from"], train["steps"]) == ("checkpoint-4", 6)


@pytest.mark.parametrize("harm", ["truncated", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(
    harm: str, stopped: Path, cli: Cli, tmp_path: Path
) -> None:
    newest = tmp_path / "out/checkpoint-4"
    if harm == "truncated":
        weights = newest / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        (newest / ("optimizer.pt" if harm == "missing" else NAME)).unlink()
    assert damage(newest) is not None
    done = cli("distill", stopped, "--resume")
    assert done.status == 0, done.err
    train = json.loads((tmp_path / "out/results.json").read_text())["train"]
    assert train["resumed_from"] == "checkpoint-2"


@pytest.mark.parametrize("files", [[], None, "x"])
def test_a_manifest_of_another_kind_is_none(files: Any, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(json.dumps({"files": files}))
    assert read_manifest(tmp_path) is None
    assert damage(tmp_path) is not None


@pytest.mark.parametrize(("name", "data"), [
    ("optimizer.pt", b"none"), ("scheduler.pt", b""), ("rng_state.pth", b"none"),
    ("model.safetensors", b"none"), ("trainer_state.json", b"{")])
def test_files_that_do_not_load_are_named_with_their_checkpoint(
    name: str, data: bytes, stopped: Path, cli: Cli, tmp_path: Path
) -> None:
    newest = tmp_path / "out/checkpoint-4"
    facts = {key: x for key, x in (read_manifest(newest) or {}).items() if key != "files"}
    (newest / name).write_bytes(data)
    seal(newest, facts)  # as if it had been written so
    done = cli("distill", stopped, "train.max_steps=6", "--resume")
    assert done.status == 2
    assert len(done.errors) == 1 and f"'{newest}' cannot be gone on from" in done.err


def test_weights_alone_are_no_checkpoint_to_go_on_from(
    tree: dict[str, Any], cli: Cli, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tree)
    assert cli("distill", recipe, "train.save_only_model=true").status == 0
    (tmp_path / "out/results.json").unlink()
    done = cli("distill", recipe, "--resume")
    assert done.status == 2
    assert "save_only_model" in done.err


def test_two_runs_do_not_share_a_folder(tree: dict[str, Any], cli: Cli, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with (output / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(str(os.getpid()))
        file.flush()
        done = cli("distill", write_recipe(tmp_path, tree))
    assert done.status == 2
    assert f"in use by another run (process {os.getpid()})" in done.err
    assert not (output / "recipe.yaml").exists()


def test_nobody_looks_at_checkpoints_of_a_run_that_writes_them(
    stopped: Path, cli: Cli, tmp_path: Path
) -> None:
    newest = max((tmp_path / "out").glob("checkpoint-*"))
    (newest / NAME).unlink()  # as while it is written
    with (tmp_path / "out/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = cli("distill", stopped, "--resume")
    assert done.status == 2
    assert "in use by another run" in done.err
    assert "not whole" not in done.err


@pytest.mark.parametrize("stages", [False, True])
@pytest.mark.parametrize("folder", ["/proc/taid/out", "x" * 300])
def test_a_folder_that_cannot_be_made(
    folder: str, stages: bool, tree: dict[str, Any], cli: Cli, tmp_path: Path
) -> None:
    more = {"stages": [{"name": "one"}, {"name": "two"}]} if stages else {}
    output = folder if folder.startswith("/") else str(tmp_path / folder)
    done = cli("distill", write_recipe(tmp_path, {**tree, "output_dir": output, **more}))
    assert done.status == 2, done.err
    assert f"output_dir = '{output}" in done.err
    assert "cannot be used" in done.err
    assert "Traceback" not in done.err


LOOKS = """
import sys
from pathlib import Path
from accelerate import PartialState
from taid_vlm.errors import TaidError
from taid_vlm.runs.folders import on_main

state, folder, told = PartialState(cpu=True), Path(sys.argv[1]), []

def look(problem):
    (folder / f"looked-{state.process_index}").touch()
    if problem:
        raise problem
    return folder / "checkpoint-2"

for problem in (None, TaidError("no whole checkpoint", code="c"), OSError(13, "no permission")):
    try:
        told.append(str(on_main(lambda: look(problem), folder)))
    except TaidError as error:
        told.append(f"{error.code}|{error}")
(folder / f"told-{state.process_index}").write_text(f"{state.num_processes} {told}")
state.wait_for_everyone()
state.destroy_process_group()
"""


def test_one_process_looks_for_all(tmp_path: Path) -> None:
    (tmp_path / "looks.py").write_text(LOOKS)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(tmp_path / "looks.py"), str(tmp_path)],
        check=True, timeout=300, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    first, second = ((tmp_path / f"told-{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith("2 ")
    assert "checkpoint-2" in first
    assert "c|no whole checkpoint" in first
    assert "cannot be used: [Errno 13] no permission" in first
    assert (tmp_path / "looked-0").exists()
    assert not (tmp_path / "looked-1").exists()


def test_a_lock_whose_process_is_gone_holds_nobody(
    tree: dict[str, Any], cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.lock").write_text("999999")
    assert cli("distill", write_recipe(tmp_path, tree), "train.max_steps=1").status == 0
    assert not (tmp_path / "out/.lock").exists()


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_modes_of_the_umask(
    mask: int, tree: dict[str, Any], cli: Cli, tmp_path: Path
) -> None:
    before = os.umask(mask)
    try:
        assert cli("distill", write_recipe(tmp_path, tree), "train.max_steps=1").status == 0
    finally:
        os.umask(before)
    output = tmp_path / "out"
    files = [output / "results.json", *(path for path in (output / "student").iterdir())]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}


def test_checkpoints_say_what_they_are(stopped: Path, tmp_path: Path) -> None:
    manifest = read_manifest(tmp_path / "out/checkpoint-2")
    assert manifest is not None
    assert manifest["recipe"]["objective"] == {"name": "taid"}
    assert manifest["resumable"] is True
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= manifest["files"].keys()
    assert damage(tmp_path / "out/checkpoint-2") is None
