"""The command line, the loop over arms, and how long the rest takes."""

from __future__ import annotations

import os
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from bench.arms import Tree
from bench.common import check_names, conditions, described, names, number, parsed

from real_pairs.data import Sizes, write_splits
from real_pairs.page import markdown
from real_pairs.plan import BLOCKS, PAIRS, Arm, all_arms, best_rate, tuning_arms
from real_pairs.results import Results, document
from real_pairs.work import before, carry_out, prepare_processes
from taid_vlm.errors import TaidError
from taid_vlm.io.files import read_json, write_json, write_text
from taid_vlm.io.folders import refuse_file_in_the_way

SIZES = [field.name for field in fields(Sizes)]
SETTINGS = ("teacher", "other", "data", "steps", "batch", "bf16", *SIZES)


def main(doc: str | None, arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = parsed(make_parser(doc), check, arguments)
    options.command = shlex.join(["python", "scripts/real_pairs.py", *(
        argument for argument in given if argument != "--table")])
    try:
        arms = list(all_arms(options.blocks, options.steps, options.seeds))
        if not options.table:
            keep_settings(options)
            write_splits(options.data, options.folder / "data", sizes(options))
            work_off(options, arms)
        write(options, arms)
    except TaidError as error:
        print(f"real_pairs: {error}", file=sys.stderr)
        return 2
    return 0


def make_parser(doc: str | None) -> ArgumentParser:
    parser = described(doc)
    parser.add_argument("--teacher", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--other", type=Path, metavar="FOLDER",
                        help="a teacher with another tokenizer")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--folder", type=Path, required=True, help="everything goes there")
    parser.add_argument("--output", type=Path, metavar="FILE", help="FILE.md and FILE.json")
    parser.add_argument("--table", action="store_true", help="only the table, of what is finished")
    parser.add_argument("--blocks", type=names, metavar="NAME[,NAME]", default=list(BLOCKS),
                        help=f"of {', '.join(BLOCKS)} (default: all)")
    parser.add_argument("--minutes", type=number, help="no arm that would end later is started")
    parser.add_argument("--steps", type=number, default=300)
    parser.add_argument("--seeds", type=number, default=3)
    parser.add_argument("--batch", type=number, default=2, help="records of a step")
    parser.add_argument("--no-bf16", dest="bf16", action="store_false")
    parser.add_argument("--threads", type=number)
    for field in fields(Sizes):
        parser.add_argument(f"--{field.name}", type=number, default=field.default)
    return parser


def check(options: Namespace) -> None:
    """Refuse what cannot work before anything is measured; raises TaidError."""
    check_names(options, {"blocks": BLOCKS})
    if options.seeds < 2:
        raise TaidError(f"--seeds {options.seeds}, but an interval over seeds needs at least 2.")
    if not options.data.is_dir():
        raise TaidError(f"--data = '{options.data}' is no folder.")
    for flag in ("teacher", "other"):
        folder = getattr(options, flag)
        if folder is not None and not (folder / "config.json").is_file():
            raise TaidError(f"--{flag} = '{folder}' is no model's folder (no config.json).")
    if (drawn := options.steps * options.batch) > options.pool:
        raise TaidError(f"--pool {options.pool}, but {options.steps} steps of {options.batch} see "
                        f"{drawn} records.")
    refuse_file_in_the_way(options.folder)
    if options.other is None:
        options.blocks = [name for name in options.blocks if not PAIRS[BLOCKS[name].pair].other]
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)


def sizes(options: Namespace) -> Sizes:
    return Sizes(**{name: getattr(options, name) for name in SIZES})


def keep_settings(options: Namespace) -> None:
    """A folder holds arms of one setting; `--other` may come later. Raises TaidError."""
    path, now = options.folder / "settings.json", {key: str(getattr(options, key))
                                                   for key in SETTINGS}
    kept = read_json(path, "settings") if path.is_file() else now
    for key in SETTINGS:
        if kept[key] != now[key] and not (key == "other" and kept[key] == "None"):
            raise TaidError(f"--folder = '{options.folder}' holds arms with --{key} {kept[key]}, "
                            f"not {now[key]}; choose another folder.")
    write_json(now, path)


# ----- the loop -----------------------------------------------------------------------------


def work_off(options: Namespace, arms: Sequence[Arm]) -> None:
    """Every arm that is not there yet, in order, and the table after each."""
    prepare_processes()
    started, results = time.monotonic(), Results(options.folder)
    write_json(conditions(), options.folder / "conditions.json")
    for index, arm in enumerate(arms, 1):
        if arm in results:
            continue
        left = [other for other in arms[index - 1:] if other not in results]
        pace = results.seconds_per_step(arms)
        spent = time.monotonic() - started
        if options.minutes and spent + pace * arm.steps > 60 * options.minutes:
            print(f"{len(left)} arms are left; the same command goes on.", flush=True)
            return
        before(options, arm.pair)
        rate = arm.rate or chosen(results, arm, options.steps)
        remaining = timedelta(seconds=round(pace * sum(other.steps for other in left)))
        print(f"[{index}/{len(arms)}] {arm.name}, learning rate {rate:g}; all that is left: "
              f"{remaining if pace else 'not known yet'}", flush=True)
        begun = time.monotonic()
        result = carry_out(options, arm, rate)
        results.add(arm, {**result, "elapsed": time.monotonic() - begun})
        print(summary(result, time.monotonic() - begun), flush=True)
        write(options, arms)


def chosen(results: Results, arm: Arm, steps: int) -> float:
    return best_rate({each.rate or 0.0: results.validation(each)
                      for each in tuning_arms(arm.pair, arm.method, steps)})


def summary(result: Tree, seconds: float) -> str:
    held_out = result["held_out"]
    return (f"    {seconds:.0f} s; KL {held_out['kl']:.3f}, reverse {held_out['reverse_kl']:.3f}, "
            f"agreement {held_out['agreement']:.3f}, NLL {held_out['nll']:.3f}")


def write(options: Namespace, arms: Sequence[Arm]) -> None:
    """FILE.json and FILE.md, of what is finished."""
    if options.output is None:
        return
    if not (options.folder / "settings.json").is_file():
        raise TaidError(f"--folder = '{options.folder}' holds no arms yet; run it without --table.")
    found = document(options, Results(options.folder), arms)
    write_json(found, options.output.with_suffix(".json"))
    write_text(markdown(found), options.output.with_suffix(".md"))
