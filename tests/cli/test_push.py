"""`train.push_to_hub`: the student and nothing else, and no run that ends in a refusal."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from cli.hub import TOKEN, Hub
from cli.recipes import Checkpoints, Outcome, pairs, picture_rows, write_jsonl, write_recipe
from huggingface_hub import constants

Cli = Callable[..., Outcome]
NAME = "me/student"
PUSH = ["train.push_to_hub=true", f"train.hub_model_id={NAME}"]


def recipe(folder: Path, checkpoints: Checkpoints, student: str = "qwen2", **sections: Any) -> Path:
    images = student == "llava"
    rows = picture_rows(folder, 8) if images else pairs(8)
    return write_recipe(folder, {
        "teacher": checkpoints("internvl" if images else "llama"),
        "student": checkpoints(student, seed=1),
        "data": {side: str(write_jsonl(folder / f"{side}.jsonl", rows)) for side in
                 ("train", "eval")},
        "train": {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "save_steps": 1},
        "evaluate": {"examples": 1}, "output_dir": str(folder / "out"), **sections})


def on_disk(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def environment(hub: Hub) -> dict[str, str]:
    """Of another process that is to reach the stand-in."""
    return {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}


def is_anywhere(text: str, folder: Path) -> bool:
    return any(text.encode() in data for data in on_disk(folder).values())


@pytest.mark.parametrize("student", ["qwen2", "llava"])
def test_the_student_and_nothing_else_arrives(
    student: str, hub: Hub, checkpoints: Checkpoints, cli: Cli, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    done = cli("distill", recipe(tmp_path, checkpoints, student), *PUSH)
    assert done.status == 0, done.err
    arrived = hub.files[NAME]
    assert arrived.pop(".gitattributes") == b""
    assert arrived == on_disk(tmp_path / "out/student")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= arrived.keys()
    assert not [name for name in arrived if name.endswith((".bin", ".pt", ".yaml")) or "/" in name]
    for path in (tmp_path, checkpoints.folder):
        assert not [name for name, data in arrived.items() if str(path).encode() in data]
    assert len(hub.commits) == 1 and "distilled from" in hub.commits[0]
    assert hub.private == {NAME: False}
    assert not [step for step in hub.steps if step.startswith("unknown") and "/me/" in step]
    assert [step for step in hub.steps if "unknown" not in step][:3] == [
        "whoami", "create", "preupload"]
    assert f"The student is at {hub.url}/{NAME}" in caplog.text
    assert TOKEN not in done.out + done.err + caplog.text
    assert not is_anywhere(TOKEN, tmp_path / "out")
    if student == "llava":
        size = int.from_bytes(arrived["model.safetensors"][:8], "little")
        names = json.loads(arrived["model.safetensors"][8:8 + size])
        assert any(name.startswith("vision_tower.vision_model.encoder.") for name in names)


def test_a_repository_of_ones_own_and_a_token_in_the_recipe(
    hub: Hub, checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named after output_dir; what an earlier student left there does not stay beside it."""
    monkeypatch.delenv("HF_TOKEN")
    path = recipe(tmp_path, checkpoints)
    refused = cli("distill", path, "train.push_to_hub=true")
    assert refused.status == 2 and "no token" in refused.errors[0]
    hub.files["me/out"] = {"model-00001-of-00002.safetensors": b"", "adapter_config.json": b"",
                           "model.safetensors.index.json": b"", "LICENSE": b"mine"}
    done = cli("distill", path, "train.push_to_hub=true", f"train.hub_token={TOKEN}",
               "train.hub_private_repo=true", "train.hub_strategy=end")
    assert done.status == 0, done.err
    assert hub.files["me/out"] == {"LICENSE": b"mine", **on_disk(tmp_path / "out/student")}
    assert TOKEN not in done.out + done.err and not is_anywhere(TOKEN, tmp_path / "out")


def test_a_private_one(
    hub: Hub, checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    hub.refuse["commit"] = 500
    done = cli("distill", recipe(tmp_path, checkpoints), *PUSH, "train.hub_private_repo=true")
    assert hub.private == {NAME: True}
    assert done.status == 2 and done.errors[0].endswith("--private")


REFUSED: dict[str, tuple[dict[str, int], list[str], tuple[str, ...]]] = {
    "token": ({"whoami": 401}, PUSH, ("token is not accepted", "hf auth login")),
    "namespace": ({"create": 403}, PUSH, ("403", f"'{NAME}' cannot be written to", "hub_model_id")),
    "branch": ({"preupload": 403}, PUSH, ("403", f"'{NAME}' cannot be written to")),
    "name": ({}, [PUSH[0], "train.hub_model_id=a/b/c"], ("hub_model_id = 'a/b/c'", "OWNER/NAME")),
    "strategy": ({}, [*PUSH, "train.hub_strategy=every_save"], ("hub_strategy", "Take it out")),
    "revision": ({}, [*PUSH, "train.hub_revision=dev"], ("hub_revision = 'dev'", "main branch")),
    "always": ({}, [*PUSH, "train.hub_always_push=true"], ("hub_always_push", "once")),
    "adapter": ({}, [*PUSH, "student.peft={target_modules: [q_proj]}"],
                ("adapter", "a folder of this machine", "taid-vlm merge")),
    "a stage's": ({}, ["stages=[{name: one, train: {push_to_hub: true}}, {name: two}]"],
                  ("stages 'one'", "train.push_to_hub", "only the last")),
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_weights(
    case: str, hub: Hub, checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    refuse, overrides, wanted = REFUSED[case]
    hub.refuse.update(refuse)
    if case == "branch":
        hub.files[NAME] = {}  # it is there, and may be read
    done = cli("distill", recipe(tmp_path, checkpoints), *overrides)
    assert done.status == 2, done.err
    assert len(done.errors) == 1 and TOKEN not in done.err
    missing = [words for words in wanted if words not in done.errors[0]]
    assert not missing, f"{missing} not in {done.errors[0]}"
    assert not (tmp_path / "out").exists() and not hub.commits


@pytest.mark.usefixtures("no_weights")
def test_a_token_that_only_reads_and_a_hub_that_is_not_there(
    hub: Hub, checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path, checkpoints)
    hub.role = "read"
    assert "can only read" in cli("distill", path, *PUSH).errors[0]
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = cli("distill", path, *PUSH)
    assert "the hub 'http://127.0.0.1:9' cannot be asked" in done.errors[0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in cli("distill", path, *PUSH).errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("step", "status"), [("commit", 500), ("commit", 403), ("lfs", 401)])
def test_a_push_that_fails_leaves_the_student_and_says_how(
    step: str, status: int, hub: Hub, checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    hub.refuse[step] = status
    path = recipe(tmp_path, checkpoints)
    done = cli("distill", path, *PUSH)
    assert done.status == 2 and len(done.errors) == 1, done.err
    student = tmp_path / "out/student"
    for words in ("could not be pushed", str(status), f"'{student}'"):
        assert words in done.errors[0]
    assert TOKEN not in done.err and not is_anywhere(TOKEN, tmp_path / "out")
    assert (tmp_path / "out/results.json").exists() and (student / "README.md").exists()
    assert not hub.commits
    hub.refuse.clear()
    words = shlex.split(done.errors[0].partition("Push it with: ")[2])
    assert words[:2] == ["hf", "upload"]
    words[0] = str(Path(sys.executable).parent / "hf")
    pushed = subprocess.run(
        words, capture_output=True, text=True, check=False, env=environment(hub))
    assert pushed.returncode == 0, pushed.stderr
    hub.files[NAME].pop(".gitattributes")
    assert hub.files[NAME] == on_disk(student)


def test_only_the_last_stage_is_pushed(
    hub: Hub, checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    stages = [{"name": "one", "train": {"max_steps": 1}}, {"name": "two"}]
    done = cli("distill", recipe(tmp_path, checkpoints, stages=stages), *PUSH)
    assert done.status == 0, done.err
    hub.files[NAME].pop(".gitattributes")
    assert hub.files[NAME] == on_disk(tmp_path / "out/student") and len(hub.commits) == 1
    assert hub.steps.count("whoami") == 1


def test_a_run_that_goes_on_may_be_pushed(
    hub: Hub, checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    path = recipe(tmp_path, checkpoints)
    assert cli("distill", path, "train.save_total_limit=null").status == 0
    for whole in ("student", "checkpoint-2"):
        shutil.rmtree(tmp_path / "out" / whole)
    (tmp_path / "out/results.json").unlink()
    done = cli("distill", path, "--resume", *PUSH)
    assert done.status == 0, done.err
    hub.files[NAME].pop(".gitattributes")
    assert hub.files[NAME] == on_disk(tmp_path / "out/student")


def test_the_card_is_valid_for_the_hub(
    hub: Hub, checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    done = cli("distill", recipe(tmp_path, checkpoints), *PUSH)
    assert done.status == 0, done.err
    assert "validate" in hub.steps
    card = huggingface_hub.ModelCard(hub.files[NAME]["README.md"].decode())
    assert card.data.library_name == "transformers" and card.data.license is None
    assert yaml.safe_load(card.content.split("---\n")[1])["tags"] == ["distillation", "taid-vlm"]


@pytest.mark.parametrize("refuse", ["", "whoami", "commit"])
def test_of_two_processes_the_first_pushes(
    refuse: str, hub: Hub, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    if refuse:
        hub.refuse[refuse] = 403
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "-m", "taid_vlm", "distill", str(recipe(tmp_path, checkpoints)), *PUSH],
        capture_output=True, text=True, check=False, timeout=300, env=environment(hub))
    assert (done.returncode == 0) == (not refuse), done.stderr[-3000:]
    assert hub.steps.count("whoami") == 1 and TOKEN not in done.stdout + done.stderr
    assert (tmp_path / "out").exists() == (refuse != "whoami")
    assert len(hub.commits) == (not refuse)
    if refuse == "commit":
        assert done.stderr.count("could not be pushed") == 1
    if not refuse:
        hub.files[NAME].pop(".gitattributes")
        assert hub.files[NAME] == on_disk(tmp_path / "out/student")
