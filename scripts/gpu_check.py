"""All that wants a GPU, in order of worth, in eight minutes at most.

    scripts/gpu_check.sh --output runs/gpu_check [--only kernels,objective] [--minutes 8]
    scripts/gpu_check.sh --output runs/rehearsal --rehearse

Every part is other commands, benchmarks or `taid-vlm` itself, in processes of their own. It has a
share of the time and what the parts before it have left; then it is ended, and what it has measured
until then is kept. No part ends the others. `gpu_check.json` and `gpu_check.md` in --output are
written after every part, with what the commands printed in `logs`; models and runs are deleted.

A part is `ok`, `failed` (with the last lines it printed), `timed out` or `skipped` (a package, the
hardware or a part that it builds on is missing, or it was not among --only).

`--rehearse` does the same on a CPU with tiny models: that everything runs, no figures of worth.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from bench.gpu_figures import FIGURES, Row, markdown, own_error  # noqa: E402

from taid_vlm.errors import TaidError, nearest  # noqa: E402
from taid_vlm.io.files import read_json, write_json, write_text  # noqa: E402

LINES = 5  # the last ones printed, of a part that failed
MOST = 300  # characters of them


@dataclass(frozen=True)
class Part:
    """One line of the table.

    share: seconds of eight minutes. commands: what python is given, one after the other.
    results: JSON files that they leave. package: skipped without it. after: a part that it needs.
    gpu: there is nothing to rehearse on a CPU.
    """

    name: str
    about: str
    share: float
    commands: Sequence[Sequence[str]]
    results: Sequence[Path] = ()
    package: str | None = None
    after: str | None = None
    gpu: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a part. seconds: it took; bound: it had."""

    name: str
    about: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    bound: float = 0.0
    figures: str = ""
    results: list[Any] = field(default_factory=list)


# ----- the parts ----------------------------------------------------------------------------


TEXT = "--vocab 151936 --dtype bfloat16 --repeats 3"
STEP = "--scale gpu --dtype mixed --objective jsd --implementations ours,sft,trl_gkd --rounds 3"
TINY_STEP = "--scale tiny --implementations ours --rounds 1 --steps 1 --batch-size 2"
PACKING = "--records 512 --rows 16 --rounds 2 --teacher 2048x16 --student 1024x16"
TINY_PACKING = "--rows 4 --rounds 1 --steps 1 --teacher 64x1 --student 64x1"
# flags of the benchmarks: on a GPU, and in a rehearsal
SIZES: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "kernels": ([""], ["--objective jsd --vocab 300 --student-hidden 16 --teacher-hidden 24 "
                       "--answers 10"]),
    "objective": (
        [f"{TEXT} --tokens 1024,8192 --student-hidden 896 --teacher-hidden 3584 "
         "--objective jsd,taid",
         f"{TEXT} --tokens 2048,4096 --student-hidden 2048 --teacher-hidden 5120 --objective jsd",
         f"{TEXT} --tokens 4096 --student-hidden 5120 --teacher-hidden 5120 --objective jsd"],
        ["--vocab 300 --tokens 24 --student-hidden 16 --teacher-hidden 24 --objective jsd "
         "--implementations ours,naive --repeats 1"]),
    "step": ([STEP], [TINY_STEP]),
    "step-lora": ([f"{STEP} --lora 16"], [f"{TINY_STEP} --lora 4"]),
    "pair": (["--scale medium"], ["--scale tiny --steps 2 --records 24"]),
    "packing": ([f"{PACKING} --attention {name}" for name in (
        "flash_attention_2" if find_spec("flash_attn") else "flex_attention", "sdpa")],
        [TINY_PACKING]),
}
TINY_WORDS = ("train.max_steps=2", "train.logging_steps=1", "data.eval.max_records=8",
              "evaluate.examples=0")


def all_parts(work: Path, logs: Path, rehearse: bool) -> list[Part]:
    """In order of worth; all files they make lie in `work`, what they print in `logs`."""
    device = "cpu" if rehearse else "cuda"
    pair, recipe = work / "pair", str(work / "pair/recipe.yaml")

    def bench(name: str, about: str, share: float, *program: str, **more: Any) -> Part:
        files = [work / f"{name}-{index}.json" for index in range(len(SIZES[name][rehearse]))]
        return Part(name, about, share, [
            (*program, *flags.split(), "--device", device, "--json", str(file))
            for flags, file in zip(SIZES[name][rehearse], files, strict=True)], files, **more)

    def run(name: str, about: str, share: float, *words: str, program: Sequence[str] = (),
            before: Sequence[Sequence[str]] = (), printed: Sequence[Path] = (),
            path: str = recipe, **more: Any) -> Part:
        command = (*program, "-m", "taid_vlm", "distill", path, f"output_dir={work / name}", *words)
        return Part(name, about, share, [*before, command],
                    [*printed, work / name / "results.json"], after="pair", **more)

    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
    make_pair = ("-m", "bench.saved_pair", str(pair), *SIZES["pair"][rehearse][0].split(),
                 "--device", device)
    return [
        bench("kernels", "all bodies against float64", 50, "-m", "bench.bodies"),
        bench("objective", "the objective against its floor and others", 90,
              str(ROOT / "scripts/bench_objective.py")),
        bench("step", "a whole step, all weights", 60, str(ROOT / "scripts/bench_step.py")),
        bench("step-lora", "a whole step, LoRA", 50, str(ROOT / "scripts/bench_step.py"),
              package="peft"),
        Part("pair", "models and recipes for the parts below", 25, [make_pair]),
        run("plan", "memory, planned and measured", 35,
            before=[("-m", "taid_vlm", "plan", recipe, "--json")],
            printed=[logs / "plan-0.out"]),
        run("fsdp", "FSDP2 on one device", 30, "train.fsdp=true", program=launcher, gpu=True),
        bench("packing", "packed rows", 45, str(ROOT / "scripts/bench_packing.py"), "--data",
              str(pair / "mixed.jsonl"), "--tokenizer", str(pair / "student"), after="pair"),
        *(run(f"teacher-{kind}", f"a teacher in {kind}", 20, f"teacher.quantization={kind}",
              package=package, gpu=True)
          for kind, package in (("4bit", "bitsandbytes"), ("8bit", "bitsandbytes"),
                                ("fp8", "torchao"))),
        run("words", "the demo's TAID arm in words", 35, *(TINY_WORDS if rehearse else ()),
            path=str(pair / "words.yaml")),
    ]


# ----- carrying them out --------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> list[Outcome]:
    """Carry out the parts, write and print the table; what failed is in it."""
    args = _parsed(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output, prefix=".work-") as folder:
        parts = all_parts(Path(folder), args.output / "logs", args.rehearse)
        outcomes = carry_out(parts, args)
    print(markdown([asdict(outcome) for outcome in outcomes], args.rehearse))
    return outcomes


def carry_out(parts: Sequence[Part], args: argparse.Namespace) -> list[Outcome]:
    """One after the other; both files are written after each."""
    chosen = [part for part in parts if not args.only or part.name in args.only]
    scale = 60 * args.minutes / sum(part.share for part in chosen)
    left, outcomes = 0.0, [Outcome(part.name, part.about, "skipped", "not among --only" if (
        part not in chosen) else "not yet") for part in parts]
    for index, part in enumerate(parts):
        if part in chosen:
            left += part.share * scale
            start = time.monotonic()
            status = {outcome.name: outcome.status for outcome in outcomes}
            outcomes[index] = _outcome(part, left, status, args)
            left -= time.monotonic() - start
        rows: list[Row] = [asdict(outcome) for outcome in outcomes]
        write_json({"rehearsal": args.rehearse, "minutes": args.minutes, "parts": rows},
                   args.output / "gpu_check.json")
        write_text(markdown(rows, args.rehearse), args.output / "gpu_check.md")
    return outcomes


def _outcome(
    part: Part, bound: float, status: dict[str, str], args: argparse.Namespace
) -> Outcome:
    """Of a part that may take `bound` seconds, after parts of such a status."""
    base = Outcome(part.name, part.about, "skipped", bound=bound)
    if part.gpu and args.rehearse:
        return replace(base, reason="needs a GPU")
    if part.package and find_spec(part.package) is None:
        return replace(base, reason=f"{part.package} is not installed")
    if part.after and status[part.after] != "ok":
        return replace(base, reason=f"builds on '{part.after}', which was {status[part.after]}")
    print(f"{part.name}: {part.about}, {bound:.0f} s at most", flush=True)
    start = time.monotonic()
    state, reason = _run(part, start + bound, args.output / "logs")
    results: list[Any] = []
    try:
        results = [read_json(path, "a result") for path in part.results if path.exists()]
        figures = FIGURES[part.name](results) if part.name in FIGURES and results else ""
    except Exception as error:  # a half of a result must not end the parts that follow
        figures, state = "", "failed" if state == "ok" else state
        reason = reason or f"its results cannot be read: {type(error).__name__}: {error}"
    if state == "ok" and (error_ := own_error(results)):
        state, reason = "failed", error_
    return replace(base, status=state, reason=reason, seconds=time.monotonic() - start,
                   figures=figures, results=results)


def _run(part: Part, end: float, logs: Path) -> tuple[str, str]:
    """Status and reason, once all commands have ended, one has failed or time is up."""
    logs.mkdir(parents=True, exist_ok=True)
    for index, command in enumerate(part.commands):
        out, err = (logs / f"{part.name}-{index}.{kind}" for kind in ("out", "err"))
        with out.open("wb") as to_out, err.open("wb") as to_err:
            process = subprocess.Popen(
                [sys.executable, *command], stdout=to_out, stderr=to_err, cwd=ROOT,
                stdin=subprocess.DEVNULL, env=_environment(), start_new_session=True)
            try:
                status = process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                return "timed out", ""
            finally:
                _end(process)
        if status:
            said = _last(err) or _last(out)
            refused = status == 2 and " needs " in said  # a library or the hardware is missing
            return "skipped" if refused else "failed", said or f"exit status {status}"
    return "ok", ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """It and all that it has started: they are a session of their own."""
    with contextlib.suppress(ProcessLookupError):  # all have ended by themselves
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment() -> dict[str, str]:
    path = [str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    defaults = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                "PYTHONUNBUFFERED": "1"}
    return {**defaults, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def _last(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " / ".join(line.strip() for line in lines[-LINES:] if line.strip())[-MOST:]


# ----- the command --------------------------------------------------------------------------


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(description=about[0], epilog="\n\n".join(about[2:]),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"), metavar="DIR")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[],
                        metavar="NAME[,NAME]")
    parser.add_argument("--minutes", type=float, default=8.0, metavar="M")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(arguments)
    args.output = args.output.resolve()
    try:
        _check(args)
    except TaidError as error:
        parser.error(str(error))
    return args


def _check(args: argparse.Namespace) -> None:
    names = [part.name for part in all_parts(Path(), Path(), args.rehearse)]
    for name in args.only:
        if name not in names:
            raise TaidError(f"--only {name!r}.{nearest(name, names)}")
    if not args.minutes > 0:
        raise TaidError(f"--minutes {args.minutes}, but it must be more than 0.")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise TaidError(f"--output '{args.output}' is not empty; name another folder.")
    if not args.rehearse:
        from bench.common import check_device

        check_device("cuda")


if __name__ == "__main__":
    main()
