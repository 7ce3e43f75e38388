"""Data as users have them, all at once: three sources, one streamed, with tools and thoughts, two
kinds of picture sources and frames of videos, into a pair of unlike vision families; told
beforehand, trained, killed and gone on with."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.recipes import (
    Checkpoints,
    Outcome,
    killed_at,
    loaded,
    write_jsonl,
    write_parquet,
    write_recipe,
)
from safetensors.torch import load_file
from torch import equal
from zoo import templates
from zoo.images import image

Cli = Callable[..., Outcome]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"at": {"type": "string"}}}}}
SEES = {"qwen3_vl": ("<|vision_start|><|image_pad|><|vision_end|>",
                     "<|vision_start|><|video_pad|><|vision_end|>"),
        "internvl": ("{{ '<IMG_CONTEXT>\n' }}", "{{ '<video>\n' }}")}


def talks(number: int) -> list[dict[str, Any]]:
    """Tools, thoughts, a weight, a message that is not learned, a key that nothing reads."""
    return [{"tools": [TOOL], "system": "Be brief.", "messages": [
        {"role": "user", "content": f"what is at {n}"},
        {"role": "assistant", "reasoning_content": "a look", "content": "",
         "tool_calls": [{"type": "function", "id": "1", "function": {
             "name": "look", "arguments": {"at": str(n)}}}]},
        {"role": "tool", "content": "a red circle", "tool_call_id": "1"},
        {"role": "assistant", "content": f"a red circle {n}", "weight": 0.5},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "<think>two</think>blue", "mood": "calm"}]}
        for n in range(number)]


def pictures(number: int) -> list[dict[str, Any]]:
    """LLaVA's form with the picture's bytes in a column."""
    rows = []
    for n in range(number):
        file = io.BytesIO()
        image("wide", seed=n).save(file, format="PNG")
        rows.append({"conversations": [{"from": "human", "value": "<image>\nWhat is this?"},
                                       {"from": "gpt", "value": f"a blue square {n}"}],
                     "image": {"bytes": file.getvalue(), "path": f"{n}.png"}})
    return rows


def films(folder: Path, number: int) -> list[dict[str, Any]]:
    """Frames of a video, or a picture by its path, in typed parts; one cannot be read."""
    rows = []
    for n in range(number):
        names = []
        for frame in range(6):
            name = folder / f"film{n}_{frame}.png"
            image("square", seed=100 + 6 * n + frame).resize((64, 48)).save(name)
            names.append(name.name)
        part = ({"type": "image", "image": names[0]} if n % 3 == 2
                else {"type": "video", "video": names, "fps": 2.0})
        rows.append({"messages": [
            {"role": "user", "content": [part, {"type": "text", "text": "What happens?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"it turns {n}"}]}]})
    rows[1]["messages"][0]["content"][0]["video"] = ["gone.png"]
    return rows


@pytest.fixture
def recipe(tmp_path: Path, checkpoints: Checkpoints) -> Path:
    models = {}
    for role, family, variant in (("teacher", "qwen3_vl", "plain"),
                                  ("student", "internvl", "permuted")):
        jinja = tmp_path / f"{role}.jinja"
        jinja.write_text(templates.hermes(image=SEES[family][0], video=SEES[family][1]))
        models[role] = {"model_name_or_path": checkpoints(family, variant),
                        "chat_template": str(jinja)}
    sources = [
        {"path": str(write_jsonl(tmp_path / "talks.jsonl", talks(24))), "weight": 2,
         "streaming": True},
        {"path": str(write_parquet(tmp_path / "pictures.parquet", pictures(12))), "weight": 1},
        {"path": str(write_jsonl(tmp_path / "films.jsonl", films(tmp_path, 12))), "weight": 1}]
    return write_recipe(tmp_path, {
        **models, "objective": {"terms": [{"name": "taid"}, {"name": "ce", "weight": 0.1}]},
        "data": {"train": sources, "video": {"frames": 4}},
        "train": {"use_cpu": True, "bf16": True, "disable_tqdm": True, "max_steps": 6,
                  "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
                  "save_steps": 2, "save_total_limit": 9, "logging_steps": 1,
                  "learning_rate": 1e-3},
        "output_dir": str(tmp_path / "out")})


def test_inspect_tells_beforehand_what_is_learned(recipe: Path, cli: Cli) -> None:
    learned = {}
    for index in range(6):
        done = cli("inspect", recipe, "--record", str(index), "--json")
        assert done.status == 0, done.err
        account = json.loads(done.out)
        sides = account["record"]["sides"]
        assert sides["teacher"]["learned"] == sides["student"]["learned"]
        learned[account["record"]["source"]] = sides["student"]["learned"]
    # the template takes the thought of the answer before the last question out
    assert any(texts[0].startswith('<tool_call>\n{"name": "look"') and
               texts[-1] == "<think>\ntwo\n</think>\n\nblue<|im_end|>"
               for texts in learned.values()), learned
    assert any("a blue square" in texts[0] for texts in learned.values()), learned
    assert any("it turns" in texts[0] for texts in learned.values()), learned
    done = cli("inspect", recipe, "--all")
    assert done.status == 0, done.err
    shown = " ".join(done.out.split())
    assert "messages[].mood: nothing reads it" in shown
    assert "a thought that the student's chat template takes out of an earlier turn" in shown
    assert "1 x unreadable" in shown


def test_plan_takes_the_same_recipe(recipe: Path, cli: Cli) -> None:
    done = cli("plan", recipe)
    assert done.status == 0, done.err
    assert "tokens in the longest row" in done.out
    assert "could not be rehearsed" not in done.out


def test_it_trains_is_killed_and_goes_on_bit_for_bit(
    recipe: Path, cli: Cli, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = cli("distill", recipe, f"output_dir={whole}")
    assert done.status == 0, done.err
    train = loaded(whole / "results.json")["train"]
    read = {name: rows["read"] for name, rows in train["sources"].items()}
    assert sum(read.values()) == 48 and abs(read["talks.jsonl"] - 24) <= 4, read
    assert set(train["records_left_out"]) <= {"unreadable video", "unreadable image"}
    assert sum(train["records_left_out"].values()) == sum(
        rows["left_out"] for rows in train["sources"].values()) > 0
    assert train["without_effect"]["messages[].mood: nothing reads it"] == read["talks.jsonl"]
    gone = subprocess.run([sys.executable, "-c", killed_at(5), "distill", str(recipe),
                           f"output_dir={killed}"], env=os.environ, capture_output=True)
    assert gone.returncode == -9, gone.stderr
    done = cli("distill", recipe, "--resume", f"output_dir={killed}")
    assert done.status == 0, done.err
    assert loaded(killed / "results.json")["train"]["resumed_from"] == "checkpoint-4"
    one, other = (load_file(folder / "student" / "model.safetensors")
                  for folder in (whole, killed))
    assert all(equal(one[name], other[name]) for name in one)
    assert loaded(killed / "results.json")["train"]["sources"] == train["sources"]


@pytest.mark.slow
def test_two_processes_go_on_bit_for_bit(recipe: Path, tmp_path: Path) -> None:
    def run(*arguments: Any, script: str = "") -> int:
        (tmp_path / "killed.py").write_text(killed_at(5))
        started = [str(tmp_path / "killed.py")] if script else ["-m", "taid_vlm"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc_per_node=2", *started, "distill", str(recipe), *map(str, arguments)]
        return subprocess.run(command, env=os.environ, capture_output=True).returncode

    options = ("train.gradient_accumulation_steps=1",)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(f"output_dir={whole}", *options) == 0
    assert run(f"output_dir={killed}", *options, script="killed") != 0
    assert not (killed / "student").exists()
    assert run(f"output_dir={killed}", *options, "--resume") == 0
    results = [loaded(folder / "results.json") for folder in (whole, killed)]
    assert [one["machine"]["processes"] for one in results] == [2, 2]
    assert results[1]["train"]["resumed_from"] == "checkpoint-4"
    assert results[0]["train"]["sources"] == results[1]["train"]["sources"]
    one, other = (load_file(folder / "student" / "model.safetensors")
                  for folder in (whole, killed))
    assert all(equal(one[name], other[name]) for name in one)
