"""`taid-vlm demo`: two small worlds, offline."""

from __future__ import annotations

from pathlib import Path

from taid_vlm.commands.options import Options, option


class DemoOptions(Options):
    output_dir: Path = option(default=Path("runs/demo"))
    train_teacher: bool = option(
        "train the shipped teachers and warm starts again first", default=False)
    seed: int = option("of the data order of every arm", default=0)


def run(options: DemoOptions) -> None:
    from taid_vlm.demo.demo import run_demo

    run_demo(options.output_dir, seed=options.seed, train_teacher=options.train_teacher)
