"""`taid-vlm export`: benchmarks as tables for VLMEvalKit."""

from __future__ import annotations

from pathlib import Path

from taid_vlm.commands.options import Many, Options, option, positional


class ExportOptions(Options):
    tasks: Many = positional(
        "benchmarks, or YAML files that describe one", "TASK[=DATA]", many=True)
    output_dir: Path = option(default=...)


def run(options: ExportOptions) -> None:
    from taid_vlm.benchmarks.asking import open_tasks
    from taid_vlm.benchmarks.harness.vlmevalkit import export_tsv

    for task in open_tasks(options.tasks):
        print(export_tsv(task.questions, options.output_dir / f"{task.benchmark.name}.tsv"))
