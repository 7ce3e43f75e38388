"""The command `taid-vlm`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taid_vlm.errors import TaidError

if TYPE_CHECKING:
    from taid_vlm.runs.results import Results


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
        print(f"interrupted; {options.interrupted}", file=sys.stderr)
        return 130
    return 0


def distill_script(default_recipe: str) -> int:
    """`taid-vlm distill` for a script that brings a recipe of its own."""
    arguments = sys.argv[1:]
    named = arguments[:1] and arguments[0].endswith((".yaml", ".yml", "-h", "--help"))
    return main(["distill", *([] if named else [default_recipe]), *arguments])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="taid-vlm", description=__doc__)
    parser.set_defaults(interrupted="--resume goes on from the last checkpoint, if there is one")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    distill = commands.add_parser("distill", help="carry out a recipe")
    _recipe_arguments(distill)
    distill.add_argument("--resume", action="store_true",
                         help="go on from the last whole checkpoint in output_dir")
    distill.set_defaults(run=_distill)

    inspect = commands.add_parser(
        "inspect", help="say whether a recipe can work, what is compared, and what to change")
    _inspect_arguments(inspect)

    _plan_arguments(commands.add_parser(
        "plan", help="say how much memory a recipe needs, and what to change if it does not fit"))

    _shrink_arguments(commands.add_parser(
        "shrink", help="make a student of a teacher: fewer layers, fewer image tokens"))

    _compose_arguments(commands.add_parser(
        "compose", help="make a student of a vision tower and a language model"))

    _evaluate_arguments(commands.add_parser(
        "evaluate", help="let models answer benchmarks, and judge the answers"))

    export = commands.add_parser("export", help="write benchmarks as tables for VLMEvalKit")
    export.add_argument("tasks", nargs="+", metavar="TASK[=DATA]")
    export.add_argument("--output-dir", type=Path, required=True)
    export.set_defaults(run=_export)

    _compare_arguments(commands.add_parser(
        "compare", help="say which of several runs is best, by how much, and how sure that is"))

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


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    parser.add_argument("--record", type=int, default=0, metavar="N",
                        help="which training record is shown token by token, from 0")
    parser.add_argument("--all", action="store_true",
                        help="go over all records: how many are left out, how long they are")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the same as a page")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=_inspect)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    parser.add_argument("--memory", metavar="SIZE", help="of one device, for example 24GB or 80GiB")
    parser.add_argument("--processes", type=int, default=1, metavar="N",
                        help="of a data-parallel run, one per device")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=_plan)


def _shrink_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder or hub name, of a VLM or a text LLM")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--layers", type=int, metavar="N",
                        help="how many layers of the language model to keep")
    parser.add_argument("--choose", default="even", metavar="{even,importance}",
                        help="which: evenly spaced (the default), or those that change the hidden "
                             "state most on --calibration")
    parser.add_argument("--calibration", metavar="DATA", help="records, as data.train of a recipe")
    parser.add_argument("--calibration-records", type=int, default=64, metavar="N")
    parser.add_argument("--keep", type=_numbers, metavar="I,J,...",
                        help="exactly these layers, counted from 0")
    parser.add_argument("--tower-layers", type=int, metavar="N",
                        help="how many layers of the vision tower to keep, evenly spaced")
    parser.add_argument("--image-tokens", type=int, metavar="N",
                        help="how many tokens an image (or tile) becomes")
    parser.add_argument("--revision", default="main", help="hub revision of the teacher")
    parser.add_argument("--chat-template", metavar="FILE", help="jinja file, if it has none")
    parser.set_defaults(run=_shrink)


def _compose_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tower", help="timm:NAME, or a folder or hub name of CLIP, SigLIP, ViT ...")
    parser.add_argument("language_model", help="folder or hub name of a causal language model")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--architecture", default="auto", 
                        metavar="{auto,llava,perception_lm,fast_vlm}")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--tower-weights", metavar="FILE",
                         help="safetensors for a timm tower; otherwise its weights on the hub")
    weights.add_argument("--random-tower", action="store_true", help="no pretrained weights")
    parser.add_argument("--vision-feature-layer", type=_numbers, metavar="I[,J...]",
                        help="hidden states that LLaVA projects, for example -2; several as =-2,-1")
    parser.add_argument("--projector-activation", metavar="NAME", help="default gelu")
    parser.add_argument("--pooling-ratio", type=int, metavar="N",
                        help="of PerceptionLM: 2 leaves a quarter of the image tokens")
    parser.add_argument("--chat-template", metavar="FILE",
                        help="jinja file in place of the language model's own template")
    parser.add_argument("--dtype", default="auto", help="default: the language model's")
    parser.add_argument("--seed", type=int, default=0, help="of the projector, and a random tower")
    parser.set_defaults(run=_compose)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    many: dict[str, Any] = {"nargs": "+", "action": "extend"}
    parser.add_argument("--model", **many, required=True, metavar="[NAME=]MODEL",
                        help="folder, folder of a run (its student), hub name[@revision], or with "
                             "--base-url what the server calls it")
    parser.add_argument("--tasks", **many, required=True, metavar="TASK[=DATA]",
                        help="benchmarks, or YAML files that describe one; without DATA (a file or "
                             "folder) they are read from the hub")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N",
                        help="rows, or requests to a server, at once")
    parser.add_argument("--max-records", type=int, metavar="N", help="the first rows only")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _asking_arguments(parser.add_argument_group("how questions are asked and judged"))
    served = parser.add_argument_group("models of this machine, or behind a URL")
    served.add_argument("--dtype", metavar="{auto,float32,bfloat16,float16}")
    served.add_argument("--chat-template", metavar="FILE", help="jinja file, for all models")
    served.add_argument("--base-url", metavar="URL",
                        help="of OpenAI-compatible chat completions, as http://localhost:8000/v1")
    served.add_argument("--api-key-env", metavar="NAME",
                        help="environment variable that holds the server's key")
    served.add_argument("--timeout", type=float, metavar="SECONDS",
                        help="of one request to the server (default 120)")
    harness = parser.add_argument_group("benchmarks of lm-eval, for text")
    harness.add_argument("--harness", metavar="{lm-eval}", help="--tasks are those of lm-eval")
    harness.add_argument("--num-fewshot", type=int, metavar="N", help="solved examples")
    harness.add_argument("--apply-chat-template", action="store_true", default=None)
    parser.set_defaults(run=_evaluate, interrupted="the same command goes on with the next "
                                                   "question")


def _asking_arguments(group: Any) -> None:
    group.add_argument("--rule", nargs="+", action="extend", metavar="TASK:RULE",
                       help="judge a task by another of its rules; asks nothing again")
    group.add_argument("--method", metavar="{generate,likelihood}",
                       help="likelihood chooses the most likely of a question's choices")
    group.add_argument("--choose-by", metavar="{letter,text}",
                       help="whose likelihood (default letter)")
    group.add_argument("--normalise", metavar="{sum,bytes,tokens}",
                       help="what likelihoods are divided by (default sum: nothing)")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="default: the benchmark's")
    group.add_argument("--temperature", type=float, metavar="T",
                       help="sample answers; 0, the default, takes the most likely token")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--seeds", type=int, nargs="+", metavar="SEED",
                       help="of sampling; every question is answered once per seed")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FOLDER[,FOLDER...]",
                        help="a run of distill or evaluate; several seeds of one method, and "
                             "evaluations of their students, behind one name")
    parser.add_argument("--teacher", type=Path, metavar="FOLDER", help="evaluation of the teacher")
    parser.add_argument("--base", type=Path, metavar="FOLDER",
                        help="evaluation of the student before training")
    parser.add_argument("--baseline", metavar="NAME",
                        help="whom differences are taken from (default: the first)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write it for a model card")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.set_defaults(run=_compare)


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers like 0,1,5") from None


def _distill(options: argparse.Namespace) -> None:
    from accelerate import PartialState

    from taid_vlm.report.run import write_run_report
    from taid_vlm.runs.recipe import load_recipe
    from taid_vlm.runs.stages import distill_stages

    recipe = load_recipe(options.recipe, options.overrides)
    results = distill_stages(recipe, options.resume, write_run_report)
    process = PartialState()
    if process.is_main_process:
        print(_closing(results, recipe.output_dir))
    process.destroy_process_group()  # left to the interpreter's exit, processes can abort


def _closing(results: Results, output_dir: str) -> str:
    before, after = results.eval.before, results.eval.after
    lines = []
    if before and after and "kl" in after.figures:
        first, last = before.figures, after.figures
        lines.append(f"held-out KL   {first['kl']:.4f} -> {last['kl']:.4f} nats per answer token "
                     f"(n = {after.n_tokens:,})")
        lines.append(f"agreement     {first['agreement']:.4f} -> {last['agreement']:.4f}")
    lines.append(f"student       {output_dir}/student")
    lines.append(f"report        {output_dir}/report.html")
    return "\n".join(lines)


def _inspect(options: argparse.Namespace) -> None:
    from taid_vlm.doctor.doctor import inspect_recipe
    from taid_vlm.doctor.page import write_page
    from taid_vlm.doctor.text import as_text
    from taid_vlm.runs.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    inspection = inspect_recipe(recipe, options.record, everything=options.all)
    if options.html is not None:
        write_page(inspection, options.html)
    print(inspection.to_json() if options.json else
          as_text(inspection, colour=sys.stdout.isatty()))
    if inspection.problem:
        raise TaidError(inspection.problem)


def _plan(options: argparse.Namespace) -> None:
    from tqdm.auto import tqdm

    from taid_vlm.plan.advice import advise
    from taid_vlm.plan.plan import Seen, plan_recipe
    from taid_vlm.plan.sizes import parse_bytes
    from taid_vlm.plan.text import as_json, as_text, human
    from taid_vlm.runs.recipe import Recipe, load_recipe

    def reload(more: Sequence[str]) -> Recipe:
        return load_recipe(options.recipe, [*options.overrides, *more])

    memory = None if options.memory is None else parse_bytes(options.memory)
    seen: Seen = {}
    with tqdm(unit=" plans", leave=False, disable=None) as bar:
        def tell(what: str) -> None:
            bar.set_description(what)
            bar.update()

        bar.set_description("the recipe as it is")
        plans = plan_recipe(reload(()), options.processes, seen)
        advice = None if memory is None else advise(
            reload, plans, memory, options.processes, seen, tell)
    print((as_json if options.json else as_text)(plans, advice))
    if advice is not None and not advice.fits:
        raise TaidError(f"--memory = '{options.memory}', but this recipe needs "
                        f"{human(advice.peak)} on each device.")


def _shrink(options: argparse.Namespace) -> None:
    from taid_vlm.models.loading import ModelSpec
    from taid_vlm.students.shrink import shrink

    teacher = ModelSpec(options.teacher, revision=options.revision, dtype="auto",
                        chat_template=options.chat_template)
    names = ("layers", "choose", "calibration", "calibration_records", "keep", "tower_layers",
             "image_tokens")
    made = shrink(teacher, options.output_dir, **{name: getattr(options, name) for name in names})
    print(made.table())


def _compose(options: argparse.Namespace) -> None:
    from taid_vlm.students.compose import compose

    arguments = {key: value for key, value in vars(options).items()
                 if key not in ("run", "interrupted")}
    layers = arguments["vision_feature_layer"]
    if layers is not None and len(layers) == 1:
        arguments["vision_feature_layer"] = layers[0]
    print(compose(**arguments).table())


def _evaluate(options: argparse.Namespace) -> None:
    from accelerate import PartialState

    from taid_vlm.benchmarks.command import run_command
    from taid_vlm.benchmarks.table import as_text
    from taid_vlm.io.files import as_json

    results = run_command(vars(options))
    process = PartialState()
    if process.is_main_process:
        print(as_json(results) if options.json else as_text(results))
    process.destroy_process_group()  # left to the interpreter's exit, processes can abort


def _export(options: argparse.Namespace) -> None:
    from taid_vlm.benchmarks.asking import open_tasks
    from taid_vlm.benchmarks.harness.vlmevalkit import export_tsv

    for task in open_tasks(options.tasks):
        print(export_tsv(task.questions, options.output_dir / f"{task.benchmark.name}.tsv"))


def _compare(options: argparse.Namespace) -> None:
    from taid_vlm.compare import (
        as_markdown,
        compare_runs,
        plain,
        read_method,
        read_reference,
        write_page,
    )
    from taid_vlm.io.files import as_json, write_text

    teacher, base = (folder and read_reference(name, folder) for name, folder in
                     (("Teacher", options.teacher), ("Base", options.base)))
    comparison = compare_runs([read_method(run) for run in options.runs], teacher, base,
                              options.baseline)
    if options.html is not None:
        write_page(comparison, options.html)
    if options.markdown is not None:
        write_text(as_markdown(comparison), options.markdown)
    print(as_json(plain(comparison)) if options.json else as_markdown(comparison))


def _demo(options: argparse.Namespace) -> None:
    from taid_vlm.demo.demo import run_demo

    run_demo(options.output_dir, seed=options.seed, train_teacher=options.train_teacher)


if __name__ == "__main__":
    sys.exit(main())
