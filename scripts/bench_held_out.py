"""What held-out figures and the canary cost during a run, against forward passes alone, on a CPU.

    python scripts/bench_held_out.py --json held_out.json --markdown held_out.md

`evaluation` is `trainer.tally` (loading, collating, both models, all figures of every token) over
`forward`, both models' own forward passes with their heads at the answers, on batches that are
ready. `canary` is `trainer.look` of the student over its forward passes with the real image, a
blank one and another record's, with images that are ready. In seconds of processor time of the
process; the two take turns in every round, after one round that is not counted (what is compiled
is then there). --student and --teacher name models on disk in the place of the built-in pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from bench.common import (
    Rows,
    carry_out,
    check_names,
    conditions,
    described,
    markdown_table,
    names,
    number,
    parsed,
    write_asked,
)
from bench.step_output import conditions_line, title
from bench.step_setup import DTYPES, KINDS, SCALES, Setup, make_pair
from bench.step_trainers import TRAINERS
from bench.step_worker import be_quiet

from taid_vlm.batch.forward import student_forward, teacher_forward
from taid_vlm.evaluation import canary

COLUMNS = ("pair", "what", "tokens", "CPU s", "forward, CPU s", "x forward")


def main(arguments: Sequence[str] | None = None) -> Rows:
    """Measure every pair, print a table, write what was asked for; returns the rows."""
    args = parsed(make_parser(), check, arguments)
    be_quiet()
    cases = (measure(setup_of(args, kind, dtype), args.rounds)
             for kind in args.kinds for dtype in args.dtypes)
    return carry_out(cases, {**conditions(), "load": os.getloadavg()[0]},
                     conditions_line, table, partial(write_asked, args=args, page=page))


def make_parser() -> argparse.ArgumentParser:
    parser = described(__doc__)
    parser.add_argument("--kinds", type=names, default=list(KINDS), metavar="KIND[,KIND]")
    parser.add_argument("--dtypes", type=names, default=["float32", "bfloat16"],
                        metavar="TYPE[,TYPE]")
    parser.add_argument("--scale", choices=tuple(SCALES), default="short",
                        help="a built-in pair with random weights")
    parser.add_argument("--student", metavar="FOLDER")
    parser.add_argument("--teacher", metavar="FOLDER")
    parser.add_argument("--records", type=number, default=16)
    parser.add_argument("--sequence-length", type=number, default=256, metavar="TOKENS")
    parser.add_argument("--rounds", type=number, default=5)
    parser.add_argument("--threads", type=number, default=1)
    for flag in ("json", "markdown"):
        parser.add_argument(f"--{flag}", type=Path, metavar="FILE")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured; raises TaidError."""
    check_names(args, {"kinds": KINDS, "dtypes": DTYPES})


def setup_of(args: argparse.Namespace, kind: str, dtype: str) -> Setup:
    return Setup(kind=kind, dtype=dtype, scale=args.scale, student=args.student,
                 teacher=args.teacher, batch_size=args.records,
                 sequence_length=args.sequence_length)


def measure(setup: Setup, rounds: int) -> list[dict[str, Any]]:
    """One row for the evaluation, and one for the canary where there are images."""
    pair = make_pair(setup)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TRAINERS["ours"](setup, pair, folder, 1)
        trainer.place_student()
        records = [trainer.train_dataset[index] for index in range(setup.batch_size)]
        tokens, forward = _forward(trainer, pair.models["teacher"], records)
        found = [("evaluation", tokens, lambda: trainer.tally(records), forward)]
        if setup.kind == "vlm":
            found.append(("canary", *_canary(trainer, records)))
        return [{**setup.described(), "what": what, "answer_tokens": tokens,
                 **_compared(whole, alone, rounds)} for what, tokens, whole, alone in found]


def _forward(
    trainer: Any, teacher: Any, records: Sequence[Any]
) -> tuple[int, Callable[[], None]]:
    """Answer tokens, and both models' forward passes on the evaluation's own batches."""
    size = trainer.args.per_device_eval_batch_size
    batches = [trainer._prepare_inputs(trainer.data_collator(records[start : start + size]))
               for start in range(0, len(records), size)]

    @torch.no_grad()
    def forward() -> None:
        with trainer.accelerator.autocast():
            for batch in batches:
                student_forward(trainer.model, batch)
                teacher_forward(teacher, batch)

    return sum(int(batch["student_mask"].sum()) for batch in batches), forward


def _canary(
    trainer: Any, records: Sequence[Any]
) -> tuple[int, Callable[[], object], Callable[[], None]]:
    """Answer tokens, the student's canary, and its forward passes on the canary's own inputs."""
    adapter, options = trainer.collator.student, trainer.evaluation_options()
    chosen = canary.choose(records, len(records), trainer.collator)
    with _watched() as calls:
        figures = canary.canary(trainer.model, adapter, chosen, **options)

    @torch.no_grad()
    def forward() -> None:
        with trainer.accelerator.autocast():
            for call in calls:
                canary.answer_logits(*call)

    return figures["n_tokens"], lambda: canary.canary(
        trainer.model, adapter, chosen, **options), forward


@contextlib.contextmanager
def _watched() -> Iterator[list[Any]]:
    """What the canary asks its model."""
    calls, asked = list[Any](), canary.answer_logits

    def watched(*call: Any) -> Any:
        calls.append(call)
        return asked(*call)

    canary.answer_logits = watched
    try:
        yield calls
    finally:
        canary.answer_logits = asked


def _compared(
    whole: Callable[[], object], alone: Callable[[], object], rounds: int
) -> dict[str, Any]:
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds + 1):
        for name, work in (("whole", whole), ("forward", alone)):
            start = time.process_time()
            work()
            seconds[name].append(time.process_time() - start)
    ratios = [a / b for a, b in zip(seconds["whole"][1:], seconds["forward"][1:], strict=True)]
    return {"first_cpu_seconds": seconds["whole"][0], "rounds": rounds, "ratio": median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
            **{f"{name}_cpu_seconds": median(took[1:]) for name, took in seconds.items()}}


def table(rows: Rows) -> str:
    """Markdown."""
    return markdown_table(COLUMNS, map(_cells, rows))


def _cells(row: dict[str, Any]) -> list[str]:
    low, high = row["ratio_spread"]
    return [title(row).split(", ", 1)[1], row["what"], f"{row['answer_tokens']:,}",
            f"{row['whole_cpu_seconds']:.3g}", f"{row['forward_cpu_seconds']:.3g}",
            f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"]


def page(rows: Rows) -> str:
    return f"{conditions_line(rows[0])}\n\n{table(rows)}\n"


if __name__ == "__main__":
    main()
