"""`taid-vlm demo`: two small worlds, four objectives, one report; offline, in minutes, on a CPU."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from taid_vlm.demo.arms import OBJECTIVES, START, TEACHER, WORLDS, Job, caption_entropies, run_arm
from taid_vlm.demo.page import demo_report
from taid_vlm.errors import TaidError
from taid_vlm.io.files import write_json
from taid_vlm.io.folders import refuse_file_in_the_way
from taid_vlm.io.quiet import quiet_worker
from taid_vlm.report import write_report
from taid_vlm.runs.results import SCHEMA, machine, peak_memory, versions


def run_demo(output: Path, seed: int = 0, train_teacher: bool = False) -> dict[str, Any]:
    """Run every arm of both worlds and write `results.json` and `report.html` into `output`.

    Args:
        seed: of the data order of every arm (the arms share it).
        train_teacher: first train the shipped teachers and warm starts again (an hour or so).

    Raises:
        TaidError: the shipped data or models are not there, or `output` cannot be written.
    """
    refuse_file_in_the_way(output)
    started, data = time.perf_counter(), data_folder()
    models = data / "models"
    if train_teacher:
        from taid_vlm.demo.pretrain import train_all

        models = output / "models"
        train_all(models)
    arms = (*OBJECTIVES, START, TEACHER)
    jobs = [Job(world, arm, data, models, output, seed) for arm in arms for world in WORLDS]
    results = _run(jobs)
    document = {
        "schema": SCHEMA,
        "seed": seed,
        "worlds": {w.name: _world(w.name, jobs, results) for w in WORLDS},
        "seconds": time.perf_counter() - started,
        "memory": _memory(),
        "machine": machine(),
        "versions": versions(),
    }
    write_report(demo_report(document, data), output / "report.html")
    write_json(document, output / "results.json")
    print(_closing(document, output))
    return document


def data_folder() -> Path:
    """`data/` of the checkout, or the copy inside the installed package."""
    for folder in (Path(__file__).parents[2] / "data", Path(__file__).parent / "data"):
        if (folder / "models").is_dir():
            return folder
    raise TaidError("the demo's data is missing: install the package from its repository, where "
                    "data/ lies beside taid_vlm/.")


def _run(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Every job in a process of its own kind, as many side by side as there are cores."""
    workers = max(1, min(len(jobs), os.cpu_count() or 1, 6))
    context = multiprocessing.get_context("spawn")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    results: dict[int, dict[str, Any]] = {}
    with ProcessPoolExecutor(workers, mp_context=context, initializer=quiet_worker) as pool:
        futures = {pool.submit(run_arm, job): index for index, job in enumerate(jobs)}
        with tqdm(total=len(jobs), unit="arm") as bar:
            for future in as_completed(futures):
                index = futures[future]
                results[index] = future.result()
                bar.set_postfix_str(f"{jobs[index].world.name}: {jobs[index].arm}")
                bar.update()
    return [results[index] for index in range(len(jobs))]


def _world(name: str, jobs: Sequence[Job], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mine = [(job, result) for job, result in zip(jobs, results, strict=True)
            if job.world.name == name]
    job = mine[0][0]
    return {
        "title": job.world.title, "steps": job.world.steps, "batch_size": job.world.batch_size,
        "caption_entropies": caption_entropies(job),
        "arms": {result["arm"]: result for _, result in mine},
    }


def _memory() -> dict[str, int]:
    """Peak resident set of the main process and of the largest worker, in bytes."""
    import resource

    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {**peak_memory(), "largest_worker_rss_bytes": children}


def _closing(document: dict[str, Any], output: Path) -> str:
    lines = []
    for world in document["worlds"].values():
        lines.append(f"\n{world['title']} ({world['steps']} steps each)")
        lines.append(f"  {'':<12}{'KL to teacher':>16}{'agreement':>12}{'accuracy':>12}")
        for name, arm in world["arms"].items():
            figures, accuracy = arm["figures"], arm["accuracy"][""]
            kl = f"{figures['kl']:.4f}" if figures else "0"
            agreement = f"{figures['agreement']:.3f}" if figures else "1"
            right = f"{accuracy['value']:.3f}±{accuracy['stderr']:.3f}"
            lines.append(f"  {name:<12}{kl:>16}{agreement:>12}{right:>12}")
    lines.append(f"\n{document['seconds']:.0f} s. Report: {output / 'report.html'}")
    return "\n".join(lines)
