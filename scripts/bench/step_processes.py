"""Implementations side by side, each in its own process, that take turns."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bench.step_setup import Setup
from bench.step_worker import refer, work
from taid_vlm.errors import TaidError

Found = dict[str, Any]
PATIENCE = 30  # seconds that a process has to end by itself


class Child:
    """A process at the other end of a pipe."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is seen here

    def receive(self) -> Found:
        """What it sends next; {"error"} if it has ended instead."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return {"error": f"its process ended with exit code {self.process.exitcode}"}

    def ask(self, *order: Any) -> Found:
        with contextlib.suppress(OSError):  # it has ended: `receive` says so
            self.pipe.send(order)
        return self.receive()

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(("end", 0))
        self.process.join(PATIENCE)
        self.process.terminate()
        self.process.join()


def references_of(setup: Setup, objectives: Sequence[str]) -> dict[str, Found]:
    """By objective: `answer_tokens`, `tokens`, and `loss` and `grad_norm` in float64 or `error`.

    Raises:
        TaidError: the pair or its rows cannot be made, so that nothing can be measured.
    """
    child = Child(refer, setup, list(objectives))
    try:
        counted = child.receive()
        if "error" in counted:
            raise TaidError(f"the pair could not be made: {counted['error']}")
        return {objective: counted | child.receive() for objective in objectives}
    finally:
        child.end()


def run_all(
    setup: Setup, names: Sequence[str], rounds: int, steps: int, together: bool = True
) -> dict[str, Found]:
    """What every implementation found: what it said when it was ready, `seconds` and
    `cpu_seconds` per round (lists of lists) and `parts`; or `error`.

    Args:
        steps: optimizer steps of a round.
        together: all are alive at once and take turns, each round begins with another; otherwise
            one after the other, for machines that cannot hold them all.
    """
    found: dict[str, Found] = {name: {} for name in names}
    for group in ([list(names)] if together else [[name] for name in names]):
        with _children(setup, group, (rounds + 1) * steps) as children:
            for name, child in children.items():
                found[name] |= child.receive()
            for number in range(rounds):
                first = number % len(group)
                for name in group[first:] + group[:first]:
                    _turn(children[name], found[name], steps)
            for name in group:
                if "error" not in found[name]:
                    found[name] |= children[name].ask("parts", steps)
    return found


def _turn(child: Child, found: Found, steps: int) -> None:
    if "error" in found:
        return
    answer = child.ask("steps", steps)
    if "error" in answer:
        found["error"] = answer["error"]
    else:
        for key in ("seconds", "cpu_seconds"):
            found.setdefault(key, []).append(answer[key])


@contextlib.contextmanager
def _children(setup: Setup, names: Sequence[str], steps: int) -> Iterator[Mapping[str, Child]]:
    """All start at once: each takes a while to load its libraries."""
    children = {name: Child(work, setup, name, steps) for name in names}
    try:
        yield children
    finally:
        for child in children.values():
            child.end()
