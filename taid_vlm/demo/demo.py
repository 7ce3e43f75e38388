"""`taid-vlm demo`: its arms side by side, one page; offline, in minutes, on a CPU."""

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
from taid_vlm.demo.real import prepare_models, real_world
from taid_vlm.demo.truth import caption_entropies, caption_measure, questions_task
from taid_vlm.errors import TaidError
from taid_vlm.io.files import write_json
from taid_vlm.io.folders import refuse_file_in_the_way
from taid_vlm.io.quiet import quiet_worker
from taid_vlm.report import write_report
from taid_vlm.runs.folders import is_finished
from taid_vlm.runs.machine import machine, peak_memory, versions

BASELINE = "TAID"  # whom the others' differences are taken from
# what workers are started with; memory that malloc keeps need not be had again for every logit
WORKERS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
           "MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


def run_demo(
    output: Path, seed: int = 0, train_teacher: bool = False, real: bool = False
) -> dict[str, Any]:
    """Run every arm of both worlds, compare them, and write `results.json` and `report.html`.

    Args:
        output: where they are written, and a folder for every world with its runs.
        seed: of the data order of every arm (the arms share it).
        train_teacher: first train the shipped teachers and warm starts again (an hour or so).
        real: not the worlds but a real language model (`real.py`).

    Raises:
        TaidError: the shipped data or models are not there, or `output` cannot be written.
    """
    started, data = time.perf_counter(), data_folder()
    worlds = (real_world(),) if real else WORLDS
    arms = [Arm(world, name, data, output / "models" if real or train_teacher else data / "models",
                output, seed, OBJECTIVES.get(name))
            for name in (*OBJECTIVES, TEACHER, BASE) for world in worlds if name in world.rows]
    _refuse_in_the_way(output, arms)
    if real:
        prepare_models(output / "models")
    elif train_teacher:
        _train_models(data, output)
    methods = _carry_out(arms)
    compared = [(world, compare_arms(world, data, [
        method for arm, method in zip(arms, methods, strict=True) if arm.world is world]))
        for world in worlds]
    document = {
        "schema": 1, "kind": "demo", "seed": seed,
        "worlds": {world.name: {"title": world.title, "steps": world.steps,
                                "batch_size": world.batch_size, "bf16": world.bf16,
                                **plain(comparison)}
                   for world, comparison in compared},
        "real": real, "seconds": time.perf_counter() - started, **_used(), "machine": machine(),
        "versions": versions(),
    }
    images = {world.name: {question.id: question.images for question in questions_task(
        world.held_out(data), world.questions).questions} for world in worlds}
    write_report(demo_report(compared, images, document), output / "report.html")
    write_json(document, output / "results.json")
    print(*(console_table(*pair) for pair in compared), sep="\n")
    print(f"\n{document['seconds']:.0f} s ({document['cpu_seconds']:.0f} of CPU). "
          f"Report: {output / 'report.html'}")
    return document


def compare_arms(world: World, data: Path, methods: Sequence[Method]) -> Comparison:
    """`taid-vlm compare` of a world's arms, the last two of them Teacher and Base where its truth
    is known; how far they are from it, in addition."""
    if not world.questions:
        return compare_runs(methods, baseline=BASELINE)
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


def _refuse_in_the_way(output: Path, arms: Sequence[Arm]) -> None:
    """Before minutes of work: a file, or what an earlier demo has finished."""
    refuse_file_in_the_way(output)
    if finished := [arm.run for arm in arms if is_finished(arm.run)]:
        raise TaidError(f"'{finished[0]}' holds a finished run: remove '{output}', or choose "
                        "another --output-dir.")


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
    for name, value in WORKERS.items():
        os.environ.setdefault(name, value)
    methods: dict[int, Method] = {}
    with ProcessPoolExecutor(workers, mp_context=context, initializer=quiet_worker) as pool:
        futures = {pool.submit(carry_out, arm): index for index, arm in enumerate(arms)}
        try:
            with tqdm(total=len(arms), unit="arm") as bar:
                for future in as_completed(futures):
                    index = futures[future]
                    methods[index] = future.result()
                    bar.set_postfix_str(f"{arms[index].world.name}: {arms[index].name}")
                    bar.update()
        except BaseException:  # an arm's or Ctrl-C: those that have not begun are left
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [methods[index] for index in range(len(arms))]


def _used() -> dict[str, Any]:
    """CPU seconds, and peak resident sets in bytes of the main process and the largest worker."""
    import resource

    here, workers = (resource.getrusage(who) for who in (resource.RUSAGE_SELF,
                                                         resource.RUSAGE_CHILDREN))
    return {"cpu_seconds": sum(each.ru_utime + each.ru_stime for each in (here, workers)),
            "memory": {**peak_memory(), "largest_worker_rss_bytes": workers.ru_maxrss * 1024}}
