"""`taid-vlm demo`: two small worlds, four objectives, one page; offline, in minutes, on a CPU."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from taid_vlm.compare import Comparison, Method, compare_runs, plain
from taid_vlm.compare.measures import BASE, TEACHER
from taid_vlm.demo.arms import OBJECTIVES, WORLDS, Arm, World, carry_out
from taid_vlm.demo.page import console_table, demo_report
from taid_vlm.demo.truth import caption_entropies, caption_measure, questions_task
from taid_vlm.errors import TaidError
from taid_vlm.io.files import write_json
from taid_vlm.io.folders import refuse_file_in_the_way
from taid_vlm.io.quiet import quiet_worker
from taid_vlm.report import write_report
from taid_vlm.runs.machine import machine, peak_memory, versions

BASELINE = "TAID"  # whom the others' differences are taken from


def run_demo(output: Path, seed: int = 0, train_teacher: bool = False) -> dict[str, Any]:
    """Run every arm of both worlds, compare them, and write `results.json` and `report.html`.

    Args:
        output: where they are written, and a folder for every world with its runs.
        seed: of the data order of every arm (the arms share it).
        train_teacher: first train the shipped teachers and warm starts again (an hour or so).

    Raises:
        TaidError: the shipped data or models are not there, or `output` cannot be written.
    """
    refuse_file_in_the_way(output)
    started, data = time.perf_counter(), data_folder()
    models = _train_models(data, output) if train_teacher else data / "models"
    arms = [Arm(world, name, data, models, output, seed, objective)
            for name, objective in (*OBJECTIVES.items(), (TEACHER, None), (BASE, None))
            for world in WORLDS]
    methods = _carry_out(arms)
    compared = [(world, compare_arms(world, data, [
        method for arm, method in zip(arms, methods, strict=True) if arm.world is world]))
        for world in WORLDS]
    document = {
        "schema": 1, "kind": "demo", "seed": seed,
        "worlds": {world.name: {"title": world.title, "steps": world.steps,
                                "batch_size": world.batch_size, **plain(comparison)}
                   for world, comparison in compared},
        "seconds": time.perf_counter() - started, "memory": _memory(), "machine": machine(),
        "versions": versions(),
    }
    images = {world.name: {question.id: question.images for question in questions_task(
        world.held_out(data), world.questions).questions} for world in WORLDS}
    write_report(demo_report(compared, images, document), output / "report.html")
    write_json(document, output / "results.json")
    print(*(console_table(*pair) for pair in compared), sep="\n")
    print(f"\n{document['seconds']:.0f} s. Report: {output / 'report.html'}")
    return document


def compare_arms(world: World, data: Path, methods: Sequence[Method]) -> Comparison:
    """`taid-vlm compare` of a world's arms, the last two of them Teacher and Base; in addition,
    how far they are from the truth."""
    *trained, teacher, base = methods
    truth = caption_entropies(world.held_out(data))
    return compare_runs(trained, teacher, base, BASELINE, more=[caption_measure(trained, truth)])


def data_folder() -> Path:
    """`data/` of the checkout, or the copy inside the installed package."""
    for folder in (Path(__file__).parents[2] / "data", Path(__file__).parent / "data"):
        if (folder / "models").is_dir():
            return folder
    raise TaidError("the demo's data is missing: install the package from its repository, where "
                    "data/ lies beside taid_vlm/.")


def _train_models(data: Path, output: Path) -> Path:
    """Teachers and warm starts, by the script that the shipped ones come from."""
    command = [sys.executable, str(data / "generate.py"), "--only-models", "--output-dir",
               str(output)]
    if status := subprocess.run(command).returncode:
        raise TaidError(f"--train-teacher: {' '.join(command[1:])} ended with status {status}.")
    return output / "models"


def _carry_out(arms: Sequence[Arm]) -> list[Method]:
    """Every arm in a process of its own kind, as many side by side as there are cores."""
    workers = max(1, min(len(arms), os.cpu_count() or 1, 6))
    context = multiprocessing.get_context("spawn")
    for name, value in (("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1"), ("TQDM_DISABLE", "1")):
        os.environ.setdefault(name, value)
    methods: dict[int, Method] = {}
    with ProcessPoolExecutor(workers, mp_context=context, initializer=quiet_worker) as pool:
        futures = {pool.submit(carry_out, arm): index for index, arm in enumerate(arms)}
        with tqdm(total=len(arms), unit="arm") as bar:
            for future in as_completed(futures):
                index = futures[future]
                methods[index] = future.result()
                bar.set_postfix_str(f"{arms[index].world.name}: {arms[index].name}")
                bar.update()
    return [methods[index] for index in range(len(arms))]




def _memory() -> dict[str, int]:
    """Peak resident set of the main process and of the largest worker, in bytes."""
    import resource

    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {**peak_memory(), "largest_worker_rss_bytes": children}
