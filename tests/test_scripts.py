"""The launcher scripts as a launcher starts them, on one process and on two."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from zoo import build, save

ROOT = Path(__file__).parents[1]
WORDS = ("red", "green", "blue", "circle", "square", "left", "right", "of", "the", "two")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A small text pair of two families, and records of unequal length."""
    save(build("llama"), tmp_path / "teacher")
    save(build("qwen2", seed=1, tokenizer="permuted"), tmp_path / "student")
    rng = random.Random(0)
    rows = [{"prompt": "say something", "completion": " ".join(rng.choices(WORDS, k=1 + i % 9))}
            for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "teacher": {"model_name_or_path": str(tmp_path / "teacher")},
        "student": {"model_name_or_path": str(tmp_path / "student")},
        "data": {"train": str(tmp_path / "rows.jsonl"), "eval": str(tmp_path / "rows.jsonl")},
        "objective": {"name": "taid"},
        "train": {"max_steps": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 4,
                  "per_device_eval_batch_size": 5, "use_cpu": True, "disable_tqdm": True,
                  "save_strategy": "no"},
        "output_dir": str(tmp_path / "one"),
    }))
    return path


def launch(script: str, recipe: Path, processes: int, *overrides: str) -> None:
    # accelerate's launcher spawns CPU processes through MPI only, so torch's stands in for it
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", str(ROOT / "scripts" / script), str(recipe),
               *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_leave_the_results_of_one(recipe: Path) -> None:
    """Global batch of 8 either way; held-out figures over 24 records, none counted twice."""
    folder = recipe.parent
    launch("distill_llm.py", recipe, 1, "train.per_device_train_batch_size=8")
    launch("distill_llm.py", recipe, 2, f"output_dir={folder / 'two'}")
    results = [json.loads((folder / name / "results.json").read_text()) for name in ("one", "two")]
    assert [r["machine"]["processes"] for r in results] == [1, 2]
    one, two = (r["eval"] for r in results)
    for when in ("before", "after"):
        assert one[when]["n_tokens"] == two[when]["n_tokens"]
        for figure in ("kl", "kl_stderr", "agreement", "nll"):
            assert two[when][figure] == pytest.approx(one[when][figure], rel=1e-4), figure
    assert (folder / "two" / "student" / "model.safetensors").exists()
