"""Answers to prompts, filtered, as records to train on.

    records.jsonl             a line per answer that is kept; `data.train` takes it
    images/                   what lay inside other files, by its hash
    answers/generated.jsonl   every answer, and why it is no record where it is none
    results.json              model, data, settings, filters, counts

Answers are on disk as soon as they are given. The same command goes on after an interruption, and
under other filters it asks nothing again.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from taid_vlm.adapters.continued import EMPTY
from taid_vlm.benchmarks.answering import Answer, Answerer
from taid_vlm.benchmarks.asking import Task
from taid_vlm.benchmarks.candidates import Candidate, LocalModel, ServedModel
from taid_vlm.benchmarks.evaluate import processes
from taid_vlm.benchmarks.judge import Judge, judge_answers
from taid_vlm.benchmarks.metrics.thoughts import KEEP
from taid_vlm.benchmarks.prompts import filled
from taid_vlm.benchmarks.question import (
    Benchmark,
    Judged,
    JudgePrompt,
    Question,
    Rule,
    left_to_judge,
)
from taid_vlm.benchmarks.remote import Remote
from taid_vlm.benchmarks.scoring import judge, thoughts_of
from taid_vlm.benchmarks.store import FOLDER, AnswerStore, data_hash, flat, keep_answers
from taid_vlm.benchmarks.tasks.mmvet import read_score
from taid_vlm.config.data import DataSource
from taid_vlm.errors import TaidError
from taid_vlm.generate.filters import Said, pieces
from taid_vlm.generate.prompts import Prompt, Prompts, read_prompts
from taid_vlm.generate.rows import Files, answered, row_of
from taid_vlm.generate.writing import Local, Shared, Writing, thinks_apart
from taid_vlm.io.endpoint import Endpoint
from taid_vlm.io.files import read_json, whole_file, write_json
from taid_vlm.io.folders import refuse_file_in_the_way
from taid_vlm.io.hashing import file_sha256, text_hash
from taid_vlm.io.jsonl import dump_lines
from taid_vlm.models.loading import load_model
from taid_vlm.records.messages import as_json
from taid_vlm.runs.folders import RESULTS, locked
from taid_vlm.runs.machine import machine, peak_memory, versions

logger = logging.getLogger(__name__)

KIND, SCHEMA, NAME = "generation", 1, "generated"
RECORDS = "records.jsonl"
TEMPLATE = """Rate an answer: whether it is right, and does what was asked.

The score is one of 0.0, 0.1, 0.2 ... 1.0: 0.0 for an answer that is wrong or does something else, \
1.0 for one that is right and complete. Where a reference answer stands below, what contradicts it \
is wrong; wording and length do not matter.

Question: {question}
Reference: {answer}
Answer: {prediction}

Write the score alone, as a number."""


def _ask_judge(template: str, question: Question, answer: str) -> str:
    assert isinstance(question, Prompt)
    record, turn = question.asked()
    return filled(template, record.question(turn), question.reference, answer)


RULE = Rule("generated", 1, left_to_judge,
            prompt=JudgePrompt(NAME, 1, _ask_judge, read_score, 16, TEMPLATE))
Why = tuple[str, str]  # "unanswered" or "filtered", and the reason; two "" for a record


def generate(
    candidate: Candidate, source: DataSource, output_dir: str | Path, writing: Writing,
    judge_model: Judge | None = None,
) -> dict[str, Any]:
    """A model's answers to the prompts of `source`, as records in `output_dir`.

    Touches no random state.

    Returns:
        What was written to `output_dir/results.json`.

    Raises:
        TaidError: anything a user can mend, before weights are loaded where it can show there.
    """
    folder = Path(output_dir).expanduser()
    refuse_file_in_the_way(folder)
    if (judge_model is None) != (writing.judged_from is None):
        raise TaidError("--filters judge and --judge-url go together.")
    model = ServedModel(candidate.source) if isinstance(candidate.source, Endpoint) else \
        LocalModel(candidate.source)
    prompts = read_prompts(source, writing.turns)
    if isinstance(model, LocalModel) and prompts.sees and not model.adapter.sees_images:
        seen = next(prompt.id for prompt in prompts.asked if prompt.size[0])
        raise TaidError(f"--model '{candidate.name}' ({model.config.model_type}) is a text model, "
                        f"but '{seen}' of --data holds an image; choose a model with vision, or "
                        "text records.")
    task = Task(Benchmark(NAME, "", lambda row: [], (RULE,)), RULE, source, prompts.asked,
                prompts.left_out, writing.reading)
    if judge_model is not None:
        judge_model.check([task])
    processes()
    with locked(folder):
        earlier = _earlier(folder)
        processes().wait_for_everyone()  # every process has read what the main one will replace
        return _Generation(candidate.name, model, prompts, task, folder, writing, judge_model,
                           earlier).run()


def _earlier(folder: Path) -> dict[str, Any]:
    """The results of an earlier call, {} where there are none."""
    path = folder / RESULTS
    results = read_json(path, "the results of a generation") if path.exists() else {}
    foreign = (folder / RECORDS).exists() and not (folder / FOLDER).exists()
    if foreign or (path.exists() and (not isinstance(results, dict)
                                      or results.get("kind") != KIND)):
        raise TaidError(f"--output-dir = '{folder}' holds {RECORDS if foreign else RESULTS} of "
                        "something else; choose another folder.")
    return dict(results)


class _Generation:
    """One model's answers to one source; its weights are loaded when a prompt needs them."""

    def __init__(
        self, name: str, model: LocalModel | ServedModel, prompts: Prompts, task: Task,
        folder: Path, writing: Writing, judge_model: Judge | None, earlier: Mapping[str, Any],
    ) -> None:
        self.name, self.model, self.prompts, self.task = name, model, prompts, task
        self.folder, self.writing, self.judge = folder, writing, judge_model
        self.earlier, self.state, self.started = earlier, processes(), time.perf_counter()
        self.identity = flat({"model": model.identity, "answering": writing.settings})
        self.store = AnswerStore(folder, NAME, self.identity, {
            prompt.id: prompt.sha256 for prompt in prompts.asked}, self.state.process_index)

    def run(self) -> dict[str, Any]:
        self._answer()
        numbers, asked = range(self.writing.n), self.prompts.asked
        answers = {number: [self.store.answers[prompt.id, number].answer for prompt in asked]
                   for number in numbers}
        problems = Counter(answer.problem for each in answers.values() for answer in each)
        if "" not in problems:
            if self.state.is_main_process:
                self.store.discard()
            counted = ", ".join(f"{n:,} x {why}" for why, n in sorted(problems.items()))
            raise TaidError(f"--data: no prompt of '{self.prompts.source.shown}' has an answer: "
                            f"{counted}.")
        judged = {number: self._read(answers[number]) for number in numbers}
        whys = self._filtered(answers, judged)
        described = {} if self.judge is None else self._judged(self.judge, answers, whys)
        results = self._results(answers, judged, whys, described)
        if self.state.is_main_process:
            self._write(answers, judged, whys, results)
        self.state.wait_for_everyone()
        return results

    # ----- answers --------------------------------------------------------------------------

    def _answer(self) -> None:
        store, writing, main = self.store, self.writing, self.state.is_main_process
        store.load(self.earlier.get("identity"))
        if store.replaced and main:
            logger.warning("%s: answers from before are not used: %s.", self.folder,
                           "; ".join(store.replaced))
        seeds = writing.seeds()
        total = len(self.prompts.asked) * len(seeds)
        known = sum((prompt.id, number) in store.answers
                    for prompt in self.prompts.asked for number in seeds)
        if main:
            print(self._estimate(total, known), flush=True)
        self.state.wait_for_everyone()
        keep_answers(store, self.prompts.asked, seeds, lambda: self._answerer(total - known),
                     self.name, main)
        self.state.wait_for_everyone()
        store.gather()
        self.state.wait_for_everyone()

    def _estimate(self, total: int, known: int) -> str:
        """What is to be done, before it is."""
        left_out = ", ".join(f"{n} x {why}" for why, n in self.prompts.left_out.items())
        return (f"prompts       {len(self.prompts.asked):,} from {self.prompts.rows:,} records; "
                f"left out: {left_out or 'none'}\n"
                f"answers       {total:,}, of at most {self.writing.max_new_tokens:,} tokens; "
                f"there already: {known:,}")

    def _answerer(self, missing: int) -> Answerer:
        writing, state = self.writing, self.state
        how = {key: value for key, value in writing.settings.items()
               if key not in ("method", "seed")}
        process, of = (state.process_index, state.num_processes), -(-missing // state.num_processes)
        if isinstance(self.model, ServedModel):
            remote = Remote(self.model.endpoint, writing.batch_size, **how)
            return Shared(remote, writing.batch_size, of, process, state.is_main_process)
        model = load_model(self.model.spec, "model").to(state.device)
        local = Local(model, self.model.adapter, writing.batch_size, process, **how)
        return Shared(local, writing.batch_size, of, (0, 1), state.is_main_process)

    # ----- which of them are kept -----------------------------------------------------------

    def _read(self, answers: list[Answer]) -> list[Judged]:
        """Answers without their thoughts. What opened a thought is only guessed of a server's."""
        known = isinstance(self.model, LocalModel)
        seen = [replace(answer, cut=False) if known else answer for answer in answers]
        return judge(RULE, self.prompts.asked, seen, thoughts=self.writing.reading)

    def _filtered(
        self, answers: Mapping[int, list[Answer]], judged: Mapping[int, list[Judged]]
    ) -> dict[int, list[Why]]:
        """Why each answer is no record; by its number, in the order of the prompts."""
        whys: dict[int, list[Why]] = {number: [] for number in answers}
        seen: dict[str, set[Any]] = {rule.name: set() for rule in self.writing.filters}
        for index, prompt in enumerate(self.prompts.asked):
            said: dict[int, Said] = {}
            record, turn = prompt.asked()
            for number, each in judged.items():
                answer, own = answers[number][index], each[index]
                missing = own.missing or ("" if own.answer else EMPTY)
                missing = answer.problem if answer.calls else missing
                whys[number].append(("unanswered", missing) if missing else ("", ""))
                if not missing:
                    text = own.answer or as_json(list(answer.calls))
                    said[number] = Said(prompt.sha256, self.writing.n, text, answer.cut,
                                        self._tokens(text), record.question(turn))
            for rule in self.writing.filters:
                kept = rule.keeps(list(said.values()), seen[rule.name])
                for number, keep in zip(list(said), kept, strict=True):
                    if not keep:
                        whys[number][index] = "filtered", rule.name
                        del said[number]
        return whys

    def _tokens(self, text: str) -> list[Any]:
        if isinstance(self.model, ServedModel):
            return list(pieces(text))
        return list(self.model.adapter.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _judged(self, judge_model: Judge, answers: Mapping[int, list[Answer]],
                whys: dict[int, list[Why]]) -> dict[str, Any]:
        """A judge looks at what other filters have kept; how it was asked."""
        hidden = {number: [Answer(problem=why[1]) if why[0] else answer if not answer.calls else
                           replace(answer, text=answer.text + as_json(list(answer.calls)))
                           for answer, why in zip(each, whys[number], strict=True)]
                  for number, each in answers.items()}
        replies, described = judge_answers(judge_model, self.task, hidden, self.folder,
                                           self.earlier.get("judge"), self.state)
        for number, each in hidden.items():
            scored = judge(RULE, self.prompts.asked, each, replies, number, self.writing.reading)
            for index, own in enumerate(scored):
                least = self.writing.judged_from or 0.0
                if whys[number][index][0] == "" and (
                        own.verdict.unscored or own.verdict.score < least):
                    whys[number][index] = "filtered", own.verdict.unscored or "judge"
        return described

    # ----- what is written ------------------------------------------------------------------

    def _write(self, answers: Mapping[int, list[Answer]], judged: Mapping[int, list[Judged]],
               whys: Mapping[int, list[Why]], results: dict[str, Any]) -> None:
        """Records, results, and last the answers: what is interrupted between goes on."""
        with whole_file(self.folder / RECORDS) as partial, \
                partial.open("w", encoding="utf-8", newline="\n") as file:
            for row in self._rows(answers, judged, whys):
                file.write(dump_lines([row]))
        results["sha256"] = file_sha256(self.folder / RECORDS).hex()
        write_json(results, self.folder / RESULTS)
        self.store.finish([
            {**self.store.line((prompt.id, number)),
             **({"left_out": whys[number][index][1]} if whys[number][index][0] else {})}
            for index, prompt in enumerate(self.prompts.asked) for number in answers])

    def _rows(self, answers: Mapping[int, list[Answer]], judged: Mapping[int, list[Judged]],
              whys: Mapping[int, list[Why]]) -> Iterator[dict[str, Any]]:
        files, writing = Files(self.folder, self.writing.copies), self.writing
        apart = isinstance(self.model, LocalModel) and thinks_apart(self.model.adapter)
        as_said = writing.thoughts == KEEP and not apart
        beside = writing.thoughts == KEEP or writing.reasoning
        for index, prompt in enumerate(self.prompts.asked):
            record = prompt.records[prompt.index]
            for number, each in answers.items():
                answer, own = each[index], judged[number][index]
                if whys[number][index][0]:
                    continue
                text, thought = (answer.text, answer.thought) if as_said else (
                    own.answer, own.thought if beside else "")
                new = answered(record, prompt.turn, text, thought, answer.calls)
                yield {"id": f"{prompt.id}#{number}", **row_of(new, files)}

    def _results(
        self, answers: Mapping[int, list[Answer]], judged: Mapping[int, list[Judged]],
        whys: Mapping[int, list[Why]], described: Mapping[str, Any],
    ) -> dict[str, Any]:
        source, writing = self.prompts.source, self.writing
        count = None if isinstance(self.model, ServedModel) else self.model.count_tokens
        every = Counter(why for each in whys.values() for why in each)
        kept = {index for each in whys.values() for index, why in enumerate(each) if not why[0]}
        data, asked = Path(source.paths[0]).expanduser(), self.prompts.asked
        return {
            "schema": SCHEMA, "kind": KIND, "name": self.name, "model": self.model.describe(),
            "data": {**source.model_dump(mode="json", exclude_defaults=True),
                     "sha256": data_hash(data),
                     "prompts": text_hash("".join(prompt.sha256 for prompt in asked))},
            "answering": {**writing.settings, "n": writing.n, "turns": writing.turns},
            "thoughts": {"written": writing.thoughts, "reasoning": writing.reasoning,
                         **thoughts_of(writing.reading, answers, judged, count)},
            "filters": [each.describe() for each in writing.filters],
            "length_in": "pieces of words" if count is None else "tokens",
            **({"judge": described} if described else {}),
            "rows": self.prompts.rows, "prompts": len(asked),
            "prompts_left_out": dict(self.prompts.left_out),
            "answers": len(asked) * writing.n,
            **{kind: {why: n for (of, why), n in sorted(every.items()) if of == kind}
               for kind in ("unanswered", "filtered")},
            "records": every["", ""], "prompts_without_record": len(asked) - len(kept),
            "identity": self.identity, "versions": versions(),
            "machine": {**machine(), "processes": self.state.num_processes},
            "memory": peak_memory(),
            "seconds": sum(stored.seconds for stored in self.store.answers.values()),
        }


def as_text(results: Mapping[str, Any], folder: Path) -> str:
    """What has become of the answers, for a terminal."""
    def listed(kind: str) -> str:
        return ", ".join(f"{n:,} x {why}" for why, n in results[kind].items()) or "none"

    return (f"unanswered    {listed('unanswered')}\nfiltered      {listed('filtered')}\n"
            f"records       {results['records']:,} of {results['answers']:,} answers: "
            f"{folder / RECORDS}\nwithout any   {results['prompts_without_record']:,} of "
            f"{results['prompts']:,} prompts")
