"""The command line: what is made of what, in how many minutes."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from real_vlm.data import LEAST_ICONS, read_sources
from real_vlm.figures import write_figures
from real_vlm.parts import Part, Work, finished_seeds, parts_of
from real_vlm.plan import make_plan, sources_of
from taid_vlm.errors import TaidError
from taid_vlm.io.files import read_json, write_json
from taid_vlm.io.folders import refuse_file_in_the_way


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for a mistake that a user can mend."""
    args = make_parser().parse_args(arguments)
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stdout)
    logging.getLogger("taid_vlm").setLevel(logging.INFO)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        carry_out(args)
    except TaidError as error:
        print(f"real_vlm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nreal_vlm: stopped; the same command goes on.", file=sys.stderr)
        return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="A VLM from a language model and a tower made here, distilled to half its "
                    "layers. The same command goes on where it was.")
    parser.add_argument("language_model", help="folder or hub name of a small chat model")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/real_vlm"), metavar="DIR")
    parser.add_argument("--minutes", type=_positive(float), default=60.0, metavar="N",
                        help="CPU time for all of it, about; decides how many steps are taken")
    parser.add_argument("--seeds", type=_positive(int), default=3, metavar="N",
                        help="of every student; more may be added to a finished run")
    parser.add_argument("--icons", type=Path, metavar="FILE",
                        help="parquet with the columns image and caption")
    parser.add_argument("--nlvr", type=Path, metavar="FILE",
                        help="parquet with the columns image, statement, label and identifier")
    parser.add_argument("--steps", type=_steps, metavar="TOWER,ALIGN,TEACHER,STUDENT",
                        help="instead of what --minutes allows")
    return parser


def _positive(kind: type) -> Any:
    def read(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    read.__name__ = f"positive {kind.__name__}"
    return read


def _steps(text: str) -> list[int]:
    steps = [int(part) for part in text.split(",")]
    if len(steps) != 4 or min(steps) < 1:
        raise ValueError
    return steps


def carry_out(args: argparse.Namespace) -> None:
    """Every part that is not done yet, then the figures."""
    refuse_file_in_the_way(args.output_dir)
    for flag, path in (("icons", args.icons), ("nlvr", args.nlvr)):
        if path is not None and not path.is_file():
            raise TaidError(f"--{flag} '{path}' is no file.")
    read_sources(args.icons, args.nlvr, LEAST_ICONS)  # what is wrong with them is said now
    args.output_dir = args.output_dir.absolute()
    plan = make_plan(args, _say)
    work = Work(plan, sources_of(args, plan), args.language_model, args.output_dir, _say)
    parts, times = parts_of(work, args.seeds), args.output_dir / "times.json"
    for number, part in enumerate(parts, start=1):
        if part.done():
            continue
        left = sum(one.seconds for one in parts[number - 1:] if not one.done())
        _say(f"[{number}/{len(parts)}] {part.name}: about {part.seconds:.0f} s of CPU; with all "
             f"that follows {left / 60:.0f} min")
        _run(part, times)
        if part.name.startswith("answers"):
            write_figures(work, finished_seeds(work, args.seeds), times)
    write_figures(work, finished_seeds(work, args.seeds), times)


def _run(part: Part, times: Path) -> None:
    started = time.process_time()
    part.run()
    taken = read_json(times, "times of this script") if times.exists() else {}
    write_json({**taken, part.name: taken.get(part.name, 0) + time.process_time() - started}, times)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
