"""Folders as `distill` and `evaluate` write them, with figures that are known."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from taid_vlm.evaluation.answers import FILE, to_lines
from taid_vlm.evaluation.held_out import ALL, AnswerTotals, Tally, summarise
from taid_vlm.io.files import write_json
from taid_vlm.runs.results import Results

VERSIONS = {"python": "3.11", "taid-vlm": "0.1.0", "torch": "2.15"}
MACHINE = {"device": "cpu", "threads": 1}
START = {"kl": 0.6, "nll": 1.2, "agreement": 0.6, "reverse_kl": 0.9, "jsd": 0.2, "ece": 0.1,
         "head_mass": 0.9, "tail_mass": 1e-3, "student_entropy": 0.8, "token_accuracy": 0.5}
GOAL = {"kl": 0.0, "nll": 0.4, "agreement": 1.0, "reverse_kl": 0.0, "jsd": 0.0, "ece": 0.0,
        "head_mass": 1.0, "tail_mass": 1e-6, "student_entropy": 0.3, "token_accuracy": 0.9}
TEACHERS = {"teacher_nll": 0.4, "teacher_entropy": 0.3, "teacher_head_mass": 1.0,
            "teacher_tail_mass": 1e-6}


def answers(gain: float, seed: int | None, records: int = 60) -> list[AnswerTotals]:
    """A student that has gone `gain` of the way; `seed` gives every answer its own chance."""
    hard = np.random.default_rng(0)
    luck = np.random.default_rng(1000 if seed is None else seed)
    made = []
    for index in range(records):
        for turn in range(1 + index % 2):
            tokens, shift = int(hard.integers(2, 12)), float(hard.normal(1.0, 0.25))
            chance = 0.0 if seed is None else float(luck.normal(0.0, 0.02))
            totals = {name: tokens * (shift * (start + gain * (GOAL[name] - start)) +
                                      chance * abs(GOAL[name] - start))
                      for name, start in START.items() if name != "ece"}
            totals |= {name: tokens * shift * value for name, value in TEACHERS.items()}
            made.append(AnswerTotals(f"eval.jsonl:{index + 1}", turn, ("odd", "even")[index % 2],
                                     tokens, totals))
    return made


def tally(found: Sequence[AnswerTotals]) -> dict[str, Any]:
    made = Tally(tokens=Counter(aligned=1, supervised=1))
    for answer in found:
        for name, total in answer.totals.items():
            for part in (ALL, answer.category):
                made.table[part][name].add(total, answer.tokens)
    return summarise(made)


def distillation(
    folder: Path, gain: float = 0.5, seed: int = 0, records: int = 60, **changes: Any
) -> Path:
    """A finished run; `changes` replace keys of results.json, dots go inside."""
    before, after = answers(0.0, None, records), answers(gain, 17 + seed, records)
    bins = [{"tokens": 9, "confidence": 0.4, "accuracy": 0.5}]
    sure = [{"ece": error, "ece_stderr": 0.01, "calibration": bins}
            for error in (0.1, 0.1 - 0.05 * gain)]
    results: dict[str, Any] = {
        "schema": 2, "kind": "distillation", "objective": {"name": "taid"}, "seed": seed,
        "recipe_hash": "abcd", "canary": None, "alignment": None, "stages": [],
        "data": {"eval": {"path": "eval.jsonl", "split": "train", "records": records,
                          "sha256": "d" * 16}},
        "eval": {"before": tally(before) | sure[0], "after": tally(after) | sure[1]},
        "models": {"teacher": {"name": "big", "model_type": "llama", "parameters": 8_000_000},
                   "student": {"name": "small", "model_type": "llama", "parameters": 1_000_000}},
        "train": {"steps": 100, "seconds": 60.0, "answer_tokens": 5000, "resumed_from": None,
                  "records_left_out": {}, "texts_cut": 0, "t": 1.0, "alpha": 0.1,
                  "adaptive_share": 0.5, "skipped_updates": 0, "loss_implementation": None},
        "memory": {"peak_rss_bytes": 2**30}, "machine": MACHINE, "versions": VERSIONS,
        "history": [{"step": step, "loss": 1 / step, "kl": 0.5, "t": 0.4 + step / 200}
                    for step in (50, 100)],
        "examples": [{"source": "eval.jsonl:1", "turn": 0, "category": "odd", "prompt": "what?",
                      "reference": "red", "answers": {"teacher": "red", "before": "blue",
                                                      "after": "red" if gain > 0.4 else "dot"}}],
    }
    folder.mkdir(parents=True)
    (folder / FILE).write_text(to_lines(before, after), encoding="utf-8")
    Results.model_validate(changed(results, changes)).write(folder / "results.json")
    return folder


def evaluation(
    folder: Path, scores: Sequence[float], task: str = "charts", groups: Sequence[str] = (),
    name: str | None = None, **changes: Any,
) -> Path:
    """A finished evaluation of one benchmark, whose figure is the mean score."""
    value = sum(scores) / len(scores)
    entry = {
        "title": task.capitalize(), "benchmark": task, "rule": "official", "rule_version": 1,
        "source": {"path": "charts.parquet", "split": "test", "sha256": "e" * 64},
        "prompt_hash": "f" * 16, "n": len(scores), "parse_failures": 1,
        "answering": {"method": "generate", "max_new_tokens": 8}, "decimals": 1,
        "figures": {"accuracy": {"value": value, "stderr": 0.03, "n": len(scores)}},
        "by_tag": {"kind": {kind: {"accuracy": {"value": value, "stderr": 0.05, "n": 10}}
                            for kind in ("bar", "pie")}},
        "answers": f"answers/{task}.jsonl", "seconds": 1.0,
    }
    results = {
        "schema": 1, "kind": "evaluation", "name": folder.name, "seed": 0,
        "model": {"name": name or folder.name, "parameters": 10}, "tasks": {task: entry},
        "versions": VERSIONS, "machine": MACHINE, "memory": {}, "seconds": 1.0,
    }
    lines = [{"id": str(i), "group": groups[i] if groups else "", "prompt": f"<image>how {i}?",
              "answer": f"a{i}", "read": "a", "score": score, "answers": ["yes"], "tags": {}}
             for i, score in enumerate(scores)]
    (folder / "answers").mkdir(parents=True)
    write_json(changed(results, changes), folder / "results.json")
    (folder / "answers" / f"{task}.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines))
    return folder


def changed(results: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`train__steps=5` sets results["train"]["steps"]."""
    for path, value in changes.items():
        *above, last = path.split("__")
        place = results
        for key in above:
            place = place[key]
        place[last] = value
    return results
