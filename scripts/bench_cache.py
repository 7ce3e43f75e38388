"""A training step on a cached teacher against SFT and the teacher itself, on the demo's text.

    OMP_NUM_THREADS=1 python scripts/bench_cache.py --folder runs/bench_cache --steps 40

The teacher is the demo's text teacher made larger (8 layers of 384, drawn at random: only time and
bytes are measured), the student the demo's. CPU milliseconds are all that this process used while
`train` ran, over the steps: fetching, collating, forward, backward, optimizer. Every variant runs
`--rounds` times in turn.

    OMP_NUM_THREADS=1 python scripts/bench_cache.py --folder runs/bench_pictures --pictures 48

measures what a picture costs in the collator instead, where the teacher's processor is shown it
again and where the cache knows the record: noise of 640x480 and 480x640 pixels, the demo's teacher
with a tower of 384 pixels (576 tokens a picture), the demo's student as it is (64 pixels).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from taid_vlm.adapters import SeenSizes
from taid_vlm.config.model import TeacherSpec
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


def make_pictures(folder: Path, number: int) -> None:
    """`number` conversations about a picture each, as JPEG files."""
    random, rows = np.random.default_rng(0), []
    for index in range(number):
        pixels = random.integers(0, 256, (480, 640, 3) if index % 2 else (640, 480, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.jpg")
        rows.append({"images": [f"{index}.jpg"], "prompt": "what is there ?",
                     "completion": f"a red circle and {index} blue squares"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_seeing_teacher(folder: Path) -> None:
    source = DATA / "models/scenes-teacher"
    config, processor = AutoConfig.from_pretrained(source), AutoProcessor.from_pretrained(source)
    config.text_config.max_position_embeddings = 1024
    config.vision_config.update({"image_size": 384, "patch_size": 16})
    processor.image_processor.size, processor.patch_size = {"height": 384, "width": 384}, 16
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)


class Unseen(SeenSizes):
    """Has the processor look at everything, as it is shown what a live teacher is."""

    def encode(self, *_: Any) -> None:
        return None


def pictures(folder: Path, number: int, rounds: int) -> None:
    """CPU milliseconds that the collator takes for a record, in batches of 4."""
    make_seeing_teacher(folder / "teacher")
    make_pictures(folder, number)
    wanted = recipe(folder, 1, number, student=str(DATA / "models/scenes-student"),
                    data={"train": str(folder / "rows.jsonl")})
    build_cache(wanted, folder / "cache")
    cached = wanted.model_copy(update={"teacher": TeacherSpec(cache=str(folder / "cache"))})
    for name, use in (("the teacher itself", wanted), ("cached, shown again", cached),
                      ("cached, known", cached)) * rounds:
        trainer = _make_trainer(use, gather(use))
        collator, records = trainer.collator, list(trainer.train_dataset)
        collator.seen = Unseen() if name == "cached, shown again" else SeenSizes()
        started = time.process_time()
        for start in range(0, number, 4):
            collator(records[start:start + 4])
        spent = (time.process_time() - started) * 1000 / number
        print(f"{name}: {spent:.1f} CPU ms a record", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="new; everything goes there")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--records", type=int, default=800)
    parser.add_argument("--pictures", type=int, metavar="N", help="measure these instead")
    options = parser.parse_args()
    folder, steps, records = options.folder, options.steps, options.records
    if options.pictures:
        pictures(folder, options.pictures, options.rounds)
        return
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
