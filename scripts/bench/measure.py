"""The measures: time against the floor, peak extra memory, error of the gradients."""

from __future__ import annotations

import contextlib
import gc
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.implementations import FORMULAS, Loss
from bench.problem import Case, Problem

Step = Callable[[Problem], object]
CHECK_ROWS = 64  # answers on which gradients are compared with float64, over the whole vocabulary
CACHES = 4  # on CUDA, inputs rotate over so many times the L2 cache


def step(loss: Loss) -> Callable[[Problem], tuple[Tensor | None, Tensor | None]]:
    """Forward and backward; the gradients of hidden states and head."""

    def run(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
        problem.take_gradients()  # an implementation that failed may have left some
        loss(problem).backward()
        return problem.take_gradients()

    return run


# ----- the floor ------------------------------------------------------------------------------


def floor_flops(case: Case) -> int:
    """Two per multiply-add: student and teacher logits, gradients of hidden states and head."""
    n, v, h_s, h_t = case.answers, case.vocab, case.student_hidden, case.teacher_hidden
    return 2 * n * h_s * v + 2 * n * h_t * v + 4 * n * h_s * v


def make_floor(case: Case, problem: Problem) -> Step:
    """The four GEMMs on the answers and nothing else, in the case's type and chunks.

    Room for the logits stands ready; the gradients are new tensors, as every implementation's are
    (on a CPU new pages cost time). The head's is added up by the GEMM itself (beta = 1) from the
    second chunk on. A frozen head does not lower the floor.
    """
    x = problem.student_hidden.detach()[problem.answers]
    y = problem.teacher_hidden[problem.answers]
    chunks = case.chunks()
    rows = max(chunk.stop - chunk.start for chunk in chunks)
    s, u = (x.new_zeros(rows, case.vocab) for _ in range(2))

    def floor(given: Problem) -> None:
        head = given.student_head.detach()
        g_x, g_w = torch.empty_like(x), torch.empty_like(head)
        for index, chunk in enumerate(chunks):
            n = chunk.stop - chunk.start
            torch.mm(x[chunk], head.T, out=s[:n])
            torch.mm(y[chunk], given.teacher_head.T, out=u[:n])
            torch.mm(s[:n], head, out=g_x[chunk])
            if index == 0:
                torch.mm(s[:n].T, x[chunk], out=g_w)
            else:
                torch.addmm(g_w, s[:n].T, x[chunk], out=g_w)

    return floor


# ----- time -----------------------------------------------------------------------------------


def rotation(problem: Problem, device: str) -> list[Problem]:
    """On CUDA, as many copies as the L2 cache cannot hold; elsewhere the problem alone."""
    if device != "cuda":
        return [problem]
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = -(-CACHES * cache // problem.nbytes)
    return [problem, *(problem.copy() for _ in range(copies))]


def interleave(
    steps: Mapping[str, Step], problems: Sequence[Problem], repeats: int, device: str
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Seconds of every step in every round, and what failed; each round begins with another."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    failed: dict[str, Exception] = {}
    names, turn = list(steps), 0
    for number in range(repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if name in failed:
                continue
            turn += 1
            try:
                seconds[name].append(
                    seconds_of(steps[name], problems[turn % len(problems)], device))
            except Exception as error:
                failed[name] = error.with_traceback(None)  # it would keep the tensors alive
    return seconds, failed


def seconds_of(run: Step, problem: Problem, device: str) -> float:
    """Of one call: by CUDA events on the GPU, of processor time elsewhere, as others may share the
    machine."""
    gc.collect()
    if device != "cuda":
        start = time.process_time()
        run(problem)
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run(problem)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


# ----- memory ---------------------------------------------------------------------------------


def peak_extra_bytes(run: Callable[[], object], device: str) -> int:
    """The most bytes alive at once beyond those alive before, the results included.

    On CUDA the allocator's own counter. On the CPU every allocation and release as the allocator
    reports it to the profiler: it sees compiled code, where a dispatch mode is blind, and unlike
    the resident set it knows nothing of pages kept for later; where none are, in a fresh process,
    the two agree to 0.1 %. Scratch that BLAS takes for itself is not in it.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@contextlib.contextmanager
def memory_limit(device: str) -> Iterator[None]:
    """Too large a problem becomes an error to report, where the kernel would end the process."""
    status, system = (Path("/proc") / name for name in ("self/status", "meminfo"))
    if device != "cpu" or not system.exists():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    most = _kilobytes(status, "VmData") + _kilobytes(system, "MemAvailable")
    hard = before[1] if before[1] != resource.RLIM_INFINITY else 1024 * most
    resource.setrlimit(resource.RLIMIT_DATA, (min(1024 * most, hard), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _kilobytes(path: Path, key: str) -> int:
    return next(int(line.split()[1]) for line in path.read_text().splitlines()
                if line.startswith(f"{key}:"))


# ----- accuracy -------------------------------------------------------------------------------


def check_case(case: Case) -> Case:
    """The case up to its CHECK_ROWS-th answer, in two chunks if all of it takes several."""
    rows = min(CHECK_ROWS, case.answers)
    chunks = min(2, len(case.chunks()))
    return replace(case, answers=rows, tokens=(rows - 1) * case.tokens // case.answers + 1,
                   memory_budget=case.row_bytes * -(-rows // chunks))


@torch.no_grad()
def reference(problem: Problem, objective: str) -> tuple[Tensor, Tensor]:
    """Gradients of the mean loss over the answers, in float64 from the same rounded inputs."""
    x = problem.student_hidden[problem.answers].double()
    u = problem.teacher_hidden[problem.answers].double() @ problem.teacher_head.double().T
    head = problem.student_head.double()
    s = x @ head.T
    with torch.enable_grad():
        s.requires_grad_()
        (g,) = torch.autograd.grad(FORMULAS[objective](s, u).mean(), s)
    hidden = torch.zeros_like(problem.student_hidden, dtype=torch.float64)
    hidden[problem.answers] = g @ head
    return hidden, g.T @ x


def gradient_errors(
    got: tuple[Tensor | None, Tensor | None], want: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """max |got - want| / max |want| of both gradients and the worse of them; rms likewise.

    A gradient that was not asked for has no error.
    """
    errors: dict[str, float] = {}
    for name, g, w in zip(("hidden", "head"), got, want, strict=True):
        if g is not None:
            off = g.double() - w
            errors[f"gradient_error_{name}"] = float(off.abs().max() / w.abs().max())
            errors[f"gradient_error_rms_{name}"] = float(off.norm() / w.norm())
    worst = max(errors[key] for key in errors if "rms" not in key)
    return {"gradient_error": worst, **errors}
