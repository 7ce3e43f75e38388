"""Small models through the ordinary recipe path: drawn scenes, and plain text from scratch."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from miniature.crew import Jobs
from miniature.pooling import PER_TOKEN, as_json, pool, pool_difference, sums
from miniature.scale import Models
from taid_vlm.compare.measures import BASE, TEACHER
from taid_vlm.config.recipe import parse_recipe
from taid_vlm.demo.arms import WORLDS, Arm, World, carry_out
from taid_vlm.demo.truth import QUESTIONS, caption_entropies
from taid_vlm.evaluation.answers import AnswerPair, Totals
from taid_vlm.evaluation.statistics import Pooled
from taid_vlm.io.jsonl import dump_lines, read_lines
from taid_vlm.runs.run import distill

START = "Warm start"
SCENES: dict[str, dict[str, Any]] = {
    "SFT": {"name": "sft"}, "KL": {"name": "forward_kl"}, "RKL": {"name": "reverse_kl"},
    "JSD": {"name": "jsd"}, "TAID": {"name": "taid"},
}
TEXT = {name: SCENES[name] for name in ("SFT", "KL", "RKL", "TAID")}
FIGURES = {"scenes": ("kl", "agreement", "nll", "caption_kl", "accuracy"),
           "text": ("kl", "agreement", "nll")}


# ----- one arm -----------------------------------------------------------------------------------


def run_arm(arm: Arm) -> dict[str, Any]:
    """Carry out an arm of the demo; what came of it as plain data, for `pooling.sums`.

    `start` holds the same of the student before training.
    """
    method = carry_out(arm)
    out: dict[str, Any] = {"answers": []}
    for evaluation in method.evaluations:
        task = evaluation.results["tasks"][QUESTIONS.name]
        out = {"accuracy": {"": task["figures"]["accuracy"], **{
            category: figures["accuracy"] for category, figures in
            task["by_tag"]["category"].items()}}, "answers": [
            {"source": row["group"], "right": row["score"] == 1, **row["tags"]}
            for row in evaluation.answers(QUESTIONS.name)]}
    if not method.runs:
        return out
    (run,) = method.runs
    before, after = run.results.eval.before, run.results.eval.after
    assert before is not None
    assert after is not None
    alignment = run.results.alignment
    return {
        **out, "figures": after.model_dump(), "losses": [_loss(a, a.after) for a in run.answers],
        "start": {"figures": before.model_dump(),
                  "losses": [_loss(a, a.before) for a in run.answers]},
        "recipe_hash": run.results.recipe_hash, "history": run.results.history,
        "alignment": alignment and f"case {alignment.case}: {alignment.reason}",
        "adaptive_share": run.results.train.adaptive_share,
        "left_out": run.results.train.records_left_out,
    }


def _loss(answer: AnswerPair, totals: Totals) -> dict[str, Any]:
    """One answer's likelihoods under both models, KL and agreement, summed over its tokens."""
    return {"source": answer.key[0], "category": answer.category, "tokens": answer.tokens,
            "teacher_nll": answer.teacher["teacher_nll"],
            **{name: totals[name] for name in PER_TOKEN}}


def with_starts(found: Mapping[Any, Any], kind: str, seeds: int) -> dict[Any, Any]:
    """With what the students of so many seeds were before training, as arms of their own."""
    trained = {key[2]: run["start"] for key, run in found.items()
               if key[0] == kind and "start" in run}
    starts = {(kind, START, seed): {"answers": [], **trained[seed],
                                    **found.get((kind, START, seed), {})}
              for seed in range(seeds)}
    return {**found, **starts}


# ----- instruction: drawn scenes, from the warm start --------------------------------------------


def scene_jobs(models: Models, data: Path, output: Path) -> Jobs:
    """Every arm with every seed, and once the answers of the warm start and the teacher."""
    world = replace(WORLDS[0], steps=models.steps, records=models.records,
                    questions=models.questions, examples=0)

    def job(name: str, seed: int, row: str) -> Callable[[], Any]:
        return partial(run_arm, Arm(world, row, data, data / "models", output / f"seed-{seed}",
                                    seed, SCENES.get(name)))

    jobs = {("scenes", name, seed): job(name, seed, name)
            for seed in range(models.seeds) for name in SCENES}
    return {**jobs, ("scenes", START, 0): job(START, 0, BASE),
            ("scenes", TEACHER, 0): job(TEACHER, 0, TEACHER)}


def scene_truth(data: Path) -> dict[str, float]:
    """Entropies of the held-out captions, by record."""
    return caption_entropies(WORLDS[0].held_out(data))


# ----- pre-training: plain text, from random weights ---------------------------------------------


def text_world(models: Models) -> World:
    """The learning rate is the one that the demo's own students were pre-trained with."""
    return World("text", "Plain text", "jsonl", models.steps, learning_rate=3e-3,
                 records=models.records, questions=0, examples=0)


def prepare_text(models: Models, data: Path, output: Path) -> dict[str, Any]:
    """Texts, untrained students (one per seed), and a teacher that has learned such texts.

    A text is a scene told in words and its retelling, without a chat's marks. The teacher is the
    demo's, taught further with a recipe of its own. Returns its account of the training.
    """
    sys.path.insert(0, str(data))  # the demo's models are described beside its data
    from worlds import models as demo_models

    for split in ("train", "eval"):
        _write_texts(data / "words" / f"{split}.jsonl", output / "text" / f"{split}.jsonl")
    results = distill(parse_recipe({
        "student": {"model_name_or_path": str(data / "models" / "words-teacher")},
        "data": {"train": str(output / "text" / "train.jsonl"),
                 "eval": {"path": str(output / "text" / "eval.jsonl"),
                          "max_records": models.records}},
        "objective": {"name": "sft"},
        "train": {
            "max_steps": models.steps, "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 50, "learning_rate": 1e-3, "seed": 0,
            "lr_scheduler_type": "cosine", "warmup_steps": 10, "save_strategy": "no",
            "disable_tqdm": True, "use_cpu": True,
        },
        "output_dir": str(output / "teacher"),
    })).results
    for seed in range(models.seeds):
        folder = output / "models" / f"seed-{seed}"
        shutil.copytree(output / "teacher" / "student", folder / "text-teacher",
                        dirs_exist_ok=True)
        demo_models.save(folder / "text-student", *demo_models.build("words-student", seed))
    return {"eval": results.eval.model_dump(), "train": results.train.model_dump()}


def _write_texts(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(dump_lines({"text": plain_text(row)} for _, row in read_lines(source)))


def plain_text(row: Mapping[str, Any]) -> str:
    """A conversation of the world of words as a text: the telling, and the retelling."""
    telling = row["messages"][0]["content"].split(". ", 1)[0]
    answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
    return f"{telling}. {answers[row['categories'].index('caption')]}."


def text_jobs(models: Models, output: Path) -> Jobs:
    """Every arm with every seed; after `prepare_text`."""
    world = text_world(models)
    return {("text", name, seed): partial(run_arm, Arm(
                world, name, output, output / "models" / f"seed-{seed}",
                output / f"seed-{seed}", seed, objective))
            for seed in range(models.seeds) for name, objective in TEXT.items()}


# ----- several seeds in one figure ---------------------------------------------------------------


class Arms:
    """What all seeds of a world's arms have measured."""

    def __init__(self, kind: str, found: Mapping[Any, Any], truth: Mapping[str, float]) -> None:
        self.kind, self.truth = kind, truth
        self.runs: dict[str, list[dict[str, Any]]] = {}
        for key, run in found.items():
            if key[0] == kind:
                self.runs.setdefault(key[1], []).append(run)
        answers = self.runs.pop(TEACHER, [{"answers": []}])[0]["answers"]
        self.runs[TEACHER] = [{"answers": answers, "losses": [
            {**{k: loss[k] for k in ("source", "tokens", "category")}, "nll": loss["teacher_nll"]}
            for loss in self.runs[START][0]["losses"]]}]

    @property
    def trained(self) -> list[str]:
        return [arm for arm in self.runs if arm not in (START, TEACHER)]

    def figure(self, arm: str, figure: str) -> Pooled | None:
        """None for what is not measured of a teacher against itself."""
        runs = self._sums(arm, figure)
        return pool(runs) if all(runs) else None

    def difference(self, first: str, second: str, figure: str) -> Pooled:
        """Paired by seed and record; an arm of one seed (the start) stands against every seed."""
        a, b = self._sums(first, figure), self._sums(second, figure)
        return pool_difference(a, b * len(a) if len(b) == 1 else b)

    def _sums(self, arm: str, figure: str) -> list[Any]:
        return [sums(run, figure, self.truth) for run in self.runs[arm]]

    def as_json(self) -> dict[str, Any]:
        """Per arm: pooled figures, every seed's own, and the recipe that repeats it."""
        return {arm: {
            "pooled": {name: as_json(found) for name in FIGURES[self.kind]
                       if (found := self.figure(arm, name))},
            "seeds": [_account(run) for run in runs if arm != TEACHER],
        } for arm, runs in self.runs.items()}


def _account(run: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("figures", "accuracy", "recipe_hash", "adaptive_share", "alignment", "left_out")
    return {name: run[name] for name in kept if name in run} | {
        "history": list(_history(run.get("history", ())))}


def _history(rows: Sequence[Mapping[str, Any]]) -> Any:
    for row in rows:
        kept = {key: row[key] for key in ("step", "loss", "kl", "agreement", "t") if key in row}
        if len(kept) > 1:
            yield kept
