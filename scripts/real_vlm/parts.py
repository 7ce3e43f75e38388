"""What is done, one part after the other. A part is done when what it leaves is there, and goes on
where it was when it was stopped."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from real_vlm.data import SIDE, Sources, file_of, write_records
from real_vlm.plan import ARMS, BATCH, Plan
from real_vlm.tower import TowerPlan, train_tower
from taid_vlm.benchmarks.asking import Asking
from taid_vlm.benchmarks.candidates import Candidate
from taid_vlm.benchmarks.evaluate import evaluate
from taid_vlm.commands.distill import distill
from taid_vlm.config.data import DataSource
from taid_vlm.config.model import ModelSpec
from taid_vlm.config.recipe import load_recipe
from taid_vlm.demo.truth import HeldOutTask, questions_task
from taid_vlm.io.files import write_text
from taid_vlm.io.folders import whole_or_absent
from taid_vlm.io.manifest import read_manifest
from taid_vlm.records import ImageRef
from taid_vlm.records.images import GREY
from taid_vlm.runs.cache import build_cache
from taid_vlm.runs.folders import RESULTS, checkpoints, is_finished
from taid_vlm.students.compose import compose
from taid_vlm.students.shrink import shrink

MOST_QUESTIONS = 10_000
CALIBRATION_RECORDS = 16
TEACHER_ROW, BLIND_ROW, CUT_ROW = "Teacher", "Teacher, blank pictures", "Cut, untrained"
RATES = {"align": 1e-3, "teacher": 3e-4, "tower": 1e-4, "student": 5e-4}


@dataclass(frozen=True)
class Part:
    """seconds: of CPU that all of it takes, about."""

    name: str
    seconds: float
    done: Callable[[], bool]
    run: Callable[[], Any]


@dataclass(frozen=True)
class Work:
    """Where everything lies, and what it is made from."""

    plan: Plan
    sources: Sources
    language_model: str
    output: Path
    say: Callable[[str], None]

    @property
    def data(self) -> Path:
        return self.output / "data"

    @property
    def teacher(self) -> Path:
        return self.output / "teacher" / "student"

    def files(self, split: str) -> list[str]:
        return [str(file_of(self.data, split, name)) for name in self.sources.names]

    def arm(self, name: str, seed: int) -> Path:
        return self.output / f"seed-{seed}" / name

    def answers(self, name: str, seed: int | None = None) -> Path:
        folder = self.output if seed is None else self.output / f"seed-{seed}"
        return folder / "questions" / name.lower().replace(", ", "_").replace(" ", "_")

    def held_out(self) -> DataSource:
        return DataSource(path=tuple(self.files("eval")))


def parts_of(work: Work, seeds: int) -> list[Part]:
    """In order; seed after seed, so that all methods have as many."""
    plan, seconds = work.plan, work.plan.seconds
    each = {name: number * seconds[name] for name, number in plan.steps.items()}
    held_out = plan.held_out * seconds["teacher"] / BATCH / 2  # a forward, and a short answer
    half = held_out / 2  # of the layers
    parts = [
        _part(work, "data", work.data, 10, _write_data),
        _part(work, "tower", work.output / "tower", each["tower"], _train_tower),
        _part(work, "composed", work.output / "composed", 20, _compose),
        Part("teacher", each["align"] + each["teacher"] + 3 * held_out,
             partial(is_finished, work.output / "teacher"), partial(_teach, work)),
        _part(work, "cut", work.output / "cut", 60, _cut),
        *(Part(f"answers of {name}", held_out, partial(_holds, work.answers(name), RESULTS),
               partial(_ask, work, name, folder, None))
          for name, folder in ((TEACHER_ROW, work.teacher), (BLIND_ROW, work.teacher),
                               (CUT_ROW, work.output / "cut"))),
        _part(work, "cache", work.output / "cache", each["student"] / 2 + held_out, _cache),
    ]
    for seed in range(seeds):
        for name in ARMS:
            folder = work.arm(name, seed)
            parts += [
                Part(f"{name}, seed {seed}", each["student"] + 3 * half,
                     partial(is_finished, folder), partial(_distill, work, name, seed)),
                Part(f"answers of {name}, seed {seed}", half,
                     partial(_holds, work.answers(name, seed), RESULTS),
                     partial(_ask, work, name, folder / "student", seed))]
    return parts


def _part(
    work: Work, name: str, folder: Path, seconds: float, run: Callable[[Work, Path], Any]
) -> Part:
    done = folder.is_dir if name != "cache" else lambda: read_manifest(folder) is not None
    return Part(name, seconds, done, partial(run, work, folder))


def _holds(folder: Path, name: str) -> bool:
    return (folder / name).exists()


# ----- one by one ---------------------------------------------------------------------------


def _write_data(work: Work, folder: Path) -> None:
    with whole_or_absent(folder, "the records could not be written to '{}'") as partial_folder:
        write_records(partial_folder, work.sources, work.plan.records)


def _train_tower(work: Work, folder: Path) -> None:
    plan, started = TowerPlan(steps=work.plan.steps["tower"]), list[tuple[int, float]]()

    def say(step: int, steps: int, loss: float) -> None:
        if not started:
            started.append((step, time.monotonic()))
        if step % max(1, steps // 20) == 0 and step > started[0][0]:
            each = (time.monotonic() - started[0][1]) / (step - started[0][0])
            work.say(f"{step}/{steps}  loss {loss:.3f}  ETA {(steps - step) * each:.0f} s")

    train_tower(plan, work.sources.icons, folder, say)


def _compose(work: Work, folder: Path) -> None:
    tower = work.output / "tower"
    work.say(f"$ taid-vlm compose {tower} {work.language_model} --output-dir {folder}")
    print(compose(str(tower), work.language_model, folder, dtype="float32").table())


def _teach(work: Work) -> None:
    """The projector alone, then everything; held-out figures at the end."""
    plan, train = work.plan, _train(work, "teacher", 0)
    rates = {"projector": RATES["align"], "tower": RATES["tower"]}
    _carry_out(work, "teacher", {
        "student": {"model_name_or_path": str(work.output / "composed")},
        "data": {"train": {"path": work.files("train")}},
        "objective": {"name": "sft"}, "train": train, "evaluate": _evaluation(),
        "stages": [
            {"name": "align", "train": {
                "freeze": ["tower", "language_model"], "max_steps": plan.steps["align"],
                "learning_rate": RATES["align"], "save_steps": plan.save_steps("align")}},
            {"name": "all", "train": {"learning_rates": rates},
             "data": {"eval": {"path": work.files("eval")}}}],
        "output_dir": str(work.output / "teacher"),
    })


def _cut(work: Work, folder: Path) -> None:
    data = DataSource(path=tuple(work.files("distill")))
    work.say(f"$ taid-vlm shrink {work.teacher} --output-dir {folder} --layers "
             f"{work.plan.layers} --choose importance --calibration {work.data}/distill-*.parquet "
             f"--calibration-records {CALIBRATION_RECORDS}")
    print(shrink(str(work.teacher), folder, layers=work.plan.layers, choose="importance",
                 calibration=data, calibration_records=CALIBRATION_RECORDS).table())


def _cache(work: Work, folder: Path) -> None:
    """The teacher is asked once, for all arms and seeds."""
    recipe = _recipe(work, "cache", _arm_recipe(work, "TAID", 0, {
        "model_name_or_path": str(work.teacher), "dtype": "bfloat16"}))
    work.say(f"$ taid-vlm cache {recipe} --output {folder}")
    print(build_cache(load_recipe(recipe), folder))


def _distill(work: Work, name: str, seed: int) -> None:
    tree = _arm_recipe(work, name, seed, {"cache": str(work.output / "cache")})
    _carry_out(work, f"{name}-{seed}", tree)


def _arm_recipe(work: Work, name: str, seed: int, teacher: dict[str, Any]) -> dict[str, Any]:
    """All arms share everything but the objective and the seed."""
    return {
        "teacher": teacher, "student": {"model_name_or_path": str(work.output / "cut")},
        "data": {"train": {"path": work.files("distill")}, "eval": {"path": work.files("eval")}},
        "objective": {"name": ARMS[name]}, "train": _train(work, "student", seed),
        "evaluate": _evaluation(), "output_dir": str(work.arm(name, seed)),
    }


def _train(work: Work, part: str, seed: int) -> dict[str, Any]:
    return {"max_steps": work.plan.steps[part], "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": BATCH, "learning_rate": RATES[part],
            "lr_scheduler_type": "cosine", "warmup_steps": 0.06, "bf16": True, "use_cpu": True,
            "save_steps": work.plan.save_steps(part), "save_total_limit": 1, "seed": seed,
            "disable_tqdm": True}


def _evaluation() -> dict[str, Any]:
    return {"examples": 0, "canary": 32}


def _carry_out(work: Work, name: str, tree: dict[str, Any]) -> None:
    """An ordinary run, from its last whole checkpoint if there is one."""
    path, output = _recipe(work, name, tree), Path(tree["output_dir"])
    folders = [output, *output.glob("stages/*")]
    resume = any(is_finished(folder) or any(
        read_manifest(one) is not None for one in checkpoints(folder)) for folder in folders)
    work.say(f"$ taid-vlm distill {path}{' --resume' * resume}")
    distill(path, resume=resume)
    for one in [one for folder in folders for one in checkpoints(folder)]:
        shutil.rmtree(one)  # gigabytes that nothing goes on from
    gc.collect()


def _recipe(work: Work, name: str, tree: dict[str, Any]) -> Path:
    return write_text(yaml.safe_dump(tree, sort_keys=False),
                      work.output / "recipes" / f"{name}.yaml")


# ----- answers ------------------------------------------------------------------------------


def _ask(work: Work, name: str, model: Path, seed: int | None) -> None:
    task = questions_task(work.held_out(), MOST_QUESTIONS)
    if name == BLIND_ROW:
        task = with_blank_pictures(task)
    evaluate([Candidate(name, ModelSpec(model_name_or_path=str(model), dtype="bfloat16"))],
             [task], work.answers(name, seed), Asking(batch_size=4 * BATCH, max_new_tokens=12))
    gc.collect()


def with_blank_pictures(task: HeldOutTask) -> HeldOutTask:
    """The same questions, with nothing to see."""
    blank = ImageRef(Image.new("RGB", (SIDE, SIDE), GREY), "blank")
    questions = []
    for question in task.questions:
        images = (blank,) * len(question.images)
        questions.append(replace(question, images=images, conversation=replace(
            question.conversation, images=images)))
    return replace(task, questions=questions)


def finished_seeds(work: Work, seeds: int) -> Sequence[int]:
    """Those of which every arm has its run and its answers."""
    return [seed for seed in range(seeds) if all(
        is_finished(work.arm(name, seed)) and _holds(work.answers(name, seed), RESULTS)
        for name in ARMS)]
