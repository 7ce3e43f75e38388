"""Jobs carried out side by side, one CPU thread each, with a bar that says how far things are."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from typing import Any

from tqdm.auto import tqdm

Jobs = dict[Hashable, Callable[[], Any]]  # by name; functools.partial of a module's function


def carry_out(jobs: Jobs, workers: int, title: str) -> tuple[dict[Hashable, Any], float]:
    """Results by name, and the CPU seconds that the jobs took together.

    Args:
        workers: processes; 0 does the work in this one.
    """
    if not workers:
        done = {name: _timed(job) for name, job in tqdm(jobs.items(), desc=title, unit="job")}
    else:
        done = _in_processes(jobs, workers, title)
    return ({name: result for name, (result, _) in done.items()},
            sum(seconds for _, seconds in done.values()))


def _in_processes(jobs: Jobs, workers: int, title: str) -> dict[Hashable, tuple[Any, float]]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    context, done = multiprocessing.get_context("spawn"), {}
    with ProcessPoolExecutor(workers, mp_context=context, initializer=quiet) as pool:
        futures = {pool.submit(partial(_timed, job)): name for name, job in jobs.items()}
        with tqdm(total=len(jobs), desc=title, unit="job") as bar:
            for future in as_completed(futures):
                name = futures[future]
                done[name] = future.result()
                bar.set_postfix_str(" ".join(map(str, name)) if isinstance(name, tuple) else name)
                bar.update()
    return {name: done[name] for name in jobs}


def _timed(job: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    return job(), time.process_time() - started


def quiet() -> None:
    """What a worker starts with: one thread, and nothing printed but errors."""
    import torch

    from taid_vlm.io.quiet import quiet_worker

    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
    quiet_worker()
