"""One implementation in a process of its own: it trains when it is told to, and tells its times.

The trainer's own loop runs; it is held at the end of an optimizer step until the next order comes.
A step's time is from there to the end of the next one: fetching and collating rows, forward,
backward, clipping, optimizer, and what the trainer does besides.
"""

from __future__ import annotations

import gc
import logging
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback

from bench.common import reason
from bench.measure import memory_limit
from bench.step_reference import reference
from bench.step_rows import count_tokens
from bench.step_setup import ROLES, Setup, make_pair
from bench.step_trainers import TRAINERS, WITHOUT_TEACHER

WARM_UP = 3  # steps before any is timed; the loss is the first one's, memory is the others'
PARTS = ("batch", "loss", "backward", "optimizer")


def work(orders: Connection, setup: Setup, name: str, steps: int) -> None:
    """The process: first sends {"loss", "grad_norm", "peak_memory_bytes", ...} or {"error"}, then
    answers orders ("steps" or "parts", count); anything else ends it.

    Args:
        steps: the most that will be asked for.
    """
    be_quiet()
    if setup.threads:
        torch.set_num_threads(setup.threads)
    try:
        with memory_limit(setup.device), tempfile.TemporaryDirectory() as folder:
            _train(orders, setup, name, steps, folder)
    except Exception as error:
        orders.send({"error": reason(error)})


def refer(answers: Connection, setup: Setup, objectives: Sequence[str]) -> None:
    """Sends the counts of tokens, and then one reference or {"error"} for every objective."""
    be_quiet()
    if setup.threads:
        torch.set_num_threads(setup.threads)
    try:
        pair = make_pair(setup)
        counts = count_tokens(pair.processors["student"], pair.rows)
    except Exception as error:
        answers.send({"error": reason(error)})
        return
    answers.send(dict(zip(("answer_tokens", "tokens"), counts, strict=True)))
    for objective in objectives:
        try:
            with memory_limit(setup.device):
                answers.send(reference(pair, objective, setup.device))
        except Exception as error:
            answers.send({"error": reason(error)})


def _train(orders: Connection, setup: Setup, name: str, steps: int, folder: str) -> None:
    memory = PeakMemory(setup.device)
    pair = make_pair(setup, ROLES[:1] if name in WITHOUT_TEACHER else ROLES)
    trainer = TRAINERS[name](setup, pair, folder, WARM_UP + steps)
    parts = Parts(setup.device)
    parts.watch(trainer)
    pace = Pace(orders, memory, parts, {"weights_bytes": pair.weights_bytes})
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(pace)
    trainer.train()


def be_quiet() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()


class PeakMemory:
    """Bytes that the process takes beyond what it had when this was made: models, gradients,
    optimizer and a step. On CUDA all that the allocator gave out."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        gc.collect()
        self.before = 0 if self.cuda else _status("VmRSS")

    def restart(self) -> None:
        """Forget the peak so far."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        elif self.before:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int | None:
        """None where the system does not tell."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        return _status("VmHWM") - self.before if self.before else None


def _status(key: str) -> int:
    """A line of Linux's /proc/self/status in bytes; 0 elsewhere."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)


class Parts:
    """Seconds in the parts of a step, while `on`; the device is waited for at their ends."""

    def __init__(self, device: str) -> None:
        self.cuda, self.on = device == "cuda", False
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[str] = []
        self._started = 0.0

    def watch(self, trainer: Trainer) -> None:
        """batch: rows to tensors on the device; loss: both models' forward and the loss, with the
        gradients that it computes there; backward; optimizer."""
        for part, holder, name in (
                ("batch", trainer, "data_collator"), ("batch", trainer, "_prepare_inputs"),
                ("loss", trainer, "compute_loss"), ("backward", trainer.accelerator, "backward")):
            setattr(holder, name, self.timed(part, getattr(holder, name)))

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave(part)

        return run

    def enter(self, part: str) -> None:
        """Only the outermost part counts."""
        self._inside.append(part)
        if len(self._inside) == 1 and self.on:
            self._started = self.now()

    def leave(self, part: str) -> None:
        self._inside.remove(part)
        if not self._inside and self.on:
            self.seconds[part] += self.now() - self._started

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class Pace(TrainerCallback):
    """Holds the trainer between optimizer steps and measures them."""

    def __init__(
        self, orders: Connection, memory: PeakMemory, parts: Parts, account: dict[str, Any]
    ) -> None:
        self.orders, self.memory, self.parts, self.account = orders, memory, parts, account
        self.kind, self.left = "warm-up", WARM_UP
        self.times: list[float] = []
        self.cpu_times: list[float] = []
        self._start()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"].optimizer
        optimizer.register_step_pre_hook(lambda *_: self.parts.enter("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self.parts.leave("optimizer"))
        self._start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        if state.global_step == 1:
            self.account |= {key: logs[key] for key in ("loss", "grad_norm") if key in logs}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(self.parts.now() - self.started)
        self.cpu_times.append(time.process_time() - self.cpu_started)
        if state.global_step == 1:
            self.memory.restart()
        self.left -= 1
        if self.left == 0:
            self.orders.send(self._found())
            control.should_training_stop = not self._next()
        self._start()

    def _start(self) -> None:
        self.started, self.cpu_started = self.parts.now(), time.process_time()

    def _found(self) -> dict[str, Any]:
        if self.kind == "warm-up":
            return {**self.account, "peak_memory_bytes": self.memory.peak()}
        if self.kind == "steps":
            return {"seconds": self.times, "cpu_seconds": self.cpu_times}
        mean = sum(self.times) / len(self.times)
        parts = {part: self.parts.seconds[part] / len(self.times) for part in PARTS}
        return {"parts": {**parts, "rest": mean - sum(parts.values())}}

    def _next(self) -> bool:
        """Wait for an order; False if it is the last."""
        self.kind, self.left = self.orders.recv()
        self.times, self.cpu_times, self.parts.on = [], [], self.kind == "parts"
        gc.collect()
        return self.kind in ("steps", "parts")
