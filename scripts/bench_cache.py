"""A training step on a cached teacher against SFT and the teacher itself, on the demo's text.

    OMP_NUM_THREADS=1 python scripts/bench_cache.py --folder runs/bench_cache --steps 40

The teacher is the demo's text teacher made larger (8 layers of 384, drawn at random: only time and
bytes are measured), the student the demo's. CPU milliseconds are all that this process used while
`train` ran, over the steps: fetching, collating, forward, backward, optimizer. Every variant runs
`--rounds` times in turn.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from taid_vlm.config.recipe import Recipe, parse_recipe
from taid_vlm.runs.cache import build_cache
from taid_vlm.runs.ingredients import gather
from taid_vlm.runs.run import _make_trainer
from taid_vlm.teachers import TeacherCache
from taid_vlm.teachers.sparse import Signal

DATA = Path(__file__).parents[1] / "data"
KEPT: dict[str, tuple[str, Signal]] = {
    "hidden states, float32": ("float32", Signal()),
    "hidden states, bfloat16": ("bfloat16", Signal()),
    "top 64": ("auto", Signal("topk", 64)),
    "12 draws": ("auto", Signal("sampled", 12)),
}


def make_teacher(folder: Path) -> None:
    source = DATA / "models/words-teacher"
    config = AutoConfig.from_pretrained(source)
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
             "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 64}
    if getattr(config, "layer_types", None):
        sizes["layer_types"] = [config.layer_types[0]] * 8
    config.update(sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    print(f"teacher: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{config.vocab_size} rows")


def recipe(folder: Path, steps: int, records: int, **sections: Any) -> Recipe:
    tree = {
        "teacher": str(folder / "teacher"), "student": str(DATA / "models/words-student"),
        "data": {"train": {"path": str(DATA / "words/train.jsonl"), "max_records": records}},
        "objective": "forward_kl", "output_dir": str(folder / "out"),
        "train": {"max_steps": steps, "per_device_train_batch_size": 16, "logging_steps": 1000,
                  "per_device_eval_batch_size": 16, "learning_rate": 1e-3, "save_strategy": "no",
                  "seed": 0, "disable_tqdm": True, "use_cpu": True}, **sections}
    return parse_recipe({key: value for key, value in tree.items() if value is not None})


def step_time(wanted: Recipe, steps: int) -> float:
    """CPU milliseconds a step."""
    trainer = _make_trainer(wanted, gather(wanted))
    started = time.process_time()
    trainer.train()
    return (time.process_time() - started) * 1000 / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="new; everything goes there")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--records", type=int, default=800)
    options = parser.parse_args()
    folder, steps, records = options.folder, options.steps, options.records
    make_teacher(folder / "teacher")
    variants: dict[str, dict[str, Any]] = {
        "SFT": {"objective": "ce", "teacher": None}, "the teacher itself": {}}
    for name, (dtype, signal) in KEPT.items():
        place = folder / name.replace(" ", "-").replace(",", "")
        started = time.process_time()
        build_cache(recipe(folder, steps, records), place, dtype,  # type: ignore[arg-type]
                    signal=signal)
        print(f"{name}: built in {time.process_time() - started:.1f} CPU seconds, "
              f"{TeacherCache(place).bytes_per_token:,.0f} bytes a token")
        variants[name] = {"teacher": {"cache": str(place)}}
    for _ in range(options.rounds):
        for name, sections in variants.items():
            spent = step_time(recipe(folder, steps, records, **sections), steps)
            print(f"{name}: {spent:.1f} CPU ms a step", flush=True)
    shutil.rmtree(folder / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
