"""Finished arms on disk, and what they amount to: means over seeds, differences, what is open."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.arms import Tree
from miniature.pooling import Sums, pool, pool_difference

from real_pairs.plan import BLOCKS, PAIRS, Arm, Block, block_arms, tuning_arms
from taid_vlm.evaluation.statistics import Part, Pooled, reach
from taid_vlm.io.files import read_json, write_json

COMPARED = ("kl", "reverse_kl", "agreement", "nll")
RIVALS = ("kl", "taid")
CATEGORIES = ("gsm8k", "text", "prompts")


class Results:
    """Results of the arms in a folder, by arm."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "arms"
        self.read: dict[Arm, Tree] = {}

    def __contains__(self, arm: Arm) -> bool:
        return self._path(arm).is_file()

    def __getitem__(self, arm: Arm) -> Tree:
        if arm not in self.read:
            self.read[arm] = read_json(self._path(arm), "an arm")
        return self.read[arm]

    def add(self, arm: Arm, result: Tree) -> None:
        write_json(result, self._path(arm))

    def _path(self, arm: Arm) -> Path:
        return self.folder / f"{arm.name}.json"

    def validation(self, arm: Arm) -> float:
        """What rates are chosen by: KL both ways, which favours neither direction."""
        held_out = self[arm]["held_out"]
        return float(held_out["kl"] + held_out["reverse_kl"])

    def seconds_per_step(self, arms: Sequence[Arm]) -> float:
        """Of finished arms, all that belongs to one included; 0 without any."""
        done = [self[arm] for arm in arms if arm in self]
        steps = sum(result["steps"] for result in done)
        return float(sum(result["elapsed"] for result in done)) / steps if steps else 0.0


def document(options: Namespace, results: Results, arms: Sequence[Arm]) -> Tree:
    """All that the table says, as plain data."""
    folder = options.folder
    settings = read_json(folder / "settings.json", "settings")
    settings |= {key: Path(settings[key]).name for key in ("teacher", "other", "data")}
    pairs = {BLOCKS[name].pair for name in options.blocks}
    return {
        "command": options.command,
        "conditions": read_json(folder / "conditions.json", "conditions"),
        "settings": settings, "seeds": options.seeds, "steps": options.steps,
        "before": {pair: brief(read_json(path, "figures")["held_out"]) for pair in PAIRS
                   if pair in pairs and (path := folder / "before" / f"{pair}.json").is_file()},
        "candidates": sorted({f"{arm.rate:g}" for arm in arms if arm.rate is not None}, key=float),
        "rates": rates(results, arms),
        "blocks": {name: block_account(BLOCKS[name], results, options)
                   for name in options.blocks if not BLOCKS[name].again},
        "again": again(results, options),
        "arms": {arm.name: _account(results[arm]) for arm in arms if arm in results},
        "open": [arm.name for arm in arms if arm not in results]}


def _account(result: Tree) -> Tree:
    train = result["train"]
    kept = ("seconds", "cpu_seconds", "answer_tokens", "left_out", "loss", "peak_rss_bytes")
    return {"rate": result["rate"], "elapsed": result["elapsed"],
            "held_out": brief(result["held_out"]),
            "train": {key: train[key] for key in kept if key in train}}


def brief(held_out: Mapping[str, Any]) -> Tree:
    """What is compared and how sure it is, by category."""
    kept = ("n_tokens", "n_answers", "teacher_nll", *COMPARED,
            *(f"{figure}_stderr" for figure in COMPARED))
    return {category: {key: figures[key] for key in kept if key in figures}
            for category, figures in held_out["by_category"].items()}


def rates(results: Results, arms: Sequence[Arm]) -> dict[str, dict[str, float]]:
    """Validation figures, by pair and method and rate."""
    found: dict[str, dict[str, float]] = {}
    for arm in arms:
        if arm.rate is not None and arm in results:
            found.setdefault(f"{arm.pair}/{arm.method}", {})[f"{arm.rate:g}"] = \
                results.validation(arm)
    return found


def block_account(block: Block, results: Results, options: Namespace) -> Tree:
    """Methods of which all seeds are there, and their differences from KL and from TAID on the
    same pair, steps and seeds."""
    arms = block_arms(block, options.steps, options.seeds)
    steps, methods = arms[0].steps, {}
    for method in block.methods:
        runs = _runs(results, block.pair, method, steps, options.seeds)
        if runs:
            rivals = {rival: _runs(results, block.pair, rival, steps, options.seeds)
                      for rival in RIVALS if rival != method}
            methods[method] = {
                "rate": runs[0]["rate"], "figures": _each(lambda *which, own=runs: described(
                    pool([sums(run, *which) for run in own]))),
                "against": {rival: _each(lambda *which, own=runs, other=other: described(
                    pool_difference([sums(run, *which) for run in own],
                                    [sums(run, *which) for run in other])))
                            for rival, other in rivals.items() if other}}
    return {"title": block.title, "pair": block.pair, "steps": steps, "methods": methods}


def _runs(results: Results, pair: str, method: str, steps: int, seeds: int) -> list[Tree]:
    """A method's results, one a seed; none where a seed is missing."""
    arms = [Arm(pair, method, steps, seed) for seed in range(seeds)]
    return [results[arm] for arm in arms] if all(arm in results for arm in arms) else []


def _each(pooled: Any) -> dict[str, dict[str, Any]]:
    return {category: {figure: pooled(category, figure) for figure in COMPARED}
            for category in CATEGORIES}


def described(pooled: Pooled) -> Tree:
    """Value, both standard errors, and the 95 % interval: of the seeds' and of the records' error
    with Student's t of as many seeds, and of as many records."""
    half = reach([Part(pooled.stderr_seeds**2, pooled.seeds - 1),
                  Part(pooled.stderr_questions**2, pooled.n - 1)])
    return {"value": pooled.value, "over_seeds": pooled.stderr_seeds,
            "over_records": pooled.stderr_questions, "low": pooled.value - half,
            "high": pooled.value + half, "seeds": pooled.seeds, "records": pooled.n}


def sums(run: Mapping[str, Any], category: str, figure: str) -> Sums:
    """A figure's sums over every record of a category; all students see the same records."""
    return {str(index): (record.get(figure, 0.0), record["counts"].get(figure, record["tokens"]))
            for index, record in enumerate(run["records"])
            if record["category"] == category and figure in record}


def again(results: Results, options: Namespace) -> Tree | None:
    """Largest differences between an arm and its second run, where there is one."""
    arm = block_arms(BLOCKS["again"], options.steps, options.seeds)[0]
    first = Arm(arm.pair, arm.method, arm.steps, arm.seed)
    if arm not in results or first not in results:
        return None
    one, other = results[first], results[arm]
    return {"arm": first.name, "losses": max(
        abs(a - b) for a, b in zip(one["train"]["losses"], other["train"]["losses"], strict=True)),
        "figures": {name: abs(one["held_out"][name] - other["held_out"][name])
                    for name in COMPARED}}


def open_by_block(document: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Blocks that are not finished: title, how many of their arms are left, of how many."""
    left, steps, seeds = set(document["open"]), document["steps"], document["seeds"]
    for block in BLOCKS.values():
        arms = block_arms(block, steps, seeds)
        arms += [arm for method in block.methods
                 for arm in tuning_arms(block.pair, method, steps)]
        names = {arm.name for arm in arms}
        if names & left:
            yield block.title, len(names & left), len(names)
