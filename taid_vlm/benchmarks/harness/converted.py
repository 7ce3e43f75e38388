"""What lm-eval gives back, in the form of an evaluation's results.json and answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from taid_vlm.benchmarks.harness.suites import SUITES, member_of
from taid_vlm.evaluation.statistics import Estimate, mean_of_estimates
from taid_vlm.io.hashing import text_hash

INVALID = "[invalid]"  # what lm-eval's extracting filters put in place of an answer
Raw = Mapping[str, Any]  # what lm_eval.evaluate returns


def figures_of(entry: Mapping[str, Any], task: str) -> dict[str, dict[str, Any]]:
    """A task's or group's figures, the headline first.

    Args:
        entry: {"acc,none": 0.5, "acc_stderr,none": 0.1, ...}; the filter "none" is left out of
            names, others stay ("exact_match,strict-match").
    """
    figures: dict[str, dict[str, Any]] = {}
    for key, value in entry.items():
        metric, comma, name = key.partition(",")
        if comma and isinstance(value, (int, float)) and "_stderr" not in metric:
            stderr = entry.get(f"{metric}_stderr,{name}")
            figures[metric if name == "none" else key] = {
                "value": float(value), "n": int(entry.get("sample_len", 0)),
                "stderr": float(stderr) if isinstance(stderr, (int, float)) else math.nan}
    member = member_of(task)
    first = [member.figure] if member is not None and member.figure in figures else []
    return {name: figures[name] for name in (*first, *figures)}


def average(suite: str, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of a suite's figures, one per task; tasks are independent samples."""
    members = SUITES[suite]
    parts = [Estimate(**tasks[m.task]["figures"][m.figure]) for m in members]
    return {
        "figures": {"average": vars(mean_of_estimates(parts))},
        "of": {m.task: m.figure for m in members},
    }


def rows_of(task: str, samples: Sequence[Mapping[str, Any]], headline: str,
            choices_of: Callable[[Any], Sequence[str]] | None = None,
            place_of: Callable[[Any], int] | None = None) -> list[dict[str, Any]]:
    """One row per question, as answers/NAME.jsonl holds them.

    Args:
        samples: lm-eval's, of one task; every filter has its own.
        headline: the figure that `score` is a summand of.
        choices_of: a document -> its choices; None where there are none.
        place_of: a document -> the place of its right choice, where the choices stand in the
            question (Winogrande) and the target is what follows them all.
    """
    metric, _, kept = headline.partition(",")
    rows = []
    for sample in samples:
        if sample["filter"] != (kept or "none"):
            continue
        choices = choices_of(sample["doc"]) if choices_of else None
        said = chosen(sample, choices, metric) if choices else generated(sample)
        score = sample.get(metric)
        rows.append({
            "id": f"{task}/{sample['doc_id']}", "group": "",
            "prompt": "\n".join(dict.fromkeys(str(args[0]) for args in sample["arguments"])),
            **said, "score": float(score) if isinstance(score, (int, float)) else None,
            "answers": _gold(sample, choices, place_of), "tags": {"task": task},
        })
    return rows


def entry_of(task: str, raw: Raw, rows: Sequence[Mapping[str, Any]], **more: Any
             ) -> dict[str, Any]:
    """What results.json says of one task or group; `more` is added as it is."""
    member, figures = member_of(task), figures_of(raw["results"][task], task)
    shares = all(0 <= figure["value"] <= 1 for figure in figures.values())
    return {
        "title": member.title if member else str(raw["results"][task].get("alias", task)),
        "rule_version": raw["versions"].get(task),
        "prompt_hash": prompt_hash(rows), "n": len(rows),
        "parse_failures": sum(row["read"] is None for row in rows),
        "figures": figures, "decimals": 1 if shares else None,
        "answers": f"answers/{task}.jsonl", **more,
    }


def prompt_hash(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of all prompts, solved examples included, in order."""
    return text_hash("".join(row["prompt"] + "\0" for row in rows))


def questions_hash(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of all questions' names and right answers, in order."""
    return text_hash("".join(f"{row['id']}\0{row['answers']}\0" for row in rows))


def too_long(samples: Sequence[Mapping[str, Any]], encode: Callable[[str], Sequence[int]],
             max_length: int, max_gen_toks: int) -> int:
    """How many questions lm-eval had to cut at the start, so that examples or worse are missing.

    Args:
        encode: text -> tokens, as lm-eval does it.
        max_length: tokens the model takes; max_gen_toks: what an answer may take, where a task
            does not say.
    """
    lengths: dict[str, int] = {}
    cut: set[Any] = set()
    for sample in samples:
        for prompt, more in sample["arguments"]:  # a continuation, or how to generate one
            text, room = (prompt + more, max_length + 1) if isinstance(more, str) else \
                (prompt, max_length - int(more.get("max_gen_toks", max_gen_toks)))
            if text not in lengths:
                lengths[text] = len(encode(text))
            if lengths[text] > room:
                cut.add((sample["doc_id"], sample["doc_hash"]))
    return len(cut)


def chosen(sample: Mapping[str, Any], choices: Sequence[str], metric: str) -> dict[str, Any]:
    """The likeliest choice, per character where the figure is normalised so."""
    scores = [float(said[0]) for said in sample["filtered_resps"]][: len(choices)]
    lengths = {"acc_norm": len, "acc_bytes": lambda text: len(text.encode())}.get(metric)
    weighed = [score / max(lengths(text), 1) if lengths else score
               for score, text in zip(scores, choices, strict=True)]
    best = str(choices[weighed.index(max(weighed))])
    return {"answer": best, "read": best, "choices": list(choices), "likelihoods": scores}


def generated(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The raw text and what the filter took out of it; likelihood tasks have no text."""
    said, read = sample["resps"][0][0], sample["filtered_resps"][0]
    if not isinstance(said, str):
        first = said[0] if isinstance(said, (list, tuple)) else said
        return {"answer": "", "read": "", "likelihoods": [float(first)]}
    return {"answer": said, "read": None if read == INVALID or not str(read).strip() else read}


def _gold(sample: Mapping[str, Any], choices: Sequence[str] | None,
          place_of: Callable[[Any], int] | None) -> list[str]:
    target = sample["target"] if place_of is None else place_of(sample["doc"])
    listed = target if isinstance(target, list) else [target]
    return [str(choices[item]) if choices and isinstance(item, int) else str(item)
            for item in listed]
