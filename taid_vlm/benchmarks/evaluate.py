"""Benchmarks carried out: questions in; answers/NAME.jsonl and results.json out.

What can be wrong is found before weights are loaded, answers are on disk as soon as they are
given, and what is asked again under the same settings is not answered again: another rule over
the same answers takes seconds.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from taid_vlm.benchmarks.answering import Answer, Answerer, Generating
from taid_vlm.benchmarks.asking import Asking, Task
from taid_vlm.benchmarks.candidates import Candidate, LocalModel, ServedModel
from taid_vlm.benchmarks.judge import Judge, judge_answers
from taid_vlm.benchmarks.likelihood import Choosing
from taid_vlm.benchmarks.remote import Remote
from taid_vlm.benchmarks.scoring import (
    KIND,
    BySeed,
    by_tag,
    check_results,
    counts,
    doubt,
    figures,
    judge,
    lines,
    summary,
    thoughts_of,
)
from taid_vlm.benchmarks.store import FOLDER, AnswerStore, flat, keep_answers
from taid_vlm.benchmarks.suite import SUITES, average
from taid_vlm.errors import SampleDropped, TaidError
from taid_vlm.io.endpoint import Endpoint
from taid_vlm.io.files import write_json
from taid_vlm.io.folders import refuse_file_in_the_way
from taid_vlm.models.loading import load_model
from taid_vlm.runs.folders import locked

logger = logging.getLogger(__name__)
ALONE = (" A model that was trained on the questions alone has to be asked so: write prompt: "
         '"{question}" into the benchmark\'s file.')


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


def refuse_unaskable(task: Task) -> None:
    """Raise TaidError where no question has images that can all be loaded.

    In most data the first question has them, and no other is looked at.
    """
    problems: list[SampleDropped] = []
    for question in task.questions:
        try:
            for image in question.images:
                image.load()
        except SampleDropped as problem:
            problems.append(problem)
        else:
            return
    raise nothing_asked(task, Counter(problem.reason for problem in problems), str(problems[0]))


def nothing_asked(task: Task, reasons: Mapping[str, int], first: str = "") -> TaidError:
    """The error of a benchmark of which no question could be asked."""
    counted = ", ".join(f"{number} x {reason}" for reason, number in sorted(reasons.items()))
    return TaidError(
        f"{task.benchmark.name}: none of the {len(task.questions)} questions of "
        f"'{task.source.shown}' could be asked: {counted}"
        f"{f' (the first: {first})' if first else ''}.",
        mend="Image paths start from the folder that the data lies in." if first else "")


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
    processes()
    with contextlib.ExitStack() as held:
        for folder in dict.fromkeys((output, *folders.values())):
            held.enter_context(locked(folder))
        earlier = {name: _check_folder(folder) for name, folder in folders.items()}
        models = {candidate.name: prepare(candidate, tasks, asking) for candidate in candidates}
        for task in tasks:
            refuse_unaskable(task)
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
        keep_answers(store, task.questions, {seed: seed for seed in self.asking.seeds},
                     lambda: self._answerer(task), f"{self.name}: {name}",
                     self.state.is_main_process)
        self.state.wait_for_everyone()
        store.gather()
        self.state.wait_for_everyone()
        answers = {seed: [store.answers[question.id, seed].answer for question in task.questions]
                   for seed in self.asking.seeds}
        reasons = Counter(answer.problem for each in answers.values() for answer in each)
        if "" not in reasons:
            if self.state.is_main_process:
                store.discard()
            raise nothing_asked(task, reasons)
        seconds += sum(stored.seconds for stored in store.answers.values())
        return self._judged(task, store, answers, settings, seconds)

    def _identity(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self.model.identity, "answering": settings}

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

    def _thoughts(self, task: Task, answers: Mapping[int, Sequence[Answer]], judged: BySeed
                  ) -> dict[str, Any]:
        if self.asking.method == "likelihood":
            return {}
        count = self.model.count_tokens if isinstance(self.model, LocalModel) else None
        return {"thoughts": thoughts_of(task.thoughts, answers, judged, count)}

    def _judged(
        self, task: Task, store: AnswerStore, answers: Mapping[int, Sequence[Answer]],
        settings: Mapping[str, Any], seconds: float,
    ) -> dict[str, Any]:
        rule, benchmark, source = task.rule, task.benchmark, task.source
        before = self.earlier.get(benchmark.name) or {}
        replies, judge_model = (None, {}) if rule.prompt is None or self.judge is None else \
            judge_answers(self.judge, task, answers, self.folder, before.get("judge"), self.state)
        judged = {seed: judge(rule, task.questions, each, replies, seed, task.thoughts)
                  for seed, each in answers.items()}
        entry = {
            "title": benchmark.title, "benchmark": benchmark.file or benchmark.name,
            "rule": rule.name, "rule_version": rule.version, "rule_source": rule.source,
            **({"guesses": True} if rule.guesses else {}),
            "source": {"path": source.path, "name": source.name, "split": source.split,
                       "max_records": source.max_records, "sha256": task.sha256},
            **task.video_frames, "prompt_hash": task.prompt_hash, "left_out": dict(task.left_out),
            **({"judge": judge_model} if judge_model else {}), **counts(answers, judged),
            **self._thoughts(task, answers, judged),
            "answering": {**settings, "seeds": list(self.asking.seeds)},
            "figures": figures(rule, judged), "by_tag": by_tag(rule, judged),
            "decimals": benchmark.decimals, "answers": f"{FOLDER}/{benchmark.name}.jsonl",
            "seconds": seconds,
        }
        if self.state.is_main_process:
            store.finish(lines(task.questions, task.hashes, answers, judged))
            if why := doubt(judged[self.asking.seeds[0]]):
                logger.warning("%s: %s: %s%s", self.name, benchmark.name, why,
                               ALONE if benchmark.file else "")
        return entry
