"""Several sources on the command line: counted, mixed the same on any machine, and resumed."""

from __future__ import annotations

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

FAST = {"learning_rate": 1e-3, "disable_tqdm": True, "use_cpu": True, "save_steps": 2,
        "per_device_train_batch_size": 2, "max_steps": 6, "logging_steps": 1, "save_total_limit": 9}


def rows(name: str, number: int) -> list[dict[str, Any]]:
    return [{"prompt": f"what is {name} {n}", "completion": f"{name} {n}"} for n in range(number)]


@pytest.fixture
def mixed(tmp_path: Path, checkpoints: Checkpoints) -> Callable[..., Path]:
    def make(streaming: bool = False, **changes: Any) -> Path:
        red = write_jsonl(tmp_path / "red.jsonl", [*rows("red", 20), {"prompt": "a"}])
        text = red.read_text().splitlines()
        red.write_text("\n".join([*text[:20], *text[:600], text[20]]) + "\n")  # the bad one deep
        blue = write_parquet(tmp_path / "blue.parquet", rows("blue", 12))
        sources = [{"path": str(red), "weight": 1 if streaming else 0.5, "max_records": 20},
                   {"path": str(blue), "weight": 2, "streaming": streaming}]
        return write_recipe(tmp_path, {
            "teacher": checkpoints("llama"), "student": checkpoints("qwen2", "plain", 1),
            "data": {"train": sources, "eval": [str(blue), {"path": str(red), "max_records": 3}]},
            "train": FAST, "evaluate": {"examples": 1, "max_new_tokens": 4},
            "output_dir": str(tmp_path / "out"), **changes})

    return make


def student(folder: Path) -> dict[str, Any]:
    return load_file(folder / "student" / "model.safetensors")


def test_a_mix_is_counted_by_source(
    mixed: Callable[..., Path], cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    recipe = mixed()
    done = cli("distill", recipe)
    assert done.status == 0, done.err
    results = loaded(tmp_path / "out" / "results.json")
    counts = results["train"]["sources"]
    assert set(counts) == {"red.jsonl", "blue.parquet"}
    assert sum(count["read"] for count in counts.values()) == 12
    assert all(count["left_out"] == 0 for count in counts.values())
    assert results["data"]["eval"]["records"] == 15
    assert results["history"][5]["read/blue.parquet"] == counts["blue.parquet"]["read"]
    assert "Source blue.parquet: " in (tmp_path / "out" / "report.html").read_text()
    shown = cli("inspect", recipe, "--all").out
    assert "source red.jsonl: 10 rows read, 10 used, 0 left out" in shown
    assert "source blue.parquet: 24 rows read, 24 used, 0 left out" in shown


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mix_goes_on_where_it_was_killed(
    mixed: Callable[..., Path], cli: Callable[..., Outcome], tmp_path: Path, streaming: bool
) -> None:
    """Also with other workers: the same weights and counts, bit for bit."""
    recipe = mixed(streaming)
    whole = tmp_path / "whole"
    assert cli("distill", recipe, f"output_dir={whole}").status == 0
    killed = tmp_path / "killed"
    gone = subprocess.run([sys.executable, "-c", killed_at(4), "distill", str(recipe),
                           f"output_dir={killed}"], env=os.environ, capture_output=True)
    assert gone.returncode == -9, gone.stderr
    done = cli("distill", recipe, "--resume", f"output_dir={killed}",
               "train.dataloader_num_workers=2")
    assert done.status == 0, done.err
    results = loaded(killed / "results.json")
    assert results["train"]["resumed_from"] == "checkpoint-2"
    assert results["train"]["sources"] == loaded(whole / "results.json")["train"]["sources"]
    one, other = student(whole), student(killed)
    assert all(equal(one[name], other[name]) for name in one)


def test_another_weight_is_not_gone_on_with(
    mixed: Callable[..., Path], cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    recipe = mixed()
    assert cli("distill", recipe, "train.max_steps=2").status == 0
    (tmp_path / "out" / "results.json").unlink()
    text = recipe.read_text().replace("weight: 2", "weight: 3")
    recipe.write_text(text)
    done = cli("distill", recipe, "--resume")
    assert done.status == 2
    assert "data.train.1.weight was 2, now 3" in done.err


def test_columns_that_nothing_reads_are_named_once(
    mixed: Callable[..., Path], cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    data = [{**row, "score": 3, "id": n} for n, row in enumerate(rows("red", 12))]
    path = str(write_jsonl(tmp_path / "extra.jsonl", data))
    recipe = mixed(data={"train": path})
    shown = cli("inspect", recipe)
    said = "columns that nothing reads: 'score' (12) of the first 12 rows"
    assert " ".join(shown.out.split()).count(said) == 1
    done = cli("distill", recipe)
    assert done.status == 0
    results = loaded(tmp_path / "out" / "results.json")
    assert results["train"]["unread_columns"] == {"score": 12}


def test_half_of_the_data_must_not_go_in_silence(
    mixed: Callable[..., Path], cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    half = [{**row, "completion": " "} if n % 2 else row for n, row in enumerate(rows("red", 40))]
    recipe = mixed(data={"train": str(write_jsonl(tmp_path / "half.jsonl", half))})
    done = cli("distill", recipe)
    assert done.status == 2
    assert "20 of 40 are left out (50.0%; train.max_left_out = 0.25): 20 x empty" in done.err
    assert not (tmp_path / "out" / "student").exists()
    shown = cli("inspect", recipe)
    assert shown.status == 2
    assert "train.max_left_out" in shown.out
    assert cli("distill", recipe, "train.max_left_out=0.5").status == 0


def test_data_that_turn_bad_end_the_run(
    mixed: Callable[..., Path], cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    late = [*rows("red", 300), *[{**row, "completion": " "} for row in rows("blue", 700)]]
    path = str(write_jsonl(tmp_path / "late.jsonl", late))
    recipe = mixed(data={"train": path}, train={
        **FAST, "max_steps": 40, "per_device_train_batch_size": 16, "save_strategy": "no"})
    done = cli("distill", recipe)
    assert done.status == 2
    assert "train.max_left_out = 0.25" in done.err
    assert len(done.errors) == 1
