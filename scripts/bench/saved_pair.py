"""A pair of random weights on disk, with rows and recipes: for commands that start from files.

    PYTHONPATH=.:scripts python -m bench.saved_pair FOLDER --scale medium --device cuda

FOLDER gets `student`, `teacher`, `rows.jsonl` (one batch after the other), `mixed.jsonl` (prompts
and completions of very unequal length), `recipe.yaml` that trains the one on the other, and
`words.yaml`: the TAID arm of `taid-vlm demo` in words, on that device.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer

from bench.common import check_device, described, number, parsed
from bench.step_rows import random_words
from bench.step_setup import ROLES, SCALES, Setup, lengthened, make_pair
from taid_vlm.demo.arms import OBJECTIVES, WORLDS, Arm
from taid_vlm.demo.demo import data_folder

BATCH = 4
PADDING = 64  # rows of the heads that no token has: Qwen's tokenizer adds its own when it is loaded


def main(arguments: Sequence[str] | None = None) -> None:
    parser = described(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--scale", choices=tuple(SCALES), default="medium")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=number, default=4, metavar="N", help="of a run")
    parser.add_argument("--records", type=number, default=512, metavar="N", help="of mixed.jsonl")
    parser.add_argument("--threads", type=number, metavar="N")
    args = parsed(parser, lambda args: check_device(args.device), arguments)
    setup = Setup(scale=args.scale, dtype="mixed", device=args.device, batch_size=BATCH,
                  sequence_length=SCALES[args.scale].sequence_length)
    pair = make_pair(setup)
    tokenizer = lengthened(AutoTokenizer.from_pretrained(data_folder() / "models/words-teacher"),
                           SCALES[args.scale].vocab - PADDING)
    for role in ROLES:
        pair.models[role].save_pretrained(args.folder / role)
        tokenizer.save_pretrained(args.folder / role)
    _lines(args.folder / "rows.jsonl", pair.rows * 4)
    _lines(args.folder / "mixed.jsonl", mixed(tokenizer, args.records, setup.sequence_length))
    _recipe(args.folder / "recipe.yaml", _run(args, setup))
    _recipe(args.folder / "words.yaml", _words(args))


def mixed(tokenizer: Any, number: int, longest: int) -> list[dict[str, str]]:
    """Completions whose lengths are spread evenly over their logarithm, the longest last."""
    rng = random.Random(0)
    rows = [{"prompt": random_words(rng, tokenizer, 8), "completion": random_words(
        rng, tokenizer, round(8 * (longest / 8) ** (index / number)))} for index in range(number)]
    rng.shuffle(rows)
    return rows


def _run(args: Any, setup: Setup) -> dict[str, Any]:
    cpu = args.device == "cpu"
    return {
        "teacher": {"model_name_or_path": str(args.folder / "teacher"), "dtype": "bfloat16"},
        "student": {"model_name_or_path": str(args.folder / "student"), "dtype": "float32"},
        "data": {"train": str(args.folder / "rows.jsonl")}, "objective": "jsd",
        "train": {"max_steps": args.steps, "per_device_train_batch_size": BATCH, "bf16": True,
                  "learning_rate": setup.learning_rate, "logging_steps": 1, "use_cpu": cpu,
                  "save_strategy": "no", "disable_tqdm": True},
        "evaluate": {"examples": 0, "canary": 0}, "output_dir": str(args.folder / "run"),
    }


def _words(args: Any) -> dict[str, Any]:
    data = data_folder()
    world = next(world for world in WORLDS if world.name == "words")
    tree = Arm(world, "TAID", data, data / "models", args.folder / "demo", 0,
               OBJECTIVES["TAID"]).recipe().tree()
    tree["train"]["use_cpu"] = args.device == "cpu"
    return tree


def _lines(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _recipe(path: Path, tree: Any) -> None:
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
