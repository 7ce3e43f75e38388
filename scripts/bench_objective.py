"""How fast, how large and how exact the objective is, against other implementations.

    python scripts/bench_objective.py --tokens 256 --objective taid,forward_kl,jsd \\
        --json bench.json --plot bench.svg

One step is: hidden states and heads of student and teacher in, the mean loss over the answers,
gradients of the student's hidden states and head out. Every implementation runs in every round of
one process, in turn, with the floor among them.

The floor is the four GEMMs that no exact implementation can avoid: student logits (2 N Hs V
operations), teacher logits (2 N Ht V), gradients of hidden states and of the head (4 N Hs V), with
N the answers. They run in the same type and in the same chunks as our own objective: student
logits and teacher logits of a chunk fit 384 MiB (on CUDA both in float32, and their gradient), and
chunks are about equal. A second chunk's gradient of the head is added by the GEMM itself
(beta = 1). Logits are made in memory that stands ready; the two gradients are new tensors, as every
implementation's are, because they are handed out.
`ratio_to_floor` is the median over rounds of a step's time over the floor's in the same round; on
a CPU it is processor time, of all threads.

With `--answer-fraction 0.25`, a quarter of the `--tokens` positions are answers. The floor stays on
the answers; an implementation that cannot leave the others out runs on all of them with a mask.

`peak_extra_bytes` is from a run of its own: everything alive beyond the inputs, gradients included.
`gradient_error` is max |g - reference| / max |reference|, the larger of hidden states and head, on
the first 64 answers with the whole vocabulary, in two chunks if the timed problem takes several.
The reference is float64 from the same rounded inputs: the rounding of logits is part of the error.
`gradient_error_rms_*` are the same with root mean squares instead of largest elements.

With `--teacher-vocab V` or `--tokenizers TEACHER STUDENT` (two folders) the models split text
differently (alignment `chunks`): ours against the same over all logits in memory, on CPU. The ratio
is then of processor seconds; the floor's rows are those of both models.

What cannot be measured (not installed, refused, out of memory) is a row with `error`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's own remarks

import torch
from bench import chunks
from bench.common import (
    Rows,
    carry_out,
    check_device,
    check_names,
    conditions,
    described,
    names,
    number,
    numbers,
    parsed,
    reason,
)
from bench.implementations import FORMULAS, IMPLEMENTATIONS, Loss
from bench.measure import (
    check_case,
    floor_flops,
    gradient_errors,
    interleave,
    make_floor,
    memory_limit,
    peak_extra_bytes,
    reference,
    rotation,
    step,
)
from bench.output import conditions_line, plot, table, write_csv
from bench.problem import Case, Problem, make_problem
from measure_cells import TEXTS

from taid_vlm.errors import TaidError
from taid_vlm.io.files import write_json

DTYPES = ("float32", "bfloat16", "float16")
PICTURES = (".svg", ".png", ".pdf")


def main(arguments: Sequence[str] | None = None) -> Rows:
    """Measure every case, print tables, write what was asked for; returns the rows."""
    args = parsed(make_parser(), check, arguments)
    apart = args.teacher_vocab or args.tokenizers
    cases = (chunks.measure(case, args.teacher_vocab, args.tokenizers, [*TEXTS.values()],
                            args.repeats) if apart
             else measure(case, args.implementations, args.repeats)
             for case in (make_case(args, tokens, objective)
                          for tokens in args.tokens for objective in args.objective))
    return carry_out(cases, conditions(), conditions_line, table, partial(write, args=args))


def make_parser() -> argparse.ArgumentParser:
    parser = described(__doc__)
    listed: dict[str, Any] = {"type": names, "metavar": "NAME[,NAME]"}
    parser.add_argument("--tokens", type=numbers, default=[256], metavar="N[,N...]")
    parser.add_argument("--answer-fraction", type=float, default=1.0, metavar="F")
    parser.add_argument("--vocab", type=number, default=151936, metavar="V")
    parser.add_argument("--teacher-vocab", type=number, metavar="V")
    parser.add_argument("--tokenizers", nargs=2, type=chunks.folder, default=(),
                        metavar=("TEACHER", "STUDENT"))
    parser.add_argument("--student-hidden", type=number, default=896, metavar="H")
    parser.add_argument("--teacher-hidden", type=number, default=2048, metavar="H")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--objective", default=["taid", "forward_kl", "jsd"], **listed)
    parser.add_argument("--implementations", **listed, default=[
        name for name in IMPLEMENTATIONS if name != "ours_float32"])  # nearly always ours
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=number, default=5, metavar="N")
    parser.add_argument("--threads", type=number, metavar="N", help="default: as torch decides")
    parser.add_argument("--frozen-head", action="store_true",
                        help="no gradient of the head is asked for; the floor stays")
    for name in ("json", "csv", "plot"):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is measured; raises TaidError."""
    check_names(args, {"objective": FORMULAS, "implementations": IMPLEMENTATIONS})
    if not 0 < args.answer_fraction <= 1:
        raise TaidError(f"--answer-fraction {args.answer_fraction}, but it must be in (0, 1].")
    check_device(args.device)
    if args.plot and args.plot.suffix not in PICTURES:
        raise TaidError(f"--plot {args.plot}, but the name must end in one of {PICTURES}.")


def make_case(args: argparse.Namespace, tokens: int, objective: str) -> Case:
    return Case(
        tokens=tokens, answers=max(1, round(tokens * args.answer_fraction)), vocab=args.vocab,
        student_hidden=args.student_hidden, teacher_hidden=args.teacher_hidden,
        dtype=getattr(torch, args.dtype), objective=objective, device=args.device,
        frozen_head=args.frozen_head)


def measure(case: Case, names: Sequence[str], repeats: int) -> Rows:
    """One row per implementation: accuracy of all, then memory of all, then all against time."""
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    torch.compiler.reset()  # nothing is left of another case's sizes
    with memory_limit(case.device):
        problem = make_problem(case)
        _accuracy(case, problem, found)
        torch.compiler.reset()
        steps = _memory(case, problem, found)
        floor = make_floor(case, problem)
        floor(problem)
        seconds, failed = interleave(
            {"floor": floor, **steps}, rotation(problem, case.device), repeats, case.device)
    for name, error in failed.items():
        found[name] = {"error": reason(error)}
    for name in steps.keys() - failed.keys():
        ratios = [a / b for a, b in zip(seconds[name], seconds["floor"], strict=True)]
        found[name] |= {
            "ratio_to_floor": median(ratios), "ratio_spread": [min(ratios), max(ratios)],
            "seconds": median(seconds[name]),
            "seconds_spread": [min(seconds[name]), max(seconds[name])]}
    floor_seconds = median(seconds["floor"])
    return [_row(case, name, values, floor_seconds) for name, values in found.items()]


def _accuracy(case: Case, problem: Problem, found: dict[str, dict[str, Any]]) -> None:
    small = check_case(case)
    part = problem.first(small.answers)
    want = reference(part, case.objective)
    for name, values in found.items():
        _attempt(values, lambda loss: gradient_errors(step(loss)(part), want), name, small)


def _memory(
    case: Case, problem: Problem, found: dict[str, dict[str, Any]]
) -> dict[str, Callable[[Problem], object]]:
    """Warms up, measures memory, and returns the steps of those that did not fail."""
    steps: dict[str, Callable[[Problem], object]] = {}

    def peak(loss: Loss, name: str) -> dict[str, Any]:
        run = steps[name] = step(loss)
        gradient_bytes = sum(g.nbytes for g in run(problem) if g is not None)

        def first_call() -> object:  # of a new one, which has kept no memory from a call before
            return step(IMPLEMENTATIONS[name](case))(problem)

        return {"peak_extra_bytes": peak_extra_bytes(first_call, case.device),
                "gradient_bytes": gradient_bytes}

    for name, values in found.items():
        if "error" not in values:
            _attempt(values, partial(peak, name=name), name, case)
    return {name: run for name, run in steps.items() if "error" not in found[name]}


def _attempt(
    values: dict[str, Any], work: Callable[[Loss], dict[str, Any]], name: str, case: Case
) -> None:
    """Add what `work` finds, or the error that any peer may come up with."""
    try:
        values |= work(IMPLEMENTATIONS[name](case))
    except Exception as error:
        values.clear()
        values["error"] = reason(error)


def _row(case: Case, name: str, values: dict[str, Any], floor_seconds: float) -> dict[str, Any]:
    return {
        "implementation": name, "objective": case.objective,
        "dtype": str(case.dtype).removeprefix("torch."), "tokens": case.tokens,
        "ratio_to_floor": None, "peak_extra_bytes": None, "gradient_error": None, **values,
        "answers": case.answers, "answer_fraction": case.answers / case.tokens,
        "vocab": case.vocab, "student_hidden": case.student_hidden,
        "teacher_hidden": case.teacher_hidden, "frozen_head": case.frozen_head,
        "floor_seconds": floor_seconds, "floor_flops": floor_flops(case),
        "chunks": len(case.chunks())}


def write(rows: Rows, args: argparse.Namespace) -> None:
    if args.json:
        write_json(rows, args.json)
    if args.csv:
        write_csv(rows, args.csv)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    try:
        main()
    except TaidError as problem:
        sys.exit(f"error: {problem}")
