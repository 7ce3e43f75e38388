"""A language model behind a URL that judges answers; its replies are kept, and never guessed at.

    answers/NAME.judge.jsonl    one reply per answer; what was asked before is not asked again
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from taid_vlm.benchmarks.answering import Answer
from taid_vlm.benchmarks.asking import Task
from taid_vlm.benchmarks.prompts import PLACES
from taid_vlm.benchmarks.question import JudgePrompt, Question
from taid_vlm.benchmarks.remote import Remote
from taid_vlm.benchmarks.scoring import Replies
from taid_vlm.benchmarks.store import AnswerStore, question_hash
from taid_vlm.errors import TaidError
from taid_vlm.io.endpoint import Endpoint
from taid_vlm.io.hashing import text_hash

SETTINGS = ("--judge-url", "--timeout", "--judge-key-env")


@dataclass(frozen=True)
class Judge:
    """Who judges: a model that speaks chat completions, asked at temperature 0.

    Args:
        requests: at once.
        prompt: a file that takes the place of a rule's own words; {question}, {answer} and
            {prediction} stand where those go.
    """

    endpoint: Endpoint
    requests: int = 8
    prompt: Path | None = None

    def check(self, tasks: Sequence[Task]) -> None:
        """Raises TaidError where no task asks a judge, or where the prompt does not fit."""
        prompts = {task.benchmark.name: task.rule.prompt for task in tasks if task.rule.prompt}
        if not prompts:
            raise TaidError("--judge-url: none of the tasks' rules asks a judge.")
        for name, prompt in prompts.items():
            if self.prompt is not None and not prompt.template:
                raise TaidError(f"--judge-prompt: every question of {name} brings its own; leave "
                                "it out.")
        if self.prompt is not None:
            _template(self.prompt)

    def template(self, prompt: JudgePrompt) -> str:
        """The words that are filled in."""
        return prompt.template if self.prompt is None else _template(self.prompt)

    def describe(self, task: Task, prompt: JudgePrompt) -> dict[str, Any]:
        """What replies depend on beside the answer; stands in the results."""
        template = self.template(prompt)
        asked = template or "\n".join(prompt.write("", each, "") for each in task.questions)
        return {"model": self.endpoint.model, "url": self.endpoint.url, "temperature": 0.0,
                "max_new_tokens": prompt.max_new_tokens,
                "prompt": {"name": str(self.prompt or prompt.name), "version": prompt.version,
                           "sha256": text_hash(asked)}}


def open_judge(url: str, model: str | None, key_variable: str | None, timeout: float,
               requests: int, prompt: Path | None = None) -> Judge:
    """A judge by what a user says of it; raises TaidError."""
    if not model:
        raise TaidError("--judge-url needs --judge-model, the name by which its server knows the "
                        "judge.")
    key = None if key_variable is None else os.environ.get(key_variable)
    if key_variable is not None and not key:
        raise TaidError(f"--judge-key-env: the environment variable '{key_variable}' is not set.")
    if not timeout > 0:
        raise TaidError(f"--timeout = {timeout}, but it must be more than 0 seconds.")
    return Judge(Endpoint(url, model, key, timeout, settings=SETTINGS), requests, prompt)


def _template(path: Path) -> str:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaidError(f"--judge-prompt = '{path}' cannot be read ({error}).") from None
    missing = [place for place in PLACES if place not in text]
    if missing:
        raise TaidError(f"--judge-prompt = '{path}' lacks {', '.join(missing)}.")
    return text


def judge_answers(
    judge: Judge, task: Task, answers: Mapping[int, Sequence[Answer]], folder: Path,
    before: Mapping[str, Any] | None, state: PartialState,
) -> tuple[Replies, dict[str, Any]]:
    """What the judge replies to every answer, and how it was asked.

    One process asks, all of them hear. Answers that are missing are not shown to the judge.

    Args:
        before: what the results of an earlier call say of their judge.

    Raises:
        TaidError: the judge gives no reply, or refuses all that it is asked; what it said is kept.
    """
    prompt = task.rule.prompt
    assert prompt is not None
    template, described = judge.template(prompt), judge.describe(task, prompt)
    asked = [Question(f"{seed}/{question.id}", (prompt.write(template, question, answer.text),))
             for seed, each in answers.items()
             for question, answer in zip(task.questions, each, strict=True) if not answer.problem]
    store = AnswerStore(folder, f"{task.benchmark.name}.judge", described,
                        {question.id: question_hash(question) for question in asked})
    store.load(before)
    state.wait_for_everyone()
    if state.is_main_process:
        _ask(judge, prompt, asked, store)
    state.wait_for_everyone()
    store.gather()
    state.wait_for_everyone()
    if state.is_main_process:
        store.finish([store.line((question.id, 0)) for question in asked])
    return {(seed, name): stored.answer for (text, _), stored in store.answers.items()
            for seed, name in [_split(text)]}, described


def _split(text: str) -> tuple[int, str]:
    seed, _, name = text.partition("/")
    return int(seed), name


def _ask(judge: Judge, prompt: JudgePrompt, asked: Sequence[Question], store: AnswerStore) -> None:
    """Ask what has no reply yet."""
    done = {name for name, _ in store.answers}
    if all(question.id in done for question in asked):
        return
    store.open()
    remote = Remote(judge.endpoint, judge.requests, max_new_tokens=prompt.max_new_tokens)
    with tqdm(total=len(asked), initial=len(done), unit="answer", disable=None,
              desc=f"judge: {store.task}") as bar:
        since = time.perf_counter()
        for given in remote.answers(asked, done, 0):
            now = time.perf_counter()
            store.add(given, 0, now - since)
            bar.update(len(given))
            since = now
