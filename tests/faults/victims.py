"""Processes that come to harm: forked from one that has everything imported, killed or refused
a file operation at a moment that is counted, not timed.

What is counted, in the process itself: `file`, every file or folder made, renamed, changed in mode
or removed under one folder; `step`, calls of a model's forward in training; `evaluate`, those in
held-out evaluation and in generation.
"""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import safetensors.torch
import torch

from taid_vlm.cli import main
from taid_vlm.commands import distill as _distill  # noqa: F401  imported once, for all
from taid_vlm.report import run as _report  # noqa: F401
from taid_vlm.runs import stages as _stages  # noqa: F401
from taid_vlm.training.trainer import DistillationTrainer

torch.set_num_threads(1)
FAILURES = {"full": errno.ENOSPC, "read-only": errno.EROFS, "broken": errno.EIO,
            "forbidden": errno.EACCES}
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.utime",
              "shutil.rmtree", "os.truncate", "write")
REMOVING = ("os.remove", "os.rmdir", "shutil.rmtree")
PR_SET_PDEATHSIG = 1  # of prctl


@dataclass(frozen=True)
class Harm:
    """What happens to a process, and when.

    does: "kill", a key of FAILURES, or "nothing". at, number: at which of the counted moments
    (from 1). limit: bytes that any file may have, as on a disk that is full in the midst of a
    file. share: of a file's bytes that are written before a kill in its midst.
    """

    does: str = "nothing"
    at: str = "file"
    number: int = 0
    limit: int | None = None
    share: float = 0.5


class _Watch:
    def __init__(self, folder: Path, harm: Harm) -> None:
        self.folder, self.harm = str(folder), harm
        self.counts: Counter[str] = Counter()
        self.evaluating = False

    def note(self, kind: str, operation: str = "", path: str = "") -> None:
        self.counts[kind] += 1
        harm = self.harm
        if kind != harm.at or self.counts[kind] < harm.number or harm.does == "nothing":
            return
        if harm.does == "kill":
            if operation == "write":
                with open(path, "r+b") as file:
                    file.truncate(int(os.path.getsize(path) * harm.share))
            os.kill(os.getpid(), signal.SIGKILL)
        if harm.does != "full" or operation not in REMOVING:  # a full disk can be emptied
            raise OSError(FAILURES[harm.does], os.strerror(FAILURES[harm.does]), path)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        path = os.fsdecode(arguments[0])
        if path.startswith(self.folder):
            self.note("file", event, path)


def _watch(watch: _Watch) -> None:
    """Let a process count its moments; there is no way back."""
    for module, name in ((safetensors.torch, "serialize_file"), (torch, "save")):
        setattr(module, name, _announced(getattr(module, name)))
    for name in ("tally", "look"):
        setattr(DistillationTrainer, name, _evaluating(getattr(DistillationTrainer, name), watch))
    torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: watch.note("evaluate" if watch.evaluating else "step")
        if hasattr(module, "lm_head") else None)
    sys.addaudithook(watch.hook)


def _announced(write: Any) -> Any:
    """What writes without Python's `open`, told to the audit hooks."""
    def announced(value: Any, place: Any, *rest: Any, **keywords: Any) -> Any:
        result = write(value, place, *rest, **keywords)
        if isinstance(place, (str, os.PathLike)):
            sys.audit("write", place)
        return result

    return announced


def _evaluating(measure: Any, watch: _Watch) -> Any:
    def measured(*arguments: Any, **keywords: Any) -> Any:
        watch.evaluating = True
        try:
            return measure(*arguments, **keywords)
        finally:
            watch.evaluating = False

    return measured


def _live(words: Sequence[str], folder: str, harm: Mapping[str, Any], log: str,
          environment: Mapping[str, str]) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no orphans
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    logging.getLogger("taid_vlm").setLevel(logging.INFO)
    watch = _Watch(Path(folder), Harm(**harm))
    _watch(watch)
    if watch.harm.limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (watch.harm.limit, watch.harm.limit))
    status = main(words)
    if watch.harm.limit is None:
        Path(f"{log}.counts").write_text(json.dumps(watch.counts))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Victim:
    """One command in one process or in several that work together, as torchrun starts them."""

    def __init__(self, words: Sequence[str | Path], folder: Path, harms: Sequence[Harm],
                 log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pytest", "faults.victims"])
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server's own, to preload from
        self.logs = [log.with_name(f"{log.name}.{rank}") for rank in range(len(harms))]
        port = _free_port()
        self.processes = []
        for rank, harm in enumerate(harms):
            environment = {} if len(harms) == 1 else {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(harms)),
                "LOCAL_WORLD_SIZE": str(len(harms)), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
            self.processes.append(context.Process(target=_live, args=(
                [str(word) for word in words], str(folder), asdict(harm), str(self.logs[rank]),
                environment)))
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 120.0) -> list[int]:
        """Every process's exit code; where one fails the others are ended, as torchrun does, and
        where all hang it raises TimeoutError."""
        end = time.monotonic() + seconds
        while any(process.is_alive() for process in self.processes):
            if any(process.exitcode for process in self.processes):
                self._end()
            elif time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"over {seconds} s: {self.error()}")
            time.sleep(0.02)
        return [int(process.exitcode or 0) for process in self.processes]

    def _end(self) -> None:
        for process in self.processes:
            process.join(2.0)
            if process.is_alive():
                process.terminate()
                process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def error(self, rank: int = 0) -> str:
        path = self.logs[rank]
        return path.read_text(errors="replace") if path.exists() else ""

    def counts(self, rank: int = 0) -> Counter[str]:
        return Counter(json.loads(Path(f"{self.logs[rank]}.counts").read_text()))


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
