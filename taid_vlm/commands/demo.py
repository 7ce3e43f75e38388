"""`taid-vlm demo`: two small worlds, offline; or a real language model from a package."""

from __future__ import annotations

from pathlib import Path

from taid_vlm.commands.options import Options, option
from taid_vlm.errors import TaidError


class DemoOptions(Options):
    output_dir: Path | None = option("default runs/demo, with --real runs/demo-real")
    real: bool = option("SmolLM2-135M-Instruct and a student with half its layers instead of the "
                        "small worlds; docs/demo.md says what it needs", default=False)
    train_teacher: bool = option(
        "train the shipped teachers and warm starts again first", default=False)
    seed: int = option("of the data order of every arm", default=0)


def run(options: DemoOptions) -> None:
    from taid_vlm.demo.demo import run_demo

    if options.real and options.train_teacher:
        raise TaidError("--train-teacher has no effect with --real, whose teacher comes from a "
                        "package; take one of the two out.")
    output = options.output_dir or Path("runs/demo-real" if options.real else "runs/demo")
    run_demo(output, options.seed, options.train_teacher, options.real)
