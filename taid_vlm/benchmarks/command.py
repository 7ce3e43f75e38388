"""What `taid-vlm evaluate` was told: which models, which benchmarks, asked how, by whom."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from taid_vlm.benchmarks.asking import Asking, open_tasks
from taid_vlm.benchmarks.candidates import Candidate, parse_candidates, parse_served
from taid_vlm.benchmarks.evaluate import evaluate
from taid_vlm.config.model import DTYPES, ModelSpec
from taid_vlm.errors import TaidError, nearest

HARNESSES = ("lm-eval",)
_ASKING = ("method", "choose_by", "normalise", "max_new_tokens", "temperature", "top_p", "seeds")
_LOCAL = ("dtype", "chat_template")
_SERVED = ("api_key_env", "timeout")
_OF_HARNESS = ("num_fewshot", "apply_chat_template")
TIMEOUT = 120.0  # seconds

Options = Mapping[str, Any]


def run_command(options: Options) -> dict[str, dict[str, Any]]:
    """Carry out the command; options that were not given are None.

    Returns:
        By model what was written to its results.json.

    Raises:
        TaidError: anything a user can mend, before weights are loaded where it can show there.
    """
    if options["harness"] is not None:
        return _with_harness(options)
    _refuse(options, _OF_HARNESS, "goes with --harness lm-eval")
    given = {key: options[key] for key in _ASKING if options[key] is not None}
    if "seeds" in given:
        given["seeds"] = tuple(given["seeds"])
    asking = Asking(**given, batch_size=options["batch_size"])
    candidates = _candidates(options)
    tasks = open_tasks(options["tasks"], options["rule"] or (), options["max_records"])
    return evaluate(candidates, tasks, options["output_dir"], asking)


def _candidates(options: Options) -> list[Candidate]:
    if options["base_url"] is not None:
        _refuse(options, _LOCAL, "is up to the server that --base-url names")
        timeout = TIMEOUT if options["timeout"] is None else options["timeout"]
        return parse_served(options["model"], options["base_url"], options["api_key_env"], timeout)
    _refuse(options, _SERVED, "goes with --base-url")
    dtype = options["dtype"]
    if dtype is not None and dtype not in DTYPES:
        raise TaidError(f"--dtype = '{dtype}'.{nearest(dtype, DTYPES)}")
    return parse_candidates(options["model"], ModelSpec(
        model_name_or_path="", dtype=dtype, chat_template=options["chat_template"]))


def _with_harness(options: Options) -> dict[str, dict[str, Any]]:
    """lm-eval's own tasks, by lm-eval."""
    from taid_vlm.benchmarks.harness.lm_eval import run_lm_eval

    name = options["harness"]
    if name not in HARNESSES:
        raise TaidError(f"--harness = '{name}'.{nearest(name, HARNESSES)}")
    _refuse(options, ("rule", *_ASKING, "base_url"), "is for this package's own benchmarks; leave "
                                                     "it out with --harness")
    candidates, output = _candidates(options), Path(options["output_dir"]).expanduser()
    named = [text.partition("=") for text in options["tasks"]]
    how = {key: options[key] for key in _OF_HARNESS if options[key] is not None}
    results = {}
    for candidate in candidates:
        assert isinstance(candidate.source, ModelSpec)
        results[candidate.name] = run_lm_eval(
            candidate.source, [task for task, _, _ in named],
            output / candidate.name if len(candidates) > 1 else output,
            data={task: data for task, _, data in named if data}, name=candidate.name,
            limit=options["max_records"], batch_size=options["batch_size"], **how)
    return results


def _refuse(options: Options, names: Iterable[str], why: str) -> None:
    for name in names:
        if options[name] is not None:
            raise TaidError(f"--{name.replace('_', '-')} {why}.")
