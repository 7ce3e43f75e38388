"""Benchmarks carried out: questions in; answers/NAME.jsonl and results.json out.

What can be wrong is found before weights are loaded, answers are on disk as soon as they are
given, and what is asked again under the same settings is not answered again: another rule over
the same answers takes seconds.
"""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from taid_vlm.benchmarks.answering import Answer, Answerer, Generating
from taid_vlm.benchmarks.asking import Asking, Task
from taid_vlm.benchmarks.candidates import Candidate, LocalModel, ServedModel
from taid_vlm.benchmarks.judge import Judge, judge_answers
from taid_vlm.benchmarks.likelihood import Choosing
from taid_vlm.benchmarks.remote import Remote
from taid_vlm.benchmarks.scoring import (
    KIND,
    by_tag,
    check_results,
    counts,
    figures,
    judge,
    lines,
    summary,
)
from taid_vlm.benchmarks.store import FOLDER, AnswerStore, flat
from taid_vlm.benchmarks.suite import SUITES, average
from taid_vlm.errors import TaidError
from taid_vlm.io.endpoint import Endpoint
from taid_vlm.io.files import write_json
from taid_vlm.io.folders import refuse_file_in_the_way
from taid_vlm.models.loading import load_model

logger = logging.getLogger(__name__)


# ----- before the weights -------------------------------------------------------------------


def prepare(
    candidate: Candidate, tasks: Sequence[Task], asking: Asking
) -> LocalModel | ServedModel:
    """The model without its weights; raises TaidError where it cannot be asked these questions."""
    if asking.method == "likelihood":
        for task in tasks:
            _check_choices(task, asking)
        if isinstance(candidate.source, Endpoint):
            raise TaidError("--method likelihood needs a model on this machine: chat completions "
                            "do not tell how likely a given answer is.")
    if isinstance(candidate.source, Endpoint):
        return ServedModel(candidate.source)
    model = LocalModel(candidate.source)
    for task in tasks if not model.adapter.sees_images else ():
        for question in (question for question in task.questions if question.images):
            raise TaidError(
                f"--model '{candidate.name}' ({model.config.model_type}) is a text model, but "
                f"{task.benchmark.name} asks about images (question '{question.id}'); choose a "
                "model with vision, or text benchmarks.")
    return model


def _check_choices(task: Task, asking: Asking) -> None:
    name = task.benchmark.name
    if not task.benchmark.likelihood:
        raise TaidError(f"--method likelihood: {name} is not answered by choosing; use generate.")
    without = [question.id for question in task.questions if len(question.choices) < 2
               or (asking.choose_by == "text" and not all(map(str.strip, question.choices)))]
    if without:
        raise TaidError(f"--method likelihood: {len(without)} of {len(task.questions)} questions "
                        f"of {name} have no choices to read (the first: '{without[0]}'); use "
                        "generate.")


def _check_folder(folder: Path) -> dict[str, Any]:
    """The results of an earlier evaluation in this folder, {} where there are none."""
    refuse_file_in_the_way(folder)
    path = folder / "results.json"
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TaidError(f"'{path}' is not valid JSON ({error}); remove it.") from None
    if not isinstance(results, dict) or results.get("kind") != KIND:
        raise TaidError(f"--output-dir = '{folder}' holds the results of something else; choose "
                        "another folder.")
    return check_results(results, path)


# ----- carried out --------------------------------------------------------------------------


def evaluate(
    candidates: Sequence[Candidate], tasks: Sequence[Task], output_dir: str | Path,
    asking: Asking | None = None, judge_model: Judge | None = None, suites: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Every model's answers to every task, judged.

    Touches no random state. What was answered before under the same settings is not asked again.

    Args:
        judge_model: asked by those rules that need a language model; without it their answers have
            no score.
        suites: names of `suite.SUITES` whose average stands in the results, of the tasks here and
            those that the folders hold.

    Returns:
        By model what was written to `output_dir/results.json`, with several models to
        `output_dir/NAME/results.json`. A task's `seconds` are those that its answers took, over
        all calls and processes.

    Raises:
        TaidError: anything a user can mend, before weights are loaded where it can show there.
    """
    asking, output = asking or Asking(), Path(output_dir).expanduser()
    if judge_model is not None:
        judge_model.check(tasks)
    folders = {candidate.name: output / candidate.name if len(candidates) > 1 else output
               for candidate in candidates}
    earlier = {name: _check_folder(folder) for name, folder in folders.items()}
    models = {candidate.name: prepare(candidate, tasks, asking) for candidate in candidates}
    each = [_Evaluation(name, model, folders[name], asking, earlier[name], judge_model, suites)
            for name, model in models.items()]
    processes().wait_for_everyone()  # every process has read what the main one will replace
    return {one.name: one.run(tasks) for one in each}


def processes() -> PartialState:
    """Those that accelerate or torchrun started; on a CPU it has to be told that this is meant."""
    return PartialState(cpu=not torch.accelerator.is_available())


class _Evaluation:
    """One model's evaluation; its weights are loaded when a question needs them."""

    def __init__(self, name: str, model: LocalModel | ServedModel, folder: Path, asking: Asking,
                 earlier: Mapping[str, Any], judge_model: Judge | None = None,
                 suites: Sequence[str] = ()) -> None:
        self.name, self.model, self.folder, self.asking = name, model, folder, asking
        self.judge = judge_model
        self.suites = dict.fromkeys([*earlier.get("suites", {}), *suites])
        self.state, self.described = processes(), model.describe()
        self.loaded: Any = None
        self.earlier = dict(earlier.get("tasks", {}))
        was = flat(earlier.get("model", {}))
        if self.earlier and not flat(model.identity).items() <= was.items():
            logger.warning("'%s' holds results of another model (%s); they are replaced.", folder,
                           was.get("name"))
            self.earlier = {}

    def run(self, tasks: Sequence[Task]) -> dict[str, Any]:
        started, entries = time.perf_counter(), dict(self.earlier)
        for task in tasks:
            entries[task.benchmark.name] = self._carry_out(task)
            of_suites = {suite: average(suite, entries) for suite in self.suites if suite in SUITES}
            results = summary(self.name, self.described, entries, self.asking.seeds[0], started,
                              self.state.num_processes,
                              **({"suites": of_suites} if of_suites else {}))
            if self.state.is_main_process:
                write_json(results, self.folder / "results.json")
        self.loaded = None
        if torch.cuda.is_available():  # room for the next model
            gc.collect()
            torch.cuda.empty_cache()
        self.state.wait_for_everyone()
        return results

    def _carry_out(self, task: Task) -> dict[str, Any]:
        name, settings = task.benchmark.name, self.asking.settings(task.benchmark)
        store = AnswerStore(self.folder, name, self._identity(settings), task.hashes,
                            self.state.process_index)
        before = self.earlier.get(name)
        answering = dict(before.get("answering") or {}) if before else {}
        answering.pop("seeds", None)
        store.load(before and self._identity(answering))
        if store.replaced and self.state.is_main_process:
            logger.warning("%s: answers from before are not used: %s.", name,
                           "; ".join(store.replaced))
        seconds = before.get("seconds", 0.0) if before and store.reused else 0.0
        self.state.wait_for_everyone()
        self._answer(task, store)
        self.state.wait_for_everyone()
        store.gather()
        self.state.wait_for_everyone()
        answers = {seed: [store.answers[question.id, seed].answer for question in task.questions]
                   for seed in self.asking.seeds}
        seconds += sum(stored.seconds for stored in store.answers.values())
        return self._judged(task, store, answers, settings, seconds)

    def _identity(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self.model.identity, "answering": settings}

    def _answer(self, task: Task, store: AnswerStore) -> None:
        """Ask what has no answer yet; nothing is loaded where that is nothing."""
        seeds, questions = self.asking.seeds, task.questions
        done = {seed: {question.id for question in questions
                       if (question.id, seed) in store.answers} for seed in seeds}
        known = sum(map(len, done.values()))
        if known == len(questions) * len(seeds):
            return
        answerer = self._answerer(task)
        store.open()
        shown = None if self.state.is_main_process else True  # None: where a terminal is
        with tqdm(total=len(questions) * len(seeds), initial=known, unit="question", disable=shown,
                  desc=f"{self.name}: {task.benchmark.name}") as bar:
            for seed in seeds:
                since = time.perf_counter()
                for given in answerer.answers(questions, done[seed], seed):
                    now = time.perf_counter()
                    store.add(given, seed, now - since)
                    bar.update(sum(question.id not in done[seed] for question, _ in given))
                    since = now

    def _answerer(self, task: Task) -> Answerer:
        asking, settings = self.asking, self.asking.settings(task.benchmark)
        rest = {key: value for key, value in settings.items() if key != "method"}
        if isinstance(self.model, ServedModel):
            return Remote(self.model.endpoint, asking.batch_size, **rest)
        if self.loaded is None:
            self.loaded = load_model(self.model.spec, "model").to(self.state.device)
        kind: Callable[..., Answerer] = Choosing if asking.method == "likelihood" else Generating
        process = (self.state.process_index, self.state.num_processes)
        return kind(self.loaded, self.model.adapter, asking.batch_size, process, **rest)

    def _judged(
        self, task: Task, store: AnswerStore, answers: Mapping[int, Sequence[Answer]],
        settings: Mapping[str, Any], seconds: float,
    ) -> dict[str, Any]:
        rule, benchmark, source = task.rule, task.benchmark, task.source
        before = self.earlier.get(benchmark.name) or {}
        replies, judge_model = (None, {}) if rule.prompt is None or self.judge is None else \
            judge_answers(self.judge, task, answers, self.folder, before.get("judge"), self.state)
        judged = {seed: judge(rule, task.questions, each, replies, seed)
                  for seed, each in answers.items()}
        entry = {
            "title": benchmark.title, "benchmark": benchmark.file or benchmark.name,
            "rule": rule.name, "rule_version": rule.version, "rule_source": rule.source,
            "source": {"path": source.path, "name": source.name, "split": source.split,
                       "max_records": source.max_records, "sha256": task.sha256},
            **task.video_frames, "prompt_hash": task.prompt_hash, "left_out": dict(task.left_out),
            **({"judge": judge_model} if judge_model else {}), **counts(answers, judged),
            "answering": {**settings, "seeds": list(self.asking.seeds)},
            "figures": figures(rule, judged), "by_tag": by_tag(rule, judged),
            "decimals": benchmark.decimals, "answers": f"{FOLDER}/{benchmark.name}.jsonl",
            "seconds": seconds,
        }
        if self.state.is_main_process:
            store.finish(lines(task.questions, task.hashes, answers, judged))
        return entry
