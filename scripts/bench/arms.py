"""One arm of a comparison, each step in a process of its own: a cache, a training, figures."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from taid_vlm.config.recipe import Recipe, parse_recipe
from taid_vlm.evaluation.held_out import Tally, summarise
from taid_vlm.runs.cache import build_cache
from taid_vlm.runs.ingredients import gather
from taid_vlm.runs.machine import peak_memory
from taid_vlm.runs.run import _make_trainer
from taid_vlm.teachers import ServedTeacher, TeacherCache
from taid_vlm.teachers.sparse import Signal

Tree = dict[str, Any]


def fresh(function: Callable[..., Tree], *arguments: Any) -> Tree:
    """What a function returns in a process of its own, with that process's largest resident set."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def built(tree: Tree, place: Path, dtype: Any, signal: Signal) -> Tree:
    started, cpu = time.perf_counter(), time.process_time()
    cache = build_cache(parse_recipe(tree), place, dtype, signal=signal)
    return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu,
            "tokens": cache.tokens, "records": cache.records, "bytes": cache.bytes,
            "bytes_per_token": TeacherCache(place).bytes_per_token, **peak_memory()}


def trained(tree: Tree) -> Tree:
    """Seconds and CPU seconds are those that `train` took; the CPU's are this process's alone."""
    wanted: Recipe = parse_recipe(tree)
    trainer = _make_trainer(wanted, gather(wanted))
    started, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    memory = peak_memory()
    trainer.save_model(str(Path(wanted.output_dir) / "student"))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    teacher = trainer.teacher
    received = {"received_bytes": teacher.received, "received_tokens": teacher.tokens} \
        if isinstance(teacher, ServedTeacher) else {}
    return {"seconds": seconds, "cpu_seconds": cpu, "steps": trainer.state.global_step,
            "answer_tokens": trainer.answer_tokens, "left_out": trainer.all_dropped(),
            "loss": trainer.loss_report, "losses": losses, **received, **memory}


def measured(tree: Tree) -> Tree:
    """Held-out figures against the teacher itself."""
    return summarise(tallied(tree))


def tallied(tree: Tree, keep_answers: bool = False) -> Tally:
    wanted = parse_recipe(tree)
    ingredients = gather(wanted)
    return _make_trainer(wanted, ingredients).tally(ingredients.eval, keep_answers=keep_answers)
