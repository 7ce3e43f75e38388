"""`taid-vlm publish`: the student with its card, curves, licences and comparison; nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli.hub import TOKEN, Hub
from cli.recipes import Checkpoints, Outcome, pairs, write_jsonl, write_recipe
from cli.test_push import is_anywhere, on_disk
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

Cli = Callable[..., Outcome]
PAGE = "<!DOCTYPE html><title>TAID against KD</title>"


@pytest.fixture
def run(checkpoints: Checkpoints, cli: Cli, tmp_path: Path) -> Callable[..., Path]:
    def distil(*overrides: str, **sections: Any) -> Path:
        done = cli("distill", write_recipe(tmp_path, {
            "teacher": checkpoints("llama"), "student": checkpoints("qwen2", seed=1),
            "data": {side: str(write_jsonl(tmp_path / f"{side}.jsonl", pairs(8))) for side in
                     ("train", "eval")},
            "train": {"max_steps": 2, "use_cpu": True, "save_steps": 1, "logging_steps": 1},
            "evaluate": {"examples": 1}, "output_dir": str(tmp_path / "out"), **sections}),
            *overrides)
        assert done.status == 0, done.err
        return tmp_path / "out"
    return distil


def test_a_folder_for_others(run: Callable[..., Path], cli: Cli, checkpoints: Checkpoints,
                             tmp_path: Path) -> None:
    card = Path(checkpoints("llama")) / "README.md"
    card.write_text("---\nlicense: gemma\n---\n# a teacher\n")
    folder, output = run(), tmp_path / "for others"
    page = tmp_path / "page.html"
    page.write_text(f"{PAGE}<p>{checkpoints('llama')}</p>")
    before = on_disk(folder)
    done = cli("publish", folder, "--output", output, "--compare", page, "--license", "apache-2.0")
    card.unlink()
    assert done.status == 0, done.err
    assert on_disk(folder) == before  # the run is as it was
    there, student = on_disk(output), on_disk(folder / "student")
    assert there.keys() == student.keys() | {"curves.png", "comparison.html"}
    assert all(there[name] == student[name] for name in student if name != "README.md")
    assert there["curves.png"].startswith(b"\x89PNG")
    _, head, text = there["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "apache-2.0"
    for words in ("## Held-out figures", "![KL(teacher", "(curves.png)", "(comparison.html)",
                  f"- Teacher, {Path(checkpoints('llama')).name}: gemma",
                  "- Base model, " + Path(checkpoints("qwen2", seed=1)).name + ": not known"):
        assert words in text, words
    for path in (tmp_path, checkpoints.folder):
        assert not [name for name, data in there.items() if str(path).encode() in data]
    assert AutoModelForCausalLM.from_pretrained(output).config.model_type == "qwen2"
    again = cli("publish", folder, "--output", output)
    assert again.status == 2 and "is not empty" in again.errors[0]


def test_the_hub_gets_the_same(run: Callable[..., Path], cli: Cli, hub: Hub, tmp_path: Path,
                               caplog: pytest.LogCaptureFixture) -> None:
    folder = run()
    assert cli("publish", folder, "--output", tmp_path / "same").status == 0
    done = cli("publish", folder, "--repo", "me/student", "--private")
    assert done.status == 0, done.err
    hub.files["me/student"].pop(".gitattributes")
    assert hub.files["me/student"] == on_disk(tmp_path / "same")
    assert hub.private == {"me/student": True} and len(hub.commits) == 1
    assert f"The student is at {hub.url}/me/student" in caplog.text
    assert TOKEN not in done.out + done.err + caplog.text and not is_anywhere(TOKEN, tmp_path)


@pytest.mark.parametrize(("step", "words"), [
    ("whoami", ("--repo: the token is not accepted", "HF_TOKEN")),
    ("preupload", ("--repo: 'me/student' cannot be written to", "another --repo")),
    ("commit", ("could not be pushed to 'me/student'", "The same command tries again."))])
def test_what_the_hub_refuses_is_one_message(
    step: str, words: tuple[str, ...], run: Callable[..., Path], cli: Cli, hub: Hub
) -> None:
    folder = run()
    before = on_disk(folder)
    hub.refuse[step] = 403
    done = cli("publish", folder, "--repo", "me/student")
    assert done.status == 2 and len(done.errors) == 1 and TOKEN not in done.err
    assert not [word for word in words if word not in done.errors[0]], done.errors
    assert on_disk(folder) == before and not hub.commits


def test_an_adapter(run: Callable[..., Path], cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = run("student.peft={target_modules: [q_proj]}")
    done = cli("publish", folder, "--output", tmp_path / "no")
    assert done.status == 2 and "give --merge" in done.errors[0]
    assert not (tmp_path / "no").exists()
    done = cli("publish", folder, "--output", tmp_path / "whole", "--merge")
    assert done.status == 0, done.err
    there = on_disk(tmp_path / "whole")
    assert "model.safetensors" in there and "adapter_config.json" not in there
    assert b"library_name: transformers" in there["README.md"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole")


def test_refused(run: Callable[..., Path], cli: Cli, tmp_path: Path) -> None:
    folder = run()

    def refusal(*words: str | Path) -> str:
        done = cli("publish", *words)
        assert done.status == 2 and len(done.errors) == 1, done.err
        assert not (tmp_path / "new").exists() and not [*tmp_path.glob(".new*")]
        return done.errors[0]

    to = ("--output", tmp_path / "new")
    assert "either --output DIR or --repo" in refusal(folder)
    assert "either --output DIR or --repo" in refusal(folder, *to, "--repo", "me/student")
    assert "--private has no effect" in refusal(folder, *to, "--private")
    assert "--merge has no effect" in refusal(folder, *to, "--merge")
    assert "--compare" in refusal(folder, *to, "--compare", tmp_path / "none.html")
    assert "holds no finished run" in refusal(tmp_path, *to)
    weights = folder / "student/model.safetensors"
    state = load_file(weights)
    name = next(iter(state))
    state[name].view(-1)[0] = torch.nan
    save_file(state, weights, {"format": "pt"})
    assert f"'{name}' holds weights that are no numbers" in refusal(folder, *to)
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "cannot be read" in refusal(folder, *to)
    weights.unlink()
    assert "holds no weights" in refusal(folder, *to)
    shutil.copytree(folder, tmp_path / "unfinished")
    (tmp_path / "unfinished/results.json").unlink()
    assert "--resume" in refusal(tmp_path / "unfinished", *to)


def test_a_card_that_was_edited_keeps_its_words(
    run: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    folder = run("data={train: " + json.dumps(str(tmp_path / "train.jsonl")) + "}")
    card = folder / "student/README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    assert cli("publish", folder, "--output", tmp_path / "new").status == 0
    assert "\nMy own words.\n" in (tmp_path / "new/README.md").read_text()
