"""Padded batches, batches by tokens, packed rows: tokens per second of processor time.

    python scripts/bench_packing.py --data gsm8k_train.jsonl --columns question,answer \\
        --tokenizer DIR/smollm2 --json packing.json

The real trainer on real records and small models with random weights: `--rows` records a batch, or
as many tokens as those are on average, each padded and packed. Every round draws its records anew
and has all arms take turns in it; the first step is not timed. Tokens are the student's, without
padding; `computed` is how many tokens the models are given for each of them. What it takes to know
the lengths is part of the time of batches by tokens, for each of their records.

With `--device cuda` seconds are the clock's, the device is waited for at the end of a step, and
models train under bfloat16 autocast; `--attention` then decides what rows that share a sequence
cost (sdpa computes the whole square and masks it).

`gradient` is the largest difference that an arm's gradient of the same records has from that of
padded batches, over its norm.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from bench.common import check_device, conditions, described, names, number, parsed
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from taid_vlm import DistillationConfig, DistillationTrainer
from taid_vlm.batch.lengths import Lengths
from taid_vlm.errors import TaidError

ARMS: dict[str, dict[str, Any]] = {
    "padded": {}, "packed": {"packing": True}, "by tokens": {"tokens": True},
    "by tokens, packed": {"tokens": True, "packing": True},
}
RATES = {"cpu": "tokens_per_cpu_second", "cuda": "tokens_per_second"}  # what is measured
CHECKED = 16  # records whose gradient is compared


class Timed(DistillationTrainer):
    """Counts what it is fed, and takes the time of its steps."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        side = inputs["student_inputs"]
        real = int(side["attention_mask"].sum())
        self.fed.append((real, real if self.args.packing else side["input_ids"].numel(),
                         inputs["counts"]["rows"]))
        return super().compute_loss(model, inputs, *args, **kwargs)


class Clock(TrainerCallback):
    """The time, and how many batches there were, at the end of every step."""

    def __init__(self, device: str) -> None:
        self.device, self.trainer = device, None
        self.ends: list[tuple[float, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append((_now(self.device), len(self.trainer.fed)))


class Bench:
    """One pair, one set of records, one size of batches."""

    def __init__(self, args: Any, folder: str) -> None:
        self.args, self.folder = args, folder
        self.tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        prompt, completion = args.columns
        lines = Path(args.data).read_text().splitlines()[: args.records]
        self.rows = [{"prompt": row[prompt] + "\n", "completion": row[completion]}
                     for row in map(json.loads, lines)]
        self.teacher, self.student = (self._model(width, layers, seed) for seed, (width, layers)
                                      in enumerate((args.teacher, args.student)))
        if args.device == "cuda":
            self.teacher.to(torch.bfloat16)
        lengths = Lengths(self.rows, self.trainer("padded", self.rows, 0).collator)
        start = _now(args.device)
        measured = [lengths.measure(i)[-1] for i in range(len(self.rows))]
        self.measuring = (_now(args.device) - start) / len(self.rows)
        self.tokens = round(args.rows * sum(measured) / len(measured))
        self.lengths = [min(measured), median(measured), max(measured)]

    def _model(self, width: int, layers: int, seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=len(self.tokenizer), hidden_size=width, intermediate_size=3 * width,
            num_hidden_layers=layers, num_attention_heads=width // 32,
            num_key_value_heads=width // 64, max_position_embeddings=4096,
            attn_implementation=self.args.attention)).to(self.args.device)

    def trainer(self, arm: str, rows: Any, seed: int, **options: Any) -> Timed:
        """A trainer of an arm, from the same weights every time."""
        kind = ARMS[arm]
        size = {"tokens_per_batch": self.tokens} if kind.get("tokens") else {
            "per_device_train_batch_size": self.args.rows}
        clock = Clock(self.args.device)
        config = DistillationConfig(self.folder, **{
            "objective": "forward_kl", "use_cpu": self.args.device == "cpu",
            "bf16": self.args.device == "cuda", "report_to": "none", "disable_tqdm": True,
            "save_strategy": "no", "logging_steps": 10**6, "dataloader_pin_memory": False,
            "seed": seed, "packing": kind.get("packing", False), **size, **options})
        trainer = Timed(copy.deepcopy(self.student), self.teacher, config, rows, None,
                        self.tokenizer, self.tokenizer, callbacks=[clock])
        trainer.fed, clock.trainer, trainer.clock = [], trainer, clock
        return trainer

    def round(self, arm: str, seed: int) -> dict[str, float]:
        """Tokens per second, and computed tokens for each of them."""
        trainer = self.trainer(arm, self.rows, seed, max_steps=1 + self.args.steps)
        trainer.train()
        (start, first), (end, last) = trainer.clock.ends[0], trainer.clock.ends[-1]
        real, computed, rows = (sum(x) for x in zip(*trainer.fed[first:last], strict=True))
        took = end - start + (rows * self.measuring if ARMS[arm].get("tokens") else 0.0)
        return {"rate": real / took, "computed": computed / real, "rows": rows}

    def gradient(self, arm: str) -> dict[str, torch.Tensor]:
        """Of one step over the same records."""
        rows = self.rows[:CHECKED]
        sgd = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0,
               "lr_scheduler_type": "constant"}
        batches = self.trainer(arm, rows, 0, max_steps=-1, num_train_epochs=1).budget.steps(1) \
            if ARMS[arm].get("tokens") else -(-CHECKED // self.args.rows)
        trainer = self.trainer(arm, rows, 0, max_steps=1, gradient_accumulation_steps=batches,
                               **sgd)
        trainer.train()
        return {name: (before - after).detach() for (name, before), after in zip(
            self.student.named_parameters(), trainer.model.parameters(), strict=True)}


def measured(bench: Bench, rounds: int) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for number_ in range(rounds):
        order = list(ARMS)[number_ % len(ARMS):] + list(ARMS)[: number_ % len(ARMS)]
        for arm in order:
            found[arm].append(bench.round(arm, number_))
    plain = bench.gradient("padded")
    norm = float(torch.stack([g.norm() for g in plain.values()]).norm())
    rows = []
    for arm, parts in found.items():
        rates = [part["rate"] for part in parts]
        ratios = [part["rate"] / base["rate"]
                  for part, base in zip(parts, found["padded"], strict=True)]
        other = bench.gradient(arm)
        rows.append({
            "arm": arm, RATES[bench.args.device]: median(rates),
            "spread": [min(rates), max(rates)],
            "ratio": median(ratios), "ratio_spread": [min(ratios), max(ratios)],
            "computed": median(part["computed"] for part in parts),
            "gradient": max(float((plain[n] - other[n]).abs().max()) for n in plain) / norm})
    return rows


def table(rows: list[dict[str, Any]], rate: str) -> str:
    title = rate.replace("_", " ").replace("cpu", "CPU")
    lines = [f"| batches | computed | {title} | x padded | gradient |", "|---|---|---|---|---|"]
    lines += [f"| {row['arm']} | {row['computed']:.2f} | {row[rate]:,.0f} "
              f"({row['spread'][0]:,.0f} to {row['spread'][1]:,.0f}) | {row['ratio']:.2f} "
              f"({row['ratio_spread'][0]:.2f} to {row['ratio_spread'][1]:.2f}) | "
              f"{row['gradient']:.1e} |" for row in rows]
    return "\n".join(lines)


def _now(device: str) -> float:
    """Seconds: of the processors; with a GPU, of the clock once it has done its work."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _check(args: Any) -> None:
    check_device(args.device)
    if len(args.columns) != 2:
        raise TaidError("--columns takes two names: of the prompt and of the completion.")
    for flag in ("data", "tokenizer"):
        if not Path(getattr(args, flag)).exists():
            raise TaidError(f"--{flag} '{getattr(args, flag)}' is not there.")


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = described(__doc__)
    parser.add_argument("--data", required=True, help="JSON lines")
    parser.add_argument("--columns", type=names, default=["prompt", "completion"])
    parser.add_argument("--tokenizer", required=True, help="a folder")
    parser.add_argument("--records", type=number, default=1024)
    parser.add_argument("--rows", type=number, default=8, help="records of a batch")
    parser.add_argument("--teacher", type=_shape, default=(256, 8), help="WIDTHxLAYERS")
    parser.add_argument("--student", type=_shape, default=(192, 6), help="WIDTHxLAYERS")
    parser.add_argument("--rounds", type=number, default=3)
    parser.add_argument("--steps", type=number, default=4, help="that are timed, of every round")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--attention", metavar="NAME", default="sdpa",
                        choices=("sdpa", "eager", "flex_attention", "flash_attention_2"))
    parser.add_argument("--threads", type=number, default=1)
    parser.add_argument("--json", type=Path)
    args = parsed(parser, _check, arguments)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        rows = [{**row, "tokens": bench.tokens, "lengths": bench.lengths,
                 "measuring_seconds": bench.measuring, "device": args.device,
                 "attention": args.attention, "conditions": conditions()}
                for row in measured(bench, args.rounds)]
    print(f"rows of {bench.lengths} tokens (least, median, most); {bench.tokens:,} a batch; "
          f"{1000 * bench.measuring:.2f} ms to know a record's lengths\n\n"
          f"{table(rows, RATES[args.device])}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def _shape(text: str) -> tuple[int, int]:
    width, layers = map(number, text.split("x"))
    return width, layers


if __name__ == "__main__":
    sys.exit(None if main() else 1)
