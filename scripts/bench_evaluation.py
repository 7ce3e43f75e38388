"""Evaluation: seconds of processor time against plain loops over the same rows.

    python scripts/bench_evaluation.py --scale short --rows 32 --rounds 5 \\
        --json evaluation.json --markdown evaluation.md

`evaluate` is the whole command, from questions to answers on disk and figures, but for what is done
once for a model, however many the questions: reading its tokenizer, loading and hashing its weights
(`once`, in seconds, without loading).
`plain` is a loop of the processor, `generate` and `batch_decode` over the same rows in the same
batches. For choices, `plain` is every choice as a row of its own. The models have random weights
and write to their limit, so that both compute the same; rounds take turns. `server` is wall time
against the least that so many requests at once can take, with a server that answers after a while
and pictures to be made ready meanwhile.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from bench.common import Rows, carry_out, conditions, described, number, parsed, write_asked
from bench.step_setup import SCALES, Setup, make_pair
from PIL import Image

from taid_vlm.benchmarks import evaluate as module
from taid_vlm.benchmarks import likelihood
from taid_vlm.benchmarks.answering import plan_batches
from taid_vlm.benchmarks.asking import Asking, Task
from taid_vlm.benchmarks.candidates import Candidate, LocalModel
from taid_vlm.benchmarks.choices import choice_rules
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.config.data import DataSource
from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import TaidError, nearest
from taid_vlm.io.endpoint import Endpoint
from taid_vlm.records import ImageRef

PICTURE, BATCH, WORDS = (640, 480), 8, (20, 120)
COLUMNS = ("case", "evaluate, s", "plain, s", "ratio")
CHOICES = ("a red square on the left", "two blue circles", "nothing at all", "a green triangle")
Timed = tuple[Callable[[], Any], Callable[[], Any]]


def main(arguments: Sequence[str] | None = None) -> Rows:
    """Measure every case, print a table, write what was asked for; returns the rows."""
    args = parsed(make_parser(), check, arguments)
    with tempfile.TemporaryDirectory() as folder:
        return carry_out(([row] for row in measure(args, Path(folder))), conditions(),
                         lambda row: row["conditions"]["processor"], table,
                         partial(write_asked, args=args, page=page))


def make_parser() -> argparse.ArgumentParser:
    parser = described(__doc__)
    parser.add_argument("--scale", default="short", metavar="NAME", help=", ".join(SCALES))
    parser.add_argument("--rows", type=number, default=32, metavar="N")
    parser.add_argument("--tokens", type=number, default=24, metavar="N", help="of an answer")
    parser.add_argument("--rounds", type=number, default=5, metavar="N")
    parser.add_argument("--threads", type=number, default=1, metavar="N")
    for name in ("json", "markdown"):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is measured; raises TaidError."""
    if args.scale not in SCALES:
        raise TaidError(f"--scale {args.scale!r}.{nearest(args.scale, SCALES)}")


def measure(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    for kind in ("text", "vlm"):
        pair = make_pair(Setup(kind=kind, scale=args.scale), ("student",))
        model, processor = pair.models["student"].eval(), pair.processors["student"]
        model.save_pretrained(folder / kind)
        processor.save_pretrained(folder / kind)
        questions = make_questions(args.rows, kind == "vlm")
        yield {"case": f"{kind}: once", **once(folder / kind)}
        for case, timed in cases(args, folder / kind, model, processor, questions).items():
            yield {"case": f"{kind}: {case}", **against(timed, args.rounds)}
    yield {"case": "server", **server(args, folder)}


def make_questions(count: int, seen: bool) -> list[Question]:
    """Questions of many lengths; pictures as PNG, to be decoded each time."""
    rng = random.Random(0)
    found = []
    for index in range(count):
        text = " ".join(rng.choice(("red", "square", "left", "what", "is", "the", "blue"))
                        for _ in range(rng.randint(*WORDS)))
        images = (ImageRef(picture(index), f"row {index}"),) if seen else ()
        found.append(Question(f"q{index}", (*[None] * len(images), text), images, ("A",), CHOICES))
    return found


def picture(seed: int) -> bytes:
    small = Image.frombytes("RGB", (32, 24), random.Random(seed).randbytes(32 * 24 * 3))
    data = io.BytesIO()
    small.resize(PICTURE, Image.Resampling.BICUBIC).save(data, "PNG")
    return data.getvalue()


def cases(args: argparse.Namespace, folder: Path, model: Any, processor: Any,
          questions: list[Question]) -> dict[str, Timed]:
    local = LocalModel(ModelSpec(str(folder)))
    described = {"name": str(folder), **local.identity}

    def ours(whole_rows: bool = False, **asking: Any) -> None:
        endings = (lambda *args: None) if whole_rows else likelihood._endings
        with tempfile.TemporaryDirectory() as output, \
                mock.patch.object(module, "load_model", return_value=model), \
                mock.patch.object(module, "prepare", return_value=local), \
                mock.patch.object(local, "describe", return_value=described), \
                mock.patch.object(likelihood, "_endings", endings):
            evaluation(folder, questions, output, Asking(batch_size=BATCH, **asking))

    def choosing(by: str, whole_rows: bool) -> None:
        ours(whole_rows, method="likelihood", choose_by=by)

    return {"generate": (partial(ours, max_new_tokens=args.tokens),
                         partial(plain, model, processor, questions, args.tokens)),
            **{f"choose by {by}": (partial(choosing, by, False), partial(choosing, by, True))
               for by in ("letter", "text")}}


def once(folder: Path) -> dict[str, Any]:
    def read() -> None:
        LocalModel(ModelSpec(str(folder))).describe()

    read()
    return {"evaluate": seconds(read), "plain": None, "ratio": None, "spread": None}


def evaluation(source: Any, questions: list[Question], output: str, asking: Asking) -> None:
    benchmark = Benchmark("bench", "bench", lambda row: [], choice_rules(), likelihood=True)
    task = Task(benchmark, benchmark.rules[0], DataSource("bench"), questions)
    source = ModelSpec(str(source)) if isinstance(source, Path) else source
    module.evaluate([Candidate("model", source)], [task], output, asking)


@torch.inference_mode()
def plain(model: Any, processor: Any, questions: list[Question], tokens: int) -> list[str]:
    """What a script does: template, processor, `generate`, decode."""
    answers: list[str] = []
    for batch in plan_batches(questions, BATCH):
        messages = [[{"role": "user", "content": [
            {"type": "image"} if part is None else {"type": "text", "text": part}
            for part in question.prompt]}] for question in batch]
        pictures = [[image.load() for image in question.images] for question in batch]
        if not any(pictures):
            messages = [[{"role": "user", "content": each[0]["content"][0]["text"]}]
                        for each in messages]
        texts = [processor.apply_chat_template(each, tokenize=False, add_generation_prompt=True)
                 for each in messages]
        seen = {"images": pictures} if any(pictures) else {}
        inputs = processor(text=texts, padding=True, padding_side="left", return_tensors="pt",
                           **seen)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        answers += processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:],
                                          skip_special_tokens=True)
    return answers


def against(timed: Timed, rounds: int) -> dict[str, Any]:
    """Processor seconds of both in turns; the ratio is that of a round."""
    for run in timed:
        run()
    each = [[seconds(run) for run in timed] for _ in range(rounds)]
    ratios = [ours / theirs for ours, theirs in each]
    return {"evaluate": median(ours for ours, _ in each), "plain": median(p for _, p in each),
            "ratio": median(ratios), "spread": [min(ratios), max(ratios)]}


def seconds(run: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    since = clock()
    run()
    return clock() - since


def server(args: argparse.Namespace, folder: Path, wait: float = 0.1) -> dict[str, Any]:
    """Wall seconds against `wait` for every BATCH requests at once."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(wait)
            data = json.dumps({"choices": [{"message": {"content": "A"}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    questions = make_questions(args.rows, True)
    end = Endpoint(f"http://127.0.0.1:{http.server_port}/v1", "model")
    taken = []
    for index in range(args.rounds):
        run = partial(evaluation, end, questions, str(folder / f"served{index}"),
                      Asking(batch_size=BATCH))
        taken.append(seconds(run, time.perf_counter))
    http.shutdown()
    http.server_close()
    least = wait * -(-len(questions) // BATCH)
    ratios = [each / least for each in taken]
    return {"evaluate": median(taken), "plain": least, "ratio": median(ratios),
            "spread": [min(ratios), max(ratios)]}


# ----- output -------------------------------------------------------------------------------


def table(rows: Rows) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        low, high = row["spread"] or (0, 0)
        compared = f"{row['plain']:.2f} | {row['ratio']:.2f} ({low:.2f} to {high:.2f})" \
            if row["ratio"] else " | "
        lines.append(f"| {row['case']} | {row['evaluate']:.2f} | {compared} |")
    return "\n".join(lines)


def page(rows: Rows) -> str:
    return f"{table(rows)}\n"


if __name__ == "__main__":
    main()
