"""Every body of the fused objective against float64, on one device.

    PYTHONPATH=.:scripts python -m bench.bodies --device cuda --json bodies.json

One row per body, objective and type of the hidden states: the gradients' errors as in
`bench_objective.py`, over two chunks. On CUDA logits are in float32 whatever that type is; on a CPU
those of bfloat16 are rounded, which `TOLERANCES` knows. The command fails where an error is larger.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import (
    Rows,
    check_device,
    check_names,
    conditions,
    described,
    names,
    number,
    parsed,
    reason,
)
from bench.implementations import FORMULAS
from bench.measure import gradient_errors, reference, step
from bench.problem import TAID_T, Case, Problem, make_problem
from taid_vlm.fused.bodies import BODIES
from taid_vlm.fused.divergence import FusedDivergence
from taid_vlm.fused.heads import Head
from taid_vlm.io.files import write_json
from taid_vlm.objectives import parse_objective

# of a gradient, relative to its largest element, by device and type
TOLERANCES = {("cuda", "float32"): 2e-5, ("cuda", "bfloat16"): 2.5e-3,
              ("cpu", "float32"): 2e-5, ("cpu", "bfloat16"): 3e-2}


def main(arguments: Sequence[str] | None = None) -> Rows:
    """Measure all, write and print the rows; exit status 1 if an error is too large."""
    parser = described(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--objective", type=names, default=list(FORMULAS), metavar="NAME[,NAME]")
    parser.add_argument("--vocab", type=number, default=151_936, metavar="V")
    parser.add_argument("--student-hidden", type=number, default=896, metavar="H")
    parser.add_argument("--teacher-hidden", type=number, default=3584, metavar="H")
    parser.add_argument("--answers", type=number, default=64, metavar="N")
    parser.add_argument("--threads", type=number, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parsed(parser, _check, arguments)
    about, rows = conditions(), []
    for dtype in ("float32", "bfloat16"):
        for objective in args.objective:
            rows += [{**row, "conditions": about} for row in compare(args, objective, dtype)]
            if args.json:
                write_json(rows, args.json)
    wrong = [row for row in rows if "error" in row]
    for row in wrong:
        print(f"{row['body']}, {row['objective']}, {row['dtype']}: {row['error']}")
    print(f"{len(rows) - len(wrong)} of {len(rows)} are exact")
    if wrong:
        sys.exit(1)
    return rows


def _check(args: Any) -> None:
    check_device(args.device)
    check_names(args, {"objective": FORMULAS})


def compare(args: Any, objective: str, dtype: str) -> Rows:
    """All bodies of the device on one problem."""
    case = Case(args.answers, args.answers, args.vocab, args.student_hidden, args.teacher_hidden,
                getattr(torch, dtype), objective, args.device)
    problem = make_problem(case)
    want = reference(problem, objective)
    budget = case.row_bytes * -(-case.answers // 2)
    tolerance = TOLERANCES[args.device, dtype]
    rows = []
    for body in BODIES[1:]:
        if body == "triton" and args.device == "cpu":
            continue  # there is none
        row = {"body": body, "objective": objective, "dtype": dtype, "device": args.device,
               "vocab": case.vocab, "answers": case.answers, "tolerance": tolerance}
        try:
            row |= gradient_errors(step(_Loss(objective, body, budget))(problem), want)
            if not row["gradient_error"] <= tolerance:
                row["error"] = f"off by {row['gradient_error']:.1e}, more than {tolerance:.1e}"
        except Exception as error:
            row["error"] = reason(error)
        rows.append(row)
    return rows


class _Loss:
    """The mean over the answers by one body."""

    def __init__(self, objective: str, body: str, budget: int) -> None:
        self.fused = FusedDivergence(parse_objective(objective), memory_budget=budget, body=body)
        self.t = TAID_T if objective == "taid" else None

    def __call__(self, problem: Problem) -> Tensor:
        total = self.fused(
            problem.student_hidden, Head(problem.student_head), problem.teacher_hidden,
            Head(problem.teacher_head), t=self.t).loss
        return total / len(problem.answers)


if __name__ == "__main__":
    main()
