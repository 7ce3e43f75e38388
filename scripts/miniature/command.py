"""The command line: what to measure and how large, and what is written."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from miniature.crew import carry_out
from miniature.page import markdown, miniature_report
from miniature.parts import (
    NEEDS_LANGUAGE,
    PARTS,
    Outcome,
    Plan,
    assemble,
    first_round,
    second_round,
)
from miniature.scale import SCALES, Scale
from taid_vlm.demo.demo import data_folder
from taid_vlm.errors import TaidError, nearest
from taid_vlm.io.files import write_json, write_text
from taid_vlm.io.folders import refuse_file_in_the_way
from taid_vlm.report import write_report
from taid_vlm.runs.machine import machine, peak_memory, versions


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, write `results.json`, `report.html` and `table.md`; returns the results."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        plan = make_plan(args)
    except TaidError as error:
        parser.error(str(error))
    started = time.perf_counter()
    _determinism(plan.scale.exact.device)
    outcome, cpu_seconds = carry_out_plan(plan, args.workers)
    command = " ".join(["python scripts/miniature.py", *(
        sys.argv[1:] if arguments is None else arguments)])
    document = {
        "schema": 1, "kind": "miniature", "command": command,
        "scale": _scale(plan.scale), "parts": outcome.parts,
        "claims": [claim.as_json() for claim in outcome.claims],
        "seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds,
        "workers": args.workers, "memory": peak_memory(), "machine": machine(),
        "versions": versions(),
    }
    write_json(document, plan.output / "results.json")
    write_text(markdown(document), plan.output / "table.md")
    write_report(miniature_report(document), plan.output / "report.html")
    print(closing(document, plan.output))
    return document


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="A miniature of the TAID paper: what it claims, measured in minutes.",
        epilog="The exact language runs on a GPU with --scale gpu; the small models always run in "
               "processes of one CPU thread each.")
    parser.add_argument("--scale", choices=tuple(SCALES), default="cpu")
    parser.add_argument("--parts", type=lambda text: tuple(text.split(",")), default=PARTS,
                        metavar="NAME[,NAME]", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--seeds", type=int, metavar="N", help="of the exact language")
    parser.add_argument("--steps", type=int, metavar="N", help="of the exact language")
    parser.add_argument("--model-seeds", type=int, metavar="N", help="of scenes and plain text")
    parser.add_argument("--model-steps", type=int, metavar="N", help="of scenes and plain text")
    parser.add_argument("--records", type=int, metavar="N", help="held out, scenes and plain text")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), metavar="N",
                        help="processes (default: as many as cores); 0: none but this one")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/miniature"), metavar="DIR")
    return parser


def make_plan(args: argparse.Namespace) -> Plan:
    """Refuse what cannot work before anything is measured; raises TaidError."""
    for name in args.parts:
        if name not in PARTS:
            raise TaidError(f"--parts {name!r}.{nearest(name, PARTS)}")
    for flag, least in (("seeds", 2), ("steps", 1), ("model_seeds", 2), ("model_steps", 1),
                        ("records", 2), ("workers", 0)):
        given = getattr(args, flag)
        if given is not None and given < least:
            why = " (an interval over seeds needs two)" if "seeds" in flag else ""
            raise TaidError(f"--{flag.replace('_', '-')} {given}, but it must be at least {least}"
                            f"{why}.")
    scale = resized(SCALES[args.scale], args)
    if scale.exact.device == "cuda" and not torch.cuda.is_available():
        raise TaidError("--scale gpu, but this machine has no CUDA device. Take --scale cpu.")
    refuse_file_in_the_way(args.output_dir)
    asked = set(args.parts) | ({"language"} if set(args.parts) & set(NEEDS_LANGUAGE) else set())
    return Plan(scale, tuple(part for part in PARTS if part in asked), data_folder(),
                args.output_dir)


def resized(scale: Scale, args: argparse.Namespace) -> Scale:
    """The scale with what the command line says otherwise."""
    exact = {"seeds": args.seeds, "steps": args.steps}
    models = {"seeds": args.model_seeds, "steps": args.model_steps, "records": args.records}
    return Scale(replace(scale.exact, **{k: v for k, v in exact.items() if v is not None}),
                 replace(scale.models, **{k: v for k, v in models.items() if v is not None}))


def _scale(scale: Scale) -> dict[str, Any]:
    found, exact = asdict(scale), scale.exact
    found["exact"] |= {"warm_steps": exact.warm_steps, "teacher_steps": exact.teacher_steps}
    return found


def carry_out_plan(plan: Plan, workers: int) -> tuple[Outcome, float]:
    """Both rounds of jobs, and what they amount to with the CPU seconds they took."""
    found, first = carry_out(first_round(plan), workers, "round 1 of 2")
    again, second = carry_out(second_round(plan, found), workers, "round 2 of 2")
    return assemble(plan, {**found, **again}), first + second


def _determinism(device: str) -> None:
    """One thread, and on a GPU matrix products that come out the same every time."""
    torch.set_num_threads(1)
    if device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def closing(document: dict[str, Any], output: Path) -> str:
    lines = [f"\n{c['verdict']:<16}{c['part']}: {c['claim']}" for c in document["claims"]]
    return "".join(lines) + (
        f"\n\n{document['seconds']:.0f} s ({document['cpu_seconds']:.0f} s of CPU). "
        f"Report: {output / 'report.html'}")
