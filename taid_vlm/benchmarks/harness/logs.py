"""Per-sample logs of lm-eval and lmms-eval (`--log_samples`), read as evaluations.

The scores are the harness's own. Sources: `EvaluationTracker` of lm_eval/loggers (0.4.13) and of
lmms_eval/loggers (0.7.3).
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taid_vlm.benchmarks.harness.converted import (
    chosen,
    figures_of,
    generated,
    prompt_hash,
    questions_hash,
)
from taid_vlm.benchmarks.scoring import KIND, SCHEMA
from taid_vlm.errors import TaidError
from taid_vlm.evaluation.statistics import known
from taid_vlm.io.files import read_json
from taid_vlm.io.jsonl import need, read_lines

Rows = dict[str, list[dict[str, Any]]]  # task -> a row per question, as in answers/NAME.jsonl
LM_EVAL, LMMS_EVAL = "lm-eval", "lmms-eval"
SAMPLE = {"doc_id": int, "filtered_resps": object}
METHODS = {"generate_until": "generate", "multiple_choice": "likelihood",
           "loglikelihood": "likelihood"}
SCORES = ("score", "acc", "accuracy", "hit", "correct", "exact_match")  # inside a logged metric


@dataclass(frozen=True)
class Log:
    """A finished run of a harness: its results, and where its samples lie, by task."""

    harness: str
    path: Path
    samples: Mapping[str, Path]


def find_logs(folder: Path) -> list[Log]:
    """Runs in a model's folder as both harnesses name their files, the oldest first."""
    found = []
    for path in folder.glob("results_*.json"):
        date = path.stem.removeprefix("results_")
        found.append((date, Log(LM_EVAL, path, {
            sample.name[len("samples_"):-len(f"_{date}.jsonl")]: sample
            for sample in folder.glob(f"samples_*_{date}.jsonl")})))
    for path in folder.glob("*_results.json"):
        date = path.stem.removesuffix("_results")
        found.append((date, Log(LMMS_EVAL, path, {
            sample.stem.removeprefix(f"{date}_samples_"): sample
            for sample in folder.glob(f"{date}_samples_*.jsonl")})))
    return [log for _, log in sorted(found, key=lambda pair: pair[0])]


def read_logs(folder: Path) -> tuple[dict[str, Any], Rows] | None:
    """What results.json would say of a model's runs, and the rows of answers; of a task that was
    run more than once the last run. None where there are no logs.

    Raises:
        TaidError: logs of two harnesses, or files of another shape.
    """
    logs = find_logs(folder)
    if not logs:
        return None
    if len({log.harness for log in logs}) > 1:
        raise TaidError(f"'{folder}' holds logs of lm-eval and of lmms-eval.",
                        mend="Keep them in folders of their own.")
    tasks: dict[str, Any] = {}
    rows: Rows = {}
    raw: dict[str, Any] = {}
    for log in logs:
        raw = read_json(log.path, f"{log.harness}'s results")
        if not isinstance(raw, dict) or not isinstance(raw.get("results"), dict):
            raise TaidError(f"'{log.path}' is not {log.harness}'s results (it has no 'results').")
        for task, leaves in _whole(raw).items():
            rows[task] = [row for leaf in leaves if leaf in log.samples
                          for row in _rows(log, leaf, raw)]
            tasks[task] = _entry(log, task, leaves, raw, rows[task])
    harness = logs[-1].harness
    known_versions = {harness: _version(harness, raw),
                      "transformers": raw.get("transformers_version")}
    results = {
        "schema": SCHEMA, "kind": KIND, "name": folder.name, "tasks": tasks,
        "model": {"name": str(raw.get("model_name") or (raw.get("config") or {}).get("model_args")
                              or folder.name)},
        "versions": {name: str(value) for name, value in known_versions.items() if value}}
    return results, rows


def _version(harness: str, raw: Mapping[str, Any]) -> str:
    key = "lmms_eval_version" if harness == LMMS_EVAL else "lm_eval_version"
    return str(raw.get(key) or "")


def _whole(raw: Mapping[str, Any]) -> dict[str, list[str]]:
    """Tasks and groups that have figures and are no part of another such group, each with the tasks
    in it."""
    inside = raw.get("group_subtasks") or {}
    having = [name for name, entry in raw["results"].items() if figures_of(entry, name)]

    def leaves(name: str) -> Iterator[str]:
        if not inside.get(name):
            yield name
        for child in inside.get(name) or ():
            yield from leaves(child)

    parts = {name: [*dict.fromkeys(leaves(name))] for name in having}
    below = {child for name, own in parts.items() for child in own if own != [name]}
    groups = {name for name in having if any(
        name != other and set(parts[name]) < set(parts[other]) for other in having)}
    return {name: own for name, own in parts.items() if name not in below | groups}


def _entry(log: Log, task: str, leaves: Sequence[str], raw: Mapping[str, Any],
           rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = leaves[0]
    config = (raw.get("configs") or {}).get(first) or {}
    kind = str(config.get("output_type") or "unknown means")
    figures = figures_of(raw["results"][task], task)
    shares = all(0 <= figure["value"] <= 1 for figure in figures.values())
    number = len(rows) or max(figure["n"] for figure in figures.values())
    shots = {(raw.get("n-shot") or {}).get(leaf) for leaf in leaves}
    chat = raw.get("chat_template_sha")
    by_task = {} if list(leaves) == [task] else {"task": {
        leaf: _with_intervals(figures_of(raw["results"].get(leaf) or {}, leaf), 0, shares)
        for leaf in leaves}}
    return {
        "title": str(raw["results"][task].get("alias") or task).strip(" -"),
        "rule": f"{log.harness} {_version(log.harness, raw)}".strip(),
        "rule_version": (raw.get("versions") or {}).get(task),
        "prompt_hash": prompt_hash(rows) if rows else None, "n": number, "parse_failures": sum(
            row["read"] is None for row in rows),
        "figures": _with_intervals(figures, number, shares), "decimals": 1 if shares else None,
        "answers": f"{task}.jsonl", "by_tag": by_task,
        "questions_hash": questions_hash(rows) if rows else None,
        "answering": {
            "method": METHODS.get(kind, kind),
            "num_fewshot": shots.pop() if len(shots) == 1 else sorted(shots, key=str),
            "limit": (raw.get("config") or {}).get("limit"),
            "apply_chat_template": None if log.harness == LMMS_EVAL else chat is not None,
            "generation": config.get("generation_kwargs")},
    }


def _with_intervals(figures: Mapping[str, Mapping[str, Any]], n: int, shares: bool
                    ) -> dict[str, dict[str, Any]]:
    return {name: vars(known(figure["value"], figure["stderr"], figure["n"] or n, shares))
            for name, figure in figures.items()}


# ----- samples ------------------------------------------------------------------------------


def _rows(log: Log, task: str, raw: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    figures = figures_of(raw["results"].get(task) or {}, task)
    metric, _, kept = next(iter(figures), "").partition(",")
    read = _of_lmms_eval if log.harness == LMMS_EVAL else _of_lm_eval
    for line, where in read_lines_of(log.samples[task]):
        if line.get("filter", "none") == (kept or "none"):
            score = _score(line.get(metric))
            yield {"id": f"{task}/{line['doc_id']}", "group": "", **read(line, metric, where),
                   "score": score, "tags": {"task": task}}


def read_lines_of(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    for where, line in read_lines(path):
        yield need(line, where, SAMPLE), where


def _score(value: Any) -> float | None:
    """A number, or what lmms-eval's tasks keep of a question; None where only all together have
    one."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in SCORES if key in value), None)
    return float(value) if isinstance(value, (bool, int, float)) and math.isfinite(value) else None


def _of_lm_eval(line: Mapping[str, Any], metric: str, where: str) -> dict[str, Any]:
    arguments = [list(args.values()) for args in line["arguments"].values()]
    prompts = dict.fromkeys(str(args[0]) for args in arguments)
    choices = [str(args[1]).strip() for args in arguments] if len(arguments) > 1 and all(
        len(args) > 1 and isinstance(args[1], str) for args in arguments) else []
    if choices and len({*choices}) < len(choices):
        # they stand in the question, which ends with one, and what follows is the same
        choices = [prompt.rpartition("\n\n")[2] for prompt in prompts]
    said = chosen(line, choices, metric) if choices else generated(line)
    target = line.get("target", "")
    gold = choices[int(target)] if choices and str(target).isdecimal() and \
        int(target) < len(choices) else str(target)
    return {"prompt": "\n".join(prompts), **said, "answers": [gold]}


def _of_lmms_eval(line: Mapping[str, Any], metric: str, where: str) -> dict[str, Any]:
    read = line["filtered_resps"]
    while isinstance(read, list) and len(read) == 1:
        read = read[0]
    text = read if isinstance(read, str) else json.dumps(read, ensure_ascii=False)
    own = line.get("resps", text)
    while isinstance(own, list) and own:
        own = own[0]
    prompt = line.get("input", "")
    return {"prompt": prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False),
            "answer": str(own), "read": text if text.strip() else None,
            "answers": _listed(line.get("target", ""))}


def _listed(target: Any) -> list[str]:
    """lmms-eval writes lists of accepted answers as Python prints them."""
    if isinstance(target, str) and target[:1] == "[":
        try:
            values = ast.literal_eval(target)
        except (ValueError, SyntaxError):
            return [target]
        return [str(value) for value in values]
    return [str(target)]
