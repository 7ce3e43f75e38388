"""A plan against what a training step really takes: torch's allocator, and resident memory.

The plan knows only configurations; the measured step has random weights of the same shapes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plan.models import measured_step, write_pair

from taid_vlm.config.recipe import load_recipe
from taid_vlm.plan import ledger as kinds
from taid_vlm.plan.plan import Plan, plan_recipe

TOLERANCE = 0.08
WIDE = {"vocab_size": 16384, "hidden_size": 128, "num_hidden_layers": 1}
# as Qwen's; the tests' tokenizers name 518 of its rows, so that almost all of them are padding
LARGE = {"vocab_size": 151_936, "hidden_size": 32, "num_hidden_layers": 1}
CASES: dict[str, dict[str, Any]] = {
    "text": {},
    "twice the batch": {"train": {"per_device_train_batch_size": 8}},
    "accumulated": {"words": 40, "train": {"gradient_accumulation_steps": 2}},
    "checkpointing": {
        "train": {"per_device_train_batch_size": 8, "gradient_checkpointing": True}},
    "mixed precision": {"words": 60, "train": {"bf16": True}, "teacher": {"dtype": "bfloat16"}},
    "lora": {"words": 60, "student": {"peft": {"r": 8, "target_modules": "all-linear"}}},
    "large vocabulary, all logits": {
        "words": 60, "text": WIDE, "train": {"loss_implementation": "reference"}},
    "large vocabulary, fused": {  # in chunks that are too small to be compiled
        "words": 60, "text": WIDE,
        "train": {"loss_implementation": "fused", "loss_memory_budget": 4 * 2**20}},
    "large vocabulary, fused, mixed precision": {
        "words": 60, "text": WIDE, "teacher": {"dtype": "bfloat16"},
        "train": {"bf16": True, "loss_implementation": "fused",
                  "loss_memory_budget": 4 * 2**20}},
    "large vocabulary, fused, texts split differently": {
        "words": 60, "text": WIDE, "variant": "other",
        "train": {"loss_implementation": "fused", "loss_memory_budget": 4 * 2**20}},
    "Qwen's vocabulary, mixed precision": {
        "words": 60, "text": LARGE, "teacher": {"dtype": "bfloat16"}, "train": {"bf16": True}},
    "images": {"words": 20, "images": 1},
    "frozen tower": {"words": 20, "images": 1, "train": {"freeze": ["tower"]}},
}


def without_process(plan: Plan) -> int:
    """Bytes of tensors alone."""
    return plan.peak - sum(part.at_peak for part in plan.components
                           if part.name == kinds.OVERHEAD)


@pytest.mark.parametrize("case", CASES)
def test_tensors_of_a_step(case: str, tmp_path: Path) -> None:
    recipe = load_recipe(write_pair(tmp_path, **CASES[case]))
    plan = plan_recipe(recipe)[0]
    assert not plan.notes
    measured = measured_step(recipe, tmp_path / "run")
    assert measured > 20e6  # large enough that it is not about bookkeeping
    assert measured / without_process(plan) == pytest.approx(1, abs=TOLERANCE)


@pytest.mark.slow
def test_tensors_of_a_step_that_is_compiled(tmp_path: Path) -> None:
    """Every row of a large vocabulary is compared: chunks are large enough for the compiled body,
    whose scratch must not be more or less than what the plan has."""
    recipe = load_recipe(write_pair(
        tmp_path, words=25, families=("llama", "llama"), tokens=LARGE["vocab_size"], text=LARGE,
        teacher={"dtype": "bfloat16"},
        train={"bf16": True, "loss_memory_budget": 48 * 2**20}))
    planned = without_process(plan_recipe(recipe)[0])
    measured = measured_step(recipe, tmp_path / "run", {"compiled"})
    assert measured / planned == pytest.approx(1, abs=TOLERANCE)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_resident_memory(tmp_path: Path) -> None:
    sizes = {"hidden_size": 384, "intermediate_size": 1536}
    paths = []
    for name, options in (("large", {"words": 60, "text": sizes}), ("small", {"words": 5})):
        (tmp_path / name).mkdir()
        paths.append(write_pair(tmp_path / name, **options))
    script = Path(__file__).with_name("rss.py")
    done = subprocess.run(
        [sys.executable, str(script), *map(str, paths), str(tmp_path / "run")], text=True,
        capture_output=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}, check=True)
    measured = int(done.stdout.split()[-1])
    planned = without_process(plan_recipe(load_recipe(paths[0]))[0])
    assert measured / planned == pytest.approx(1, abs=0.15)
