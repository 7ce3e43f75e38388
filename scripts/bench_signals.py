"""What a teacher's signal costs and what it gives: the same student, records and seed on each.

    python scripts/fetch_real.py REAL --only smollm2_model
    python scripts/bench_signals.py --teacher REAL/smollm2_model --data gsm8k_train.jsonl \\
        --folder runs/signals --vllm VENV/bin/python

The student is the teacher without every other layer (`taid-vlm shrink`). Every arm trains it for as
many steps on one form of the teacher's signal, in a process of its own; caches are built in one,
too. Whatever an arm trained on, its student is then measured against the teacher itself, on
held-out records. --data has the columns that --columns names; of its records that have at most
--characters the first are trained on, the next held out. An arm that is finished is kept in
--folder, so that the same command goes on where it broke off. --vllm names the Python of an
environment that scripts/setup_vllm_cpu.py made; without it the served arm is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from bench.arms import Tree, built, fresh, measured, trained
from bench.common import conditions, described, markdown_table, names, number, parsed
from bench.server import Server
from safetensors.torch import load_file

from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import TaidError, nearest
from taid_vlm.io.files import read_json, write_json, write_text
from taid_vlm.students.shrink import shrink
from taid_vlm.teachers.sparse import Signal

BATCH, K, DRAWS = 2, 64, 12


@dataclass(frozen=True)
class Arm:
    """One form of the signal. cache: dtype of hidden states, and what is kept; refused: the
    objectives that it cannot be trained with; side: of the padding."""

    title: str
    cache: tuple[str, Signal] | None = None
    served: bool = False
    refused: frozenset[str] = frozenset()
    side: str = "right"


ARMS = {
    "live": Arm("the teacher itself"),
    "live-left": Arm("the teacher itself, padded on the left", side="left"),
    "float32": Arm("cached hidden states, float32", ("float32", Signal())),
    "topk": Arm(f"cached top {K} with the rest", ("auto", Signal("topk", K))),
    "sampled": Arm(f"cached {DRAWS} draws", ("auto", Signal("sampled", DRAWS)),
                   refused=frozenset({"taid"})),
    "bfloat16": Arm("cached hidden states, bfloat16", ("bfloat16", Signal())),
    "served": Arm(f"served by vLLM, top {K} with the rest", served=True),
    "none": Arm("no teacher (SFT)", refused=frozenset({"taid"})),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = described(__doc__)
    parser.add_argument("--teacher", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--columns", type=names, default=["question", "answer"])
    parser.add_argument("--characters", type=number, default=300)
    parser.add_argument("--folder", type=Path, required=True, help="everything goes there")
    parser.add_argument("--output", type=Path, metavar="FILE", help="FILE.md and FILE.json")
    parser.add_argument("--arms", type=names, default=list(ARMS))
    parser.add_argument("--objectives", type=names, default=["forward_kl"])
    parser.add_argument("--steps", type=number, default=100)
    parser.add_argument("--held-out", type=number, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=number, default=15, help="that the student keeps")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON")
    parser.add_argument("--threads", type=number)
    options = parsed(parser, _check, arguments)
    prepare(options)
    for objective in options.objectives:
        for name in options.arms:
            if objective in ARMS[name].refused or (ARMS[name].served and not options.vllm):
                continue
            place = options.folder / objective / f"{name}.json"
            if place.is_file():
                print(f"{objective}, {name}: there already", flush=True)
                continue
            print(f"{objective}, {name}", flush=True)
            write_json(carry_out(options, objective, name), place)
            write(options, arguments)
    write(options, arguments)
    return 0


def _check(options: argparse.Namespace) -> None:
    for name in options.arms:
        if name not in ARMS:
            raise TaidError(f"--arms {name!r}.{nearest(name, ARMS)}")
    if options.steps * BATCH < 1 or not options.data.is_file():
        raise TaidError(f"--data = '{options.data}' is no file.")


# ----- what all arms share ------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> None:
    """Student, records and the student's figures before training; what is there is kept, where it
    was made with the same options."""
    folder = options.folder
    settings = {key: str(getattr(options, key)) for key in (
        "teacher", "data", "characters", "steps", "held_out", "learning_rate", "seed", "layers")}
    if not (folder / "settings.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(settings, folder / "settings.json")
    if (before := read_json(folder / "settings.json", "settings")) != settings:
        other = next(key for key in settings if before.get(key) != settings[key])
        raise SystemExit(f"--folder = '{folder}' holds arms with another --{other} = "
                         f"{before.get(other)}; choose another folder.")
    _write_records(options)
    if not (folder / "student").is_dir():
        print("the student", flush=True)
        print(shrink(ModelSpec(model_name_or_path=str(options.teacher), dtype="auto"),
                     folder / "student", layers=options.layers).table(), flush=True)
    if not (folder / "before.json").is_file():
        print("held-out figures before training", flush=True)
        write_json(fresh(measured, recipe(options, "forward_kl", "live", held_out=True)),
                   folder / "before.json")


def _write_records(options: argparse.Namespace) -> None:
    prompt, answer = options.columns
    rows = (json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines())
    fit = [{"prompt": row[prompt], "completion": row[answer]} for row in rows
           if len(row[prompt]) + len(row[answer]) <= options.characters]
    learned, more = options.steps * BATCH, options.held_out
    if len(fit) < learned + more:
        raise SystemExit(f"--data: {len(fit)} records have at most {options.characters} characters,"
                         f" but {learned + more} are needed.")
    for name, part in (("train", fit[:learned]), ("held_out", fit[learned:learned + more])):
        write_text("".join(json.dumps(row) + "\n" for row in part),
                   options.folder / f"{name}.jsonl")


def recipe(options: argparse.Namespace, objective: str, name: str, /, held_out: bool = False,
           **sections: Any) -> Tree:
    """One arm's recipe as a tree; held-out records are measured afterwards, of all arms alike."""
    folder = options.folder
    tree = {
        "teacher": {"model_name_or_path": str(options.teacher)}, "student": str(folder / "student"),
        "data": {"train": str(folder / "train.jsonl")} | (
            {"eval": str(folder / "held_out.jsonl")} if held_out else {}),
        "objective": objective, "output_dir": str(folder / objective / name),
        "train": {"max_steps": options.steps, "per_device_train_batch_size": BATCH,
                  "per_device_eval_batch_size": BATCH, "learning_rate": options.learning_rate,
                  "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "logging_steps": 1,
                  "save_strategy": "no", "seed": options.seed, "use_cpu": True,
                  "padding_side": ARMS[name].side},
        **sections}
    return {key: value for key, value in tree.items() if value is not None}


# ----- one arm ------------------------------------------------------------------------------


def carry_out(options: argparse.Namespace, objective: str, name: str) -> Tree:
    """Its cache or server, its training and its figures."""
    arm, result = ARMS[name], Tree()
    sections: Tree = {}
    if arm.cache is not None:
        place = options.folder / "caches" / name
        if not (place.parent / f"{name}.json").is_file():
            shutil.rmtree(place, ignore_errors=True)
            write_json(fresh(built, recipe(options, objective, name), place, *arm.cache),
                       place.parent / f"{name}.json")
        result["cache"] = read_json(place.parent / f"{name}.json", "a cache's figures")
        sections["teacher"] = {"cache": str(place)}
    if name == "none":
        sections |= {"objective": "ce", "teacher": None}
    with contextlib.ExitStack() as stack:
        server = None
        if arm.served:
            server = stack.enter_context(served(options))
            sections["teacher"] = {"processor_name_or_path": str(options.teacher), "server": {
                "url": server.url, "model": "teacher", "top_logprobs": K}}
            before = server.cpu_seconds()
        result["train"] = fresh(trained, recipe(options, objective, name, **sections))
        if server is not None:
            result["server"] = {"cpu_seconds": server.cpu_seconds() - before,
                                "peak_rss_bytes": server.peak_rss(), "version": server.version}
    output = options.folder / objective / name
    result["held_out"] = fresh(measured, recipe(
        options, objective, name, held_out=True, student=str(output / "student")))
    live = options.folder / objective / "live" / "student"
    if live.is_dir() and name != "live":
        result["weights_apart"] = _apart(live, output / "student")
    if name != "live":
        shutil.rmtree(output / "student")
    return result


def _apart(one: Path, other: Path) -> float:
    """Largest difference of two students' weights."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return max(float((first[name] - second[name]).abs().max()) for name in first)


# ----- a server -----------------------------------------------------------------------------


@contextlib.contextmanager
def served(options: argparse.Namespace) -> Iterator[Server]:
    server = Server(options.vllm, options.teacher, options.folder / "vllm.log")
    try:
        server.wait()
        yield server
    finally:
        server.stop()


# ----- output -------------------------------------------------------------------------------


COLUMNS = """\
Held-out KL (nats) and agreement (of the most likely token) are per answer token, against the
teacher itself, whatever the student was trained on; standard errors are over records, of one
training run each, so that they say nothing of another seed. Seconds are of `train` alone, all
steps, compilation in the first one included: by the clock, of a machine that others used at the
same time, and of this process's CPU. Bytes are on disk, all that lies beside the signal included,
or what came from the server. Peak RSS is that of the process that trained, and of a server all its
processes; building is the teacher's one pass over the records, with loading it."""
ROUNDING = """\
The same law in other batches is not the same in the last bit: the cache was built in the order of
the records, and padded otherwise than training draws them (padding the live teacher on the left is
no other thing). What training makes of it, against the live teacher:"""


def write(options: argparse.Namespace, arguments: Sequence[str] | None) -> None:
    """FILE.json and FILE.md with all arms that are finished."""
    if options.output is None:
        return
    finished = {objective: {
        name: read_json(path, "an arm") for name in ARMS
        if (path := options.folder / objective / f"{name}.json").is_file()}
        for objective in options.objectives}
    command = shlex.join(["python", "scripts/bench_signals.py",
                          *(sys.argv[1:] if arguments is None else arguments)])
    about = {"command": command, "conditions": conditions(), "batch": BATCH,
             "settings": read_json(options.folder / "settings.json", "settings"),
             "before": read_json(options.folder / "before.json", "figures")}
    write_json({**about, "objectives": finished}, options.output.with_suffix(".json"))
    write_text("\n\n".join(_page(about, finished)) + "\n", options.output.with_suffix(".md"))


def _page(about: Mapping[str, Any], finished: Mapping[str, Mapping[str, Tree]]) -> Iterator[str]:
    before, found, settings = about["before"], about["conditions"], about["settings"]
    yield "# What a teacher's signal costs, and what it gives"
    yield f"```bash\n{about['command']}\n```"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield (f"On a CPU ({found['processor']}), {found['threads']} thread(s), float32; {versions}. "
           f"The teacher is {Path(settings['teacher']).name}, the student {settings['layers']} of "
           f"its layers; {settings['steps']} steps of {BATCH} records, seed {settings['seed']}, "
           f"learning rate {settings['learning_rate']}. Before training: KL "
           f"{_figure(before, 'kl')}, agreement {_figure(before, 'agreement')} over "
           f"{before['n_tokens']:,} held-out answer tokens of {before['n_answers']} records.")
    for objective, arms in finished.items():
        if arms:
            tokens = {result["train"]["answer_tokens"] for result in arms.values()}
            yield f"## {objective}"
            yield f"Trained on {', '.join(f'{n:,}' for n in sorted(tokens))} answer tokens."
            yield _table(arms)
            yield COLUMNS
            yield from _rounding(arms)


def _rounding(arms: Mapping[str, Tree]) -> Iterator[str]:
    """How far the arms with the teacher's whole law are from the live one, step by step."""
    same = [name for name in ("live-left", "float32") if name in arms]
    if "live" not in arms or not same:
        return
    yield ROUNDING
    live, lines = arms["live"]["train"]["losses"], []
    for name in same:
        apart = [abs(x - y) for x, y in zip(live, arms[name]["train"]["losses"], strict=True)]
        until = ", ".join(f"{max(apart[:n]):.1e} until step {n}" for n in (2, 5, len(apart)))
        lines.append(f"- {ARMS[name].title}: largest difference of a logged loss {until}; of a "
                     f"weight, at the end, {arms[name]['weights_apart']:.1e}.")
    yield "\n".join(lines)


def _table(arms: Mapping[str, Tree]) -> str:
    head = ("the signal", "held-out KL", "agreement", "s a step", "CPU s a step", "bytes a token",
            "building, CPU s", "peak RSS, GB")
    lines = []
    for name, result in arms.items():
        train, cache, figures = result["train"], result.get("cache", {}), result["held_out"]
        steps, server = train["steps"], result.get("server")
        size = f"{cache['bytes_per_token']:,.0f}" if cache else ""
        spent, memory = f"{train['cpu_seconds'] / steps:.2f}", train["peak_rss_bytes"] / 1e9
        peak = f"{memory:.2f}"
        if server:
            size = f"{train['received_bytes'] / train['received_tokens']:,.0f} received"
            spent += f" + {server['cpu_seconds'] / steps:.2f} of the server"
            peak += f" + {server['peak_rss_bytes'] / 1e9:.2f} of the server"
        lines.append((
            ARMS[name].title, _figure(figures, "kl"), _figure(figures, "agreement"),
            f"{train['seconds'] / steps:.2f}", spent, size,
            f"{cache['cpu_seconds']:,.0f}" if cache else "", peak))
    return markdown_table(head, lines)


def _figure(figures: Mapping[str, float], name: str) -> str:
    return f"{figures[name]:.3f} ± {figures[f'{name}_stderr']:.3f}"


if __name__ == "__main__":
    sys.exit(main())
