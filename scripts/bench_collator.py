"""The collator: tokens per second of processor time, against another checkout and the tokenizers.

    python scripts/bench_collator.py --teacher DIR/smollm2 --student DIR/qwen3 \\
        --against ../before --json collator.json --markdown collator.md

Rows are conversations without a template, half question and half answer: prose and code of this
repository, and sentences in many scripts. Everything from rows in memory to the batch for both
models is timed; tokens are the student's, without padding. Seconds are those of the processor, of
one process: a data loader's worker. `tokenizers` is what the two tokenizers take for the same texts
alone, and `images` compares with the two processors alone (LLaVA's, a picture of 640x480 pixels
in every row, 576 tokens).

`--against` names another checkout; both are measured in processes of their own that take turns,
round by round, so that a busy machine is busy for both. Figures are medians over rounds, with the
lowest and highest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from bench.common import (
    Rows,
    carry_out,
    conditions,
    described,
    number,
    numbers,
    parsed,
    write_asked,
)
from bench.step_rows import make_rows
from bench.step_setup import SCALES, Setup, make_processor
from transformers import PreTrainedTokenizerFast

from taid_vlm.adapters import ModelAdapter, make_adapter
from taid_vlm.alignment import pair_models
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.errors import TaidError
from taid_vlm.records import Record, parse_record

ROOT = Path(__file__).parents[1]
BATCH, IMAGES, PICTURE = 4, "images", (640, 480)
SENTENCES = ("吾輩は猫である。名前はまだ無い。", "请描述這張圖片：左邊是紅色。",
             "كيف حالك؟ عندي ٣ كتب.", "Straße, déjà-vu, señor. Привет!",
             "안녕하세요. नमस्ते दुनिया।", "👩‍🚀🚀 😂 ✅ 12,345.67")
Case = tuple[str, int]


def main(arguments: Sequence[str] | None = None) -> Rows:
    """Measure every case, print a table, write what was asked for; returns the rows."""
    args = parsed(make_parser(), check, arguments)
    if args.worker:
        work(args)
        return []
    return carry_out([measure(args)], conditions(), lambda row: row["conditions"]["processor"],
                     table, partial(write_asked, args=args, page=page))


def make_parser() -> argparse.ArgumentParser:
    parser = described(__doc__)
    for role in ("teacher", "student"):
        parser.add_argument(f"--{role}", type=Path, required=True, metavar="FOLDER",
                            help="with tokenizer.json, as scripts/fetch_real.py writes them")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    parser.add_argument("--tokens", type=numbers, default=[256, 1024, 4096], metavar="N[,N]",
                        help="of a row, about")
    parser.add_argument("--rows", type=number, default=16, metavar="N")
    parser.add_argument("--rounds", type=number, default=5, metavar="N")
    parser.add_argument("--threads", type=number, default=1, metavar="N")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    for name in ("json", "markdown"):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is measured; raises TaidError."""
    for role in ("teacher", "student"):
        if not (getattr(args, role) / "tokenizer.json").is_file():
            raise TaidError(f"--{role} {getattr(args, role)} holds no tokenizer.json.")
    if args.against is not None and not (args.against / "taid_vlm").is_dir():
        raise TaidError(f"--against {args.against} is no checkout of this repository.")


# ----- one process: what is measured ----------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    """A round for every line read: seconds and tokens of each case, as a line of JSON."""
    cases = make_cases(args)
    for run in cases.values():
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps([[*case, *run()] for case, run in cases.items()]), flush=True)


def make_cases(args: argparse.Namespace) -> dict[Case, Callable[[], tuple[float, float, int]]]:
    """(kind, tokens of a row) -> seconds of the collator, of what it calls, and tokens."""
    models = [make_adapter(PreTrainedTokenizerFast.from_pretrained(getattr(args, role)), role)
              for role in ("teacher", "student")]
    collator = collator_of(*models)
    cases: dict[Case, Any] = {}
    for kind, text in texts().items():
        for tokens in args.tokens:
            rows = make_records(text, tokens, args.rows, models[1])
            cases[kind, tokens] = partial(one_round, collator, rows, bare_text)
    processors = [make_processor(Setup(kind="vlm", scale="medium")) for _ in range(2)]
    seeing = collator_of(*(make_adapter(processor, role) for processor, role in
                           zip(processors, ("teacher", "student"), strict=True)))
    rows = [parse_record(row | {"images": [row["images"][0].resize(PICTURE)]}, "row")
            for row in make_rows(processors[0], BATCH, 1024, 0.25, (SCALES["medium"].image_side,))]
    cases[IMAGES, 1024] = partial(one_round, seeing, rows, bare_images)
    return cases


def collator_of(teacher: ModelAdapter, student: ModelAdapter) -> DistillationCollator:
    pairing = pair_models(teacher, student, len(teacher.table), len(student.table))
    return DistillationCollator(student, teacher, pairing)


def texts() -> dict[str, str]:
    files = {"prose": [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))],
             "code": sorted((ROOT / "taid_vlm").rglob("*.py"))}
    rng = random.Random(0)
    return {**{kind: "".join(path.read_text() for path in paths) for kind, paths in files.items()},
            "scripts": " ".join(rng.choices(SENTENCES, k=20_000))}


def make_records(text: str, tokens: int, count: int, model: ModelAdapter) -> list[Record]:
    """Pieces of a text of about so many of a model's tokens, from random places."""
    sample, rng = text[:20_000], random.Random(tokens)
    half = round(tokens / 2 * len(sample) / len(model.tokenizer(sample)["input_ids"]))
    places = [rng.randrange(len(text) - 2 * half) for _ in range(count)]
    pieces = [(text[at : at + half].replace("<image>", ""),
               text[at + half : at + 2 * half].replace("<image>", "")) for at in places]
    return [parse_record({"prompt": question.strip() + "\n", "completion": answer.strip()}, "row")
            for question, answer in pieces]


def one_round(
    collator: DistillationCollator, rows: list[Record], bare: Callable[[Any, Any], None]
) -> tuple[float, float, int]:
    batches = [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]
    start = time.process_time()
    done = [collator(batch) for batch in batches]
    seconds = time.process_time() - start
    tokens = sum(int(batch["student_inputs"]["attention_mask"].sum()) for batch in done)
    assert all(batch["counts"]["rows"] == BATCH for batch in done), done[0]["counts"]
    shown = [[(model, model.render(row).text, [image.load() for image in row.images])
              for row in batch] for batch in batches for model in collator.adapters]
    start = time.process_time()
    for part in shown:
        bare(part[0][0], part)
    return seconds, time.process_time() - start, tokens


def bare_text(model: ModelAdapter, part: list[Any]) -> None:
    model.tokenizer([text for _, text, _ in part], padding=True, return_tensors="pt")


def bare_images(model: ModelAdapter, part: list[Any]) -> None:
    model.processor(text=[text for _, text, _ in part], images=[seen for _, _, seen in part],
                    padding=True, return_tensors="pt")


# ----- all processes --------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> Rows:
    """A row per checkout and case."""
    places = {"this": ROOT, **({"against": args.against.resolve()} if args.against else {})}
    workers = {name: start(place, args) for name, place in places.items()}
    rounds: dict[str, list[Any]] = {name: [] for name in places}
    for _ in range(args.rounds):
        for name, worker in workers.items():
            rounds[name].append(ask(worker, "go"))
    for worker in workers.values():
        worker.communicate()
    return [summary(args, name, [one[index] for one in rounds[name]])
            for name in places for index in range(len(rounds[name][0]))]


def start(checkout: Path, args: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--worker", "--teacher", str(args.teacher.resolve()),
               "--student", str(args.student.resolve()), "--rows", str(args.rows),
               "--tokens", ",".join(map(str, args.tokens)), "--threads", str(args.threads)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": str(checkout)})
    assert worker.stdout is not None
    if worker.stdout.readline().strip() != "ready":
        raise SystemExit(f"the process of {checkout} ended before it measured anything.")
    return worker


def ask(worker: subprocess.Popen[str], question: str) -> list[Any]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    print(question, file=worker.stdin, flush=True)
    return json.loads(worker.stdout.readline())


def summary(args: argparse.Namespace, name: str, rounds: list[Any]) -> dict[str, Any]:
    kind, length = rounds[0][:2]
    speeds = sorted(tokens / seconds for *_, seconds, _, tokens in rounds)
    return {
        "checkout": name, "teacher": args.teacher.name, "student": args.student.name, "kind": kind,
        "row_tokens": length, "tokens_per_cpu_second": median(speeds),
        "spread": [speeds[0], speeds[-1]],
        "ratio_to_bare": median(seconds / bare for *_, seconds, bare, _ in rounds)}


def table(rows: Rows) -> str:
    lines = ["| checkout | rows | tokens a row | tokens / CPU s (lowest to highest) | x bare |",
             "|---|---|---|---|---|"]
    for row in rows:
        low, high = (f"{value:,.0f}" for value in row["spread"])
        lines.append(f"| {row['checkout']} | {row['kind']} | {row['row_tokens']:,} | "
                     f"{row['tokens_per_cpu_second']:,.0f} ({low} to {high}) | "
                     f"{row['ratio_to_bare']:.2f} |")
    return "\n".join(lines)


def page(rows: Rows) -> str:
    return f"{table(rows)}\n"


if __name__ == "__main__":
    main()
