"""A whole training step: ours against TRL's trainers and against SFT, on the same pair and rows.

    python scripts/bench_step.py --scale small --objective forward_kl,jsd \\
        --implementations ours,sft,trl_gkd --json step.json --markdown step.md

Every implementation is a trainer as its users call it, in a process of its own: the same models
(same weights), the same rows in the same order, AdamW, clipping, one optimizer step per order. The
processes take turns, a few steps at a time, so that a busy machine is busy for all of them;
`ratio_to_ours` is the median over rounds of the ratio within a round. A step is everything from one
end of a step to the next: fetching and collating, forward, backward, clipping, optimizer, and what
the trainer does besides. The warm-up is not timed, and figures are logged there only.
`cpu_seconds` is what the process itself used of its processors, all threads together: on a machine
that others share it tells more than the clock.

Every step has the same rows. The longest has `--sequence-length` tokens, the shortest three
quarters of them; `--answer-fraction` of a row is its answer. Tokens are counted without padding.

`peak_memory_bytes` is what the process takes beyond its libraries, at most, from the second step
on: models, gradients, optimizer, and a step. On CUDA it is what torch's allocator gave out.

`loss_error` compares the loss of the first step with one that is computed apart: in float64, row by
row, by textbook formulas, from the same (rounded) weights. `grad_norm_error` does the same with the
norm of the gradient, as every trainer logs it before clipping. Where one is off by more than
rounding, `differs` says by how much. For TAID it is the loss at the schedule's start.

What an implementation cannot run is a row with `error`.

`--floors` measures our trainer alone: `x floor` is a whole step over what no step can do without
(student's decoder forward and backward, teacher's forward, the four matrix products of the heads,
the optimizer), `x parts` over the same with the fused loss in the place of the products. All are in
one process, on the same rows and weights, in turns; `--rounds` steps are timed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# large blocks then go back to the system when they are freed: memory is what is in use
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")

from bench.common import (
    Rows,
    carry_out,
    check_device,
    check_names,
    conditions,
    described,
    names,
    number,
    parsed,
    write_asked,
)
from bench.step_floors import floors_of, floors_table
from bench.step_output import conditions_line, markdown, table
from bench.step_processes import Found, references_of, run_all
from bench.step_reference import FORMULAS
from bench.step_setup import DTYPES, KINDS, SCALES, Setup
from bench.step_trainers import NOTES, TRAINERS, WITHOUT_TEACHER

from taid_vlm.errors import TaidError

OBJECTIVES = tuple(name for name in FORMULAS if name != "ce")
# a relative error beyond which a loss is another loss, not another rounding
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2, "mixed": 5e-2}


def main(arguments: Sequence[str] | None = None) -> Rows:
    """Measure every objective, print tables, write what was asked for; returns the rows."""
    args = parsed(make_parser(), check, arguments)
    if args.floors:
        rows = (floors_of(make_setup(args, objective), args.rounds) for objective in args.objective)
        return carry_out(rows, {**conditions(), "load": os.getloadavg()[0]}, conditions_line,
                         floors_table, partial(write_asked, args=args, page=floors_table))
    cases = (measure(make_setup(args, objective), args.implementations, args.rounds, args.steps,
                     not args.one_by_one) for objective in args.objective)
    about = {**conditions(), "load": os.getloadavg()[0]}
    return carry_out(cases, about, conditions_line, table,
                     partial(write_asked, args=args, page=markdown))


def make_parser() -> argparse.ArgumentParser:
    parser = described(__doc__)
    listed: dict[str, Any] = {"type": names, "metavar": "NAME[,NAME]"}
    parser.add_argument("--kind", choices=KINDS, default="text")
    parser.add_argument("--scale", choices=tuple(SCALES), default="small",
                        help="a built-in pair with random weights")
    parser.add_argument("--layers", type=number, metavar="N", help="cut a built-in pair to so many")
    parser.add_argument("--student", metavar="PATH", help="with --teacher, instead of --scale")
    parser.add_argument("--teacher", metavar="PATH")
    parser.add_argument("--objective", default=["forward_kl"], **listed)
    parser.add_argument("--implementations", default=list(TRAINERS), **listed)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32",
                        help="mixed: a float32 student under autocast, a bfloat16 teacher")
    parser.add_argument("--lora", type=number, metavar="R",
                        help="train an adapter of this rank of all linear layers")
    parser.add_argument("--batch-size", type=number, default=4, metavar="N")
    parser.add_argument("--accumulation", type=number, default=1, metavar="N")
    parser.add_argument("--sequence-length", type=number, metavar="N",
                        help="default: the scale's own")
    parser.add_argument("--answer-fraction", type=float, default=0.25, metavar="F")
    parser.add_argument("--rounds", type=number, default=5, metavar="N")
    parser.add_argument("--steps", type=number, default=2, metavar="N", help="of a round")
    parser.add_argument("--one-by-one", action="store_true",
                        help="one process after the other, where memory does not hold them all")
    parser.add_argument("--threads", type=number, metavar="N", help="default: as torch decides")
    parser.add_argument("--floors", action="store_true",
                        help="our trainer's whole step against the floors of its parts, on a CPU")
    for name in ("json", "markdown"):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is measured; raises TaidError."""
    check_names(args, {"objective": OBJECTIVES, "implementations": tuple(TRAINERS)})
    if not 0 < args.answer_fraction < 1:
        raise TaidError(f"--answer-fraction {args.answer_fraction}, but it must be in (0, 1).")
    if (args.student is None) != (args.teacher is None):
        raise TaidError("--student and --teacher go together.")
    if args.student is not None and args.layers is not None:
        raise TaidError("--layers cuts a built-in pair only; leave it out with --student.")
    check_device(args.device)
    if args.floors and (args.device != "cpu" or args.lora or args.accumulation > 1):
        raise TaidError("--floors is for a CPU, whole weights and one micro-batch.")


def make_setup(args: argparse.Namespace, objective: str) -> Setup:
    return Setup(
        kind=args.kind, scale=args.scale, student=args.student, teacher=args.teacher,
        layers=args.layers, objective=objective, dtype=args.dtype, device=args.device,
        batch_size=args.batch_size, accumulation=args.accumulation,
        sequence_length=args.sequence_length or SCALES[args.scale].sequence_length,
        answer_fraction=args.answer_fraction, threads=args.threads, lora=args.lora)


def measure(
    setup: Setup, implementations: Sequence[str], rounds: int, steps: int, together: bool = True
) -> Rows:
    """One row per implementation."""
    wanted = {name: "ce" if name in WITHOUT_TEACHER else setup.objective
              for name in implementations}
    references = references_of(setup, sorted(set(wanted.values())))
    found = run_all(setup, implementations, rounds, steps, together)
    ours = found.get("ours", {}).get("seconds")
    return [_row(setup, name, values, references[wanted[name]], ours if together else None)
            for name, values in found.items()]


def _row(
    setup: Setup, name: str, found: Found, want: Found, ours: Sequence[Sequence[float]] | None
) -> dict[str, Any]:
    about = {"implementation": name, **setup.described(), "note": NOTES.get(name),
             "answer_tokens": want.get("answer_tokens"), "tokens": want.get("tokens")}
    if "error" in found:
        return {**about, "error": found["error"]}
    times, cpu_times = ([seconds for one in found[key] for seconds in one]
                        for key in ("seconds", "cpu_seconds"))
    middle = median(times)
    ratios = [sum(a) / sum(b) for a, b in zip(found["seconds"], ours or [], strict=False)]
    return {
        **about, "seconds": middle, "seconds_spread": [min(times), max(times)],
        "cpu_seconds": median(cpu_times), "cpu_seconds_spread": [min(cpu_times), max(cpu_times)],
        "ratio_to_ours": median(ratios) if ratios else None,
        "ratio_spread": [min(ratios), max(ratios)] if ratios else None,
        "answer_tokens_per_second": want["answer_tokens"] / middle,
        "tokens_per_second": want["tokens"] / middle, "steps_timed": len(times),
        "peak_memory_bytes": found["peak_memory_bytes"], "weights_bytes": found["weights_bytes"],
        "parts": found["parts"], **_errors(found, want, TOLERANCES[setup.dtype])}


def _errors(found: Found, want: Found, tolerance: float) -> dict[str, Any]:
    """The first step's loss and gradient beside the reference's."""
    errors: dict[str, Any] = {"differs": want.get("error")}
    for key, said in (("loss", "loss"), ("grad_norm", "gradient's norm")):
        got, should = found.get(key), want.get(key)
        errors |= {key: got, f"reference_{key}": should, f"{key}_error": None}
        if got is None or should is None:
            continue
        errors[f"{key}_error"] = off = abs(got - should) / abs(should)
        if off > tolerance:
            told = f"its {said} is {got / should:.4g} times the reference's"
            errors["differs"] = f"{errors['differs']}; {told}" if errors["differs"] else told
    return errors


if __name__ == "__main__":
    try:
        main()
    except TaidError as problem:
        sys.exit(f"error: {problem}")
