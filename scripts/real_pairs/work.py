"""What an arm needs and what it is: students, caches, its recipe, its process, its figures."""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from fractions import Fraction
from pathlib import Path

from bench.arms import Tree, built, fresh, tallied, trained

from real_pairs.plan import METHODS, PAIRS, Arm, Pair
from taid_vlm.config.model import ModelSpec
from taid_vlm.evaluation.held_out import Tally, summarise
from taid_vlm.io.files import read_json, write_json
from taid_vlm.students.shrink import shrink
from taid_vlm.teachers.sparse import Signal

TOP = 64
SIGNALS = {"hidden": ("bfloat16", Signal()), "top": ("auto", Signal("topk", TOP))}
FIGURES = ("kl", "reverse_kl", "agreement", "nll", "teacher_nll")
# glibc gives memory of large tensors back to the system, which hands it out page by page again:
# a quarter of a step on a CPU
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
          "MALLOC_TOP_PAD_": str(1 << 26)}


def prepare_processes() -> None:
    """Environment of the processes that arms run in."""
    for name, value in MALLOC.items():
        os.environ.setdefault(name, value)


def carry_out(options: Namespace, arm: Arm, rate: float) -> Tree:
    """Its student, cache, training and figures; what it trained is deleted."""
    student = student_of(options, PAIRS[arm.pair])
    held_out = held_out_recipe(options, arm, student, "test" if arm.rate is None else "validation")
    tree = recipe(options, arm, student, rate)
    signal = METHODS[arm.method].signal
    if signal in SIGNALS:
        tree["teacher"] = {"cache": str(cache_of(options, arm, tree, signal))}
    elif signal == "none":
        del tree["teacher"]
    place = Path(tree["output_dir"])
    try:
        held_out["student"] = str(place / "student")
        return {"pair": arm.pair, "method": arm.method, "steps": arm.steps, "seed": arm.seed,
                "rate": rate, "again": arm.again, **fresh(train_and_measure, tree, held_out)}
    finally:
        shutil.rmtree(place, ignore_errors=True)


def train_and_measure(tree: Tree, held_out: Tree) -> Tree:
    return {"train": trained(tree), **figures(tallied(held_out, keep_answers=True))}


def measure(tree: Tree) -> Tree:
    return figures(tallied(tree, keep_answers=True))


def figures(tally: Tally) -> Tree:
    """Held-out figures, and the sums of every record that comparisons over seeds need."""
    records = [{"category": answer.category, "tokens": answer.tokens,
                "counts": answer.counts,
                **{name: answer.totals[name] for name in FIGURES if name in answer.totals}}
               for answer in sorted(tally.answers, key=lambda a: (a.source, a.turn))]
    summary = summarise(tally)
    return {"held_out": {key: value for key, value in summary.items() if key != "calibration"},
            "records": records}


# ----- recipes ------------------------------------------------------------------------------


def recipe(options: Namespace, arm: Arm, student: Path, rate: float) -> Tree:
    """An ordinary recipe; the seed orders the records and, since an arm sees a part of them only,
    chooses which; on policy it samples."""
    pair = PAIRS[arm.pair]
    return {
        "teacher": {"model_name_or_path": str(teacher_of(options, pair)), **precision(options)},
        "student": str(student),
        "data": {"train": str(options.folder / "data" / pair.data / "train.jsonl")},
        "objective": METHODS[arm.method].objective,
        "output_dir": str(options.folder / "running" / arm.name),
        "train": {"max_steps": arm.steps, "per_device_train_batch_size": options.batch,
                  "per_device_eval_batch_size": 8, "learning_rate": rate,
                  "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
                  "logging_steps": max(1, arm.steps // 6), "save_strategy": "no",
                  "disable_tqdm": True, "seed": arm.seed, "use_cpu": True, "bf16": options.bf16}}


def precision(options: Namespace) -> Tree:
    return {"dtype": "bfloat16"} if options.bf16 else {}


def held_out_recipe(options: Namespace, arm: Arm, student: Path, split: str) -> Tree:
    """To measure a student against the live teacher, whatever it was trained on."""
    pair = PAIRS[arm.pair]
    path = options.folder / "data" / ("test.jsonl" if split == "test"
                                      else f"{pair.data}/{split}.jsonl")
    tree = recipe(options, arm, student, 1e-4)
    return {**tree, "objective": "forward_kl", "data": {**tree["data"], "eval": str(path)}}


def teacher_of(options: Namespace, pair: Pair) -> Path:
    folder: Path = options.other if pair.other else options.teacher
    return folder


# ----- what arms share ----------------------------------------------------------------------


def student_of(options: Namespace, pair: Pair) -> Path:
    """The untrained student of a pair, cut from --teacher once."""
    layers = read_json(options.teacher / "config.json", "a model")["num_hidden_layers"]
    keep = pair.keep if isinstance(pair.keep, int) else max(2, int(layers * Fraction(pair.keep)))
    place: Path = options.folder / "students" / str(keep)
    if not place.is_dir():
        print(shrink(ModelSpec(model_name_or_path=str(options.teacher), dtype="auto"), place,
                     layers=keep).table(), flush=True)
    return place


def cache_of(options: Namespace, arm: Arm, tree: Tree, signal: str) -> Path:
    """The teacher's hidden states or top entries of all training records, asked for once."""
    place: Path = options.folder / "caches" / f"{arm.pair}-{signal}"
    account = place.with_suffix(".json")
    if not account.is_file():
        shutil.rmtree(place, ignore_errors=True)
        print(f"a cache for {arm.pair}: {signal}", flush=True)
        write_json(fresh(built, tree, place, *SIGNALS[signal]), account)
    return place


def before(options: Namespace, pair: str) -> Tree:
    """The test figures of a pair's untrained student."""
    place: Path = options.folder / "before" / f"{pair}.json"
    if not place.is_file():
        arm = Arm(pair, "kl", 1, 0)
        tree = held_out_recipe(options, arm, student_of(options, PAIRS[pair]), "test")
        write_json(fresh(measure, tree), place)
    found: Tree = read_json(place, "figures")
    return found
