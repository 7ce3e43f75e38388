"""The command `taid-vlm`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from taid_vlm.errors import TaidError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake ends with one message on stderr and exit status 2."""
    options = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data-loader workers fork
    try:
        options.run(options)
    except TaidError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last checkpoint, if there is one",
              file=sys.stderr)
        return 130
    return 0


def distill_script(default_recipe: str) -> int:
    """`taid-vlm distill` for a script that brings a recipe of its own."""
    arguments = sys.argv[1:]
    named = arguments[:1] and arguments[0].endswith((".yaml", ".yml", "-h", "--help"))
    return main(["distill", *([] if named else [default_recipe]), *arguments])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="taid-vlm", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    distill = commands.add_parser("distill", help="carry out a recipe")
    _recipe_arguments(distill)
    distill.add_argument("--resume", action="store_true",
                         help="go on from the last whole checkpoint in output_dir")
    distill.set_defaults(run=_distill)

    inspect = commands.add_parser(
        "inspect", help="show one aligned example per side, before any training")
    _recipe_arguments(inspect)
    inspect.add_argument("--record", type=int, default=0, metavar="N", help="which record")
    inspect.set_defaults(run=_inspect)

    demo = commands.add_parser("demo", help="distil a VLM and a text LLM offline, in minutes")
    demo.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    demo.add_argument("--train-teacher", action="store_true",
                      help="train the shipped teachers and warm starts again first")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)
    return parser


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE",
                        help="for example train.max_steps=100")


def _distill(options: argparse.Namespace) -> None:
    from accelerate import PartialState

    from taid_vlm.recipe import load_recipe
    from taid_vlm.run import distill

    recipe = load_recipe(options.recipe, options.overrides)
    results = distill(recipe, resume=options.resume)
    process = PartialState()
    if process.is_main_process:
        print(_closing(results, recipe.output_dir))
    process.destroy_process_group()  # left to the interpreter's exit, processes can abort


def _closing(results: dict, output_dir: str) -> str:  # type: ignore[type-arg]
    before, after = results["eval"]["before"], results["eval"]["after"]
    lines = []
    if before and after and "kl" in after:
        lines.append(f"held-out KL   {before['kl']:.4f} -> {after['kl']:.4f} nats per answer token "
                     f"(n = {after['n_tokens']:,})")
        lines.append(f"agreement     {before['agreement']:.4f} -> {after['agreement']:.4f}")
    lines.append(f"student       {output_dir}/student")
    lines.append(f"report        {output_dir}/report.html")
    return "\n".join(lines)


def _inspect(options: argparse.Namespace) -> None:
    from taid_vlm.inspection import inspect_recipe
    from taid_vlm.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    print(inspect_recipe(recipe, options.record, colour=sys.stdout.isatty()))


def _demo(options: argparse.Namespace) -> None:
    from taid_vlm.demo.demo import run_demo

    run_demo(options.output_dir, seed=options.seed, train_teacher=options.train_teacher)


if __name__ == "__main__":
    sys.exit(main())
