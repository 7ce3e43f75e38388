"""Answers that the student gives itself, sampled before the optimizer step that learns from them.

Who samples, and with which random numbers, follows from the seed, the step and the record alone:
it is the same for any number of processes and any split of the step, and a resumed run needs no
state for it. The student samples itself, or a server does that has its weights (`engine.py`). A
record of which no answer can be learned is learned from its reference, so that no record is lost.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor

from taid_vlm.adapters import Continuation, ModelAdapter
from taid_vlm.adapters.continued import repeating
from taid_vlm.batch.collator import Batch
from taid_vlm.config.objective import OnPolicy
from taid_vlm.errors import RecordError, SampleDropped, TaidError
from taid_vlm.io.files import read_json, write_json
from taid_vlm.models.generation import Continued, Sampling, continue_prompts, prompt_inputs
from taid_vlm.records import Message, Record, parse_record
from taid_vlm.training.config import DistillationConfig
from taid_vlm.training.engine import (
    CALLED,
    CHECKED,
    SAME_WEIGHTS,
    Engine,
    EngineLost,
    differences,
)
from taid_vlm.training.sampled import Prompt, Sample, drawing_of, prompts

logger = logging.getLogger(__name__)

Collate = Callable[[Sequence[Any]], Batch]

STATE = "on_policy.json"
NOT_LEARNED = "A sampled answer is not learned, but its record's own"
OWN = "own"  # marks the batch of sampled answers
ASKED, SAMPLED, REUSED, STALE = "asked", "sampled", "reused", "stale"
CUT, REPEATING, UNUSED, TOKENS, ROWS = "cut", "repeating", "unused", "tokens", "rows"
NO_ROOM = "no room for an answer"
WATCHED, COLLAPSED = 64, 0.75  # of so many answers in a row, the share that makes a collapse


class Rows:
    """In place of a collator: rows as they are, for what is collated when answers are sampled."""

    def __call__(self, rows: Sequence[Any]) -> Batch:
        return {"rows": list(rows)}


@dataclass(frozen=True)
class Question:
    """One answer to be sampled. key: of record and turn, the same in every process."""

    key: str
    record: Record
    turn: int


@dataclass
class Happened:
    """What became of a step's samples, in one process.

    counts: of rows and answers. degenerate: of every answer in order. known: what was sampled.
    """

    counts: Counter[str] = field(default_factory=Counter)
    degenerate: list[bool] = field(default_factory=list)
    known: dict[str, tuple[tuple[int, ...], int | None]] = field(default_factory=dict)
    seconds: float = 0.0
    gap: tuple[float, int] = 0.0, 0  # of log-probabilities there and here, and tokens of it


class Rollouts:
    """The sampled answers of one run; every process knows what became of those of all.

    Args:
        spec: of the objective.
        student: its adapter.
        references, samples: make batches of records, and of `Continuation`s.

    Raises:
        TaidError: as `check_on_policy`; an engine that is not there.
    """

    def __init__(
        self, spec: OnPolicy, student: ModelAdapter, references: Collate, samples: Collate,
        accelerator: Accelerator, args: DistillationConfig,
    ) -> None:
        check_on_policy(args)
        self.spec, self.student, self.accelerator = spec, student, accelerator
        self.references, self.samples, self.seed = references, samples, args.seed
        self.engine = None if spec.engine is None else Engine(
            spec.engine, str(args.output_dir))
        self.gap = (0.0, 0)  # over the run; `Happened.gap`
        self._since_gap = (0.0, 0)
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0  # of sampling, over all processes
        self._since: Counter[str] = Counter()  # the same since the last log line
        self._recent: deque[bool] = deque(maxlen=WATCHED)
        self._known: dict[str, tuple[int, tuple[int, ...], int | None]] = {}  # step, ids, end
        self._said = False
        self._clock, self._seconds_then = time.perf_counter(), 0.0
        kind = accelerator.distributed_type
        self._sharded = kind in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    # ----- a step ---------------------------------------------------------------------------

    def fill(self, batches: Sequence[Batch], model: Any, step: int) -> None:
        """Every batch of rows becomes a batch of references, with one of sampled answers under
        "sampled" in it.

        Args:
            model: the student. step: the optimizer step that they are for, from 1.

        Raises:
            TaidError: the student has collapsed, and the run is to stop then.
        """
        started, happened = time.perf_counter(), Happened()
        parts = [[_record(row) for row in batch.pop("rows")] for batch in batches]
        questions = [[self._question(row, step) for row in part] for part in parts]
        happened.counts[ROWS] = sum(map(len, parts))
        flat = [question for part in questions for question in part if question is not None]
        answers = self._answers(flat, model, step, happened)
        for batch, part, asked in zip(batches, parts, questions, strict=True):
            own = [answers.get(question.key) if question else None for question in asked]
            batch |= self._collated(part, own, happened)
        happened.seconds = time.perf_counter() - started
        self._take(happened, step)

    def probe(self, batch: Batch) -> Batch:
        """A batch of rows with every answer its reference, so that each process has tokens: a
        loss that is chosen by it is the same in a run that goes on, whoever samples then."""
        return self.references([_record(row) for row in batch["rows"]])

    def _question(self, row: Any, step: int) -> Question | None:
        """What is sampled of a row at a step; None of one that is learned from its reference."""
        if not isinstance(row, Record) or not row.learned:
            return None
        draws = random.Random(f"{self.seed}/{step}/{row.source}")
        if draws.random() >= self.spec.lmbda:
            return None
        turn = draws.choice(row.learned)
        return Question(f"{row.source}/{turn}", row, turn)

    def _collated(
        self, rows: Sequence[Any], own: Sequence[Continuation | None], happened: Happened
    ) -> Batch:
        """References, and what was sampled in place of others; what the collator leaves out of the
        samples goes back to the references."""
        sampled = self.samples([each for each in own if each is not None])
        counts = sampled["counts"]
        kept = Counter(sampled["sources"] if counts["rows"] else ())
        references, origins = list[Any](), Counter[str]()
        for row, answer in zip(rows, own, strict=True):
            if answer is None or not kept[answer.source]:
                references.append(row)
                happened.degenerate += [True] if answer is not None else []
                continue
            kept[answer.source] -= 1
            origins[row.origin] += 1
            repeats = repeating(answer.ids)
            happened.degenerate.append(repeats)
            happened.counts.update({SAMPLED: 1, CUT: answer.end is None, REPEATING: repeats,
                                    TOKENS: len(answer.ids)})
        happened.counts.update({f"{UNUSED}/{why}": n for why, n in counts["dropped"].items()})
        counts["dropped"] = {}  # none is lost
        sampled["intake"] = {"sources": {name: (n, n) for name, n in origins.items() if name},
                             "unread": {}}
        return {**self.references(references), SAMPLED: {**sampled, OWN: True}}

    # ----- answers --------------------------------------------------------------------------

    def _answers(
        self, questions: Sequence[Question], model: Any, step: int, happened: Happened
    ) -> dict[str, Continuation]:
        """By key; of those without an answer there is none."""
        answers, fresh = dict[str, Continuation](), dict[str, Question]()
        for question in questions:
            happened.counts[ASKED] += 1
            then, ids, end = self._known.get(question.key, (-1, (), None))
            if then >= 0 and step - then <= self.spec.max_age:
                happened.counts[REUSED] += 1
                answers[question.key] = Continuation(question.record, question.turn, ids, end)
                continue
            happened.counts[STALE] += then >= 0
            fresh[question.key] = question
        sampled = self._sampled if self.engine is None else self._from_engine
        for question, said in sampled(list(fresh.values()), model, step, happened):
            if isinstance(said, str):
                happened.counts[f"{UNUSED}/{said}"] += 1
                continue
            answers[question.key] = Continuation(
                question.record, question.turn, tuple(said.ids), said.end)
            happened.known[question.key] = tuple(said.ids), said.end
        return answers

    def _sampled(
        self, questions: Sequence[Question], model: Any, step: int, happened: Happened
    ) -> Iterator[tuple[Question, Continued | str]]:
        """Each question's answer, or why it has none, a batch at a time. Where weights are spread
        over processes all of them take part in every batch."""
        size = self.spec.batch_size or max(len(questions), 1)
        parts = [questions[i : i + size] for i in range(0, len(questions), size)]
        rounds = max(gather_object([len(parts)])) if self._sharded else len(parts)
        for number in range(rounds):
            part = parts[number] if number < len(parts) else []
            yield from zip(part, self._ask(part, model, step), strict=True)

    def _ask(
        self, questions: Sequence[Question], model: Any, step: int
    ) -> list[Continued | str]:
        """What is said to some questions at once, or why nothing is."""
        adapter, spec = self.student, self.spec
        room = (adapter.max_length or 2**62) - spec.max_new_tokens
        pairs = [(question.record, question.turn) for question in questions]
        inputs, problems = _inputs(adapter, pairs, room)
        asked = [pair for index, pair in enumerate(pairs) if index not in problems]
        if not asked and self._sharded:  # the others wait in every forward pass
            asked = [_PLACEHOLDER]
            inputs, _ = _inputs(adapter, asked, room)
        answers: Iterator[Continued] = iter(()) if inputs is None else iter(continue_prompts(
            model, adapter, inputs, asked, max_new_tokens=spec.max_new_tokens,
            sampling=Sampling(spec.temperature, spec.top_p, f"{self.seed}/{step}"),
            synced=self._sharded, as_text=True))
        return [problems[i] if i in problems else next(answers) for i in range(len(pairs))]

    def _from_engine(
        self, questions: Sequence[Question], model: Any, step: int, happened: Happened
    ) -> Iterator[tuple[Question, Sample | str]]:
        """The same from the server. Where its answers come only at another attempt, it may have
        been started anew since it got its weights: it gets them again, and is asked again."""
        assert self.engine is not None
        said, problem, again = list[Sample | str](), None, False
        for _ in range(self.engine.spec.retries + 1):
            fresh = self.engine.sync(model, step, self.accelerator)
            try:
                said = self._ask_engine(questions, model, step)
            except TaidError as lost:
                problem = str(lost)
            states = gather_object([(problem, self.engine.interrupted)])
            problem, again = next((p for p, _ in states if p), None), any(x for _, x in states)
            self.engine.interrupted = again
            if problem or not again:
                break
        if problem or again:
            raise EngineLost(problem or f"{CALLED}: no step's answers come at the first attempt.")
        if fresh:
            answers = [(question.record, question.turn, sample) for question, sample in zip(
                questions, said, strict=True) if isinstance(sample, Sample) and sample.log_probs]
            happened.gap = differences(model, self.student, answers[:CHECKED],
                                       CHECKED if self._sharded else 0)
        yield from zip(questions, said, strict=True)

    def _ask_engine(
        self, questions: Sequence[Question], model: Any, step: int
    ) -> list[Sample | str]:
        adapter, spec, engine = self.student, self.spec, self.engine
        assert engine is not None
        longest = min(adapter.max_length or 2**62, engine.longest or 2**62)
        pairs = [(question.record, question.turn) for question in questions]
        inputs, problems = _inputs(adapter, pairs, longest - spec.max_new_tokens)
        kept = [pair for index, pair in enumerate(pairs) if index not in problems]
        asked = [] if inputs is None else list(prompts(adapter, kept, inputs))
        said = iter(engine.sample(
            [each for each in asked if isinstance(each, Prompt)],
            drawing_of(spec, model, adapter), f"{self.seed}/{step}", step))
        rest = iter([each if isinstance(each, str) else next(said) for each in asked])
        return [problems[i] if i in problems else next(rest) for i in range(len(pairs))]

    # ----- what became of them --------------------------------------------------------------

    def _take(self, happened: Happened, step: int) -> None:
        """Add up what happened in all processes, and look at the last answers."""
        everyone = gather_object([happened])
        known = {key: said for each in everyone for key, said in each.known.items()}
        for each in everyone:
            self.counts.update(each.counts)
            self._since.update(each.counts)
            self.seconds += each.seconds
            self._recent.extend(each.degenerate)
        drawn_from = step  # the step whose weights they are of
        if self.engine is not None:
            assert self.engine.synced is not None
            drawn_from = self.engine.synced
            self._compare([each.gap for each in everyone])
            if self.accelerator.is_main_process:
                self.engine.note(step, known)
        if self.spec.max_age:
            self._known |= {key: (drawn_from, *said) for key, said in known.items()}
            self._known = {key: kept for key, kept in self._known.items()
                           if step - kept[0] <= self.spec.max_age}
        self._judge()

    def _compare(self, gaps: Sequence[tuple[float, int]]) -> None:
        """Raise TaidError if the server's log-probabilities are not those of the student here."""
        total, tokens = sum(gap for gap, _ in gaps), sum(n for _, n in gaps)
        self.gap = self.gap[0] + total, self.gap[1] + tokens
        self._since_gap = self._since_gap[0] + total, self._since_gap[1] + tokens
        if tokens and not total / tokens <= SAME_WEIGHTS:
            assert self.engine is not None
            raise TaidError(
                f"{CALLED}: what '{self.engine.spec.model}' at '{self.engine.spec.url}' samples is "
                f"not the student's: the log-probabilities of {tokens} sampled tokens differ by "
                f"{total / tokens:.2g} nats from those here, and rounding leaves less than "
                f"{SAME_WEIGHTS:g}.", mend="Serve a checkpoint of the student's own architecture, "
                "without quantization and without --logprobs-mode.")

    def _judge(self) -> None:
        share = sum(self._recent) / WATCHED
        if len(self._recent) < WATCHED or share < COLLAPSED:
            self._said = False
            return
        problem = (f"the student has collapsed: {share:.0%} of its last {WATCHED} sampled answers "
                   "are empty, repeat themselves or are no text")
        if self.spec.stop_when_collapsed:
            raise TaidError(f"objective.on_policy: {problem}.", mend="Start from a student that "
                            "has learned from references, lower on_policy.lmbda or "
                            "train.learning_rate; checkpoints are kept.")
        if not self._said and self.accelerator.is_main_process:
            logger.warning("On policy, %s. Lower on_policy.lmbda or train.learning_rate.", problem)
        self._said = True

    def logs(self) -> dict[str, float]:
        """Shares and means since the last log line."""
        since, self._since = self._since, Counter()
        now, spent = time.perf_counter(), self.seconds - self._seconds_then
        whole = (now - self._clock) * self.accelerator.num_processes
        self._clock, self._seconds_then = now, self.seconds
        logs = {"share": since[SAMPLED] / max(since[ROWS], 1), "time_share": spent / whole}
        if since[SAMPLED]:
            logs |= {name: since[name] / since[SAMPLED] for name in (TOKENS, CUT, REPEATING)}
        if since[ASKED]:
            logs[UNUSED] = sum(_unused(since).values()) / since[ASKED]
        if self._since_gap[1]:
            logs["engine_gap"] = self._since_gap[0] / self._since_gap[1]
            self._since_gap = 0.0, 0
        return {f"on_policy/{name}": value for name, value in logs.items()}

    def report(self) -> dict[str, Any]:
        """For the run's results."""
        counts, sampled = self.counts, self.counts[SAMPLED]
        return {
            "share": sampled / max(counts[ROWS], 1), "asked": counts[ASKED], "sampled": sampled,
            "reused": counts[REUSED], "stale": counts[STALE], "cut": counts[CUT],
            "repeating": counts[REPEATING], "tokens": counts[TOKENS], "seconds": self.seconds,
            "unused": _unused(counts), "engine": None if self.engine is None else {
                **self.engine.report(), "gap": self.gap[0] / max(self.gap[1], 1)}}

    def say(
        self, pairs: Sequence[tuple[Record, int]], model: Any, size: int
    ) -> list[Continuation]:
        """What the student says to questions (record, turn) now, `size` at once; the same in all
        processes. Of those it cannot be asked there is nothing."""
        said = list[Continuation]()
        for start in range(0, len(pairs), size):
            part = [Question("", *pair) for pair in pairs[start : start + size]]
            said += [Continuation(question.record, question.turn, tuple(answer.ids), answer.end)
                     for question, answer in zip(part, self._ask(part, model, 0), strict=True)
                     if not isinstance(answer, str)]
        return said

    # ----- checkpoints ----------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """What a run goes on with, by the main process; nothing of it decides who samples or what
        is drawn."""
        engine = None if self.engine is None else self.engine.state()
        if not self.accelerator.is_main_process:
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_json({"counts": dict(self.counts), "seconds": self.seconds, "said": self._said,
                    "recent": list(self._recent), "known": self._known, "gap": self.gap,
                    "engine": engine}, folder / STATE)

    def load(self, folder: Path, step: int) -> None:
        """Args:
            step: that the checkpoint was written after.
        """
        saved = read_json(folder / STATE, "the state of sampled answers")
        self.gap = tuple(saved.get("gap", self.gap))
        if self.engine is not None:
            self.engine.resume(step, saved.get("engine"))
        self.counts, self.seconds = Counter(saved["counts"]), float(saved["seconds"])
        self._recent, self._said = deque(saved["recent"], WATCHED), bool(saved["said"])
        self._known = {key: (step, tuple(ids), end)
                       for key, (step, ids, end) in saved["known"].items()}
        self._seconds_then = self.seconds


def check_on_policy(args: DistillationConfig) -> None:
    """Raise TaidError for a run that cannot sample: whose texts are learned in windows, or whose
    student no process can have whole for a forward pass. Nothing has to be loaded for it."""
    if args.window is not None:
        raise TaidError(f"objective.on_policy samples answers to prompts, and train.window = "
                        f"{args.window} learns plain texts, which have none: take one of the two "
                        "out.")
    if args.is_zero3:
        raise TaidError("objective.on_policy samples from the student, whose weights ZeRO-3 has in "
                        "parts. Use ZeRO-2, or FSDP2.")


_PLACEHOLDER = (Record("placeholder", (Message("user", (".",)), Message("assistant", (".",)))), 0)


def _inputs(
    adapter: ModelAdapter, pairs: Sequence[tuple[Record, int]], room: int
) -> tuple[dict[str, Tensor] | None, dict[int, str]]:
    """Inputs of all prompts that can be asked (None: of none), and why the others cannot."""
    if not pairs:
        return None, {}
    try:
        together = prompt_inputs(adapter, pairs)
        if together["attention_mask"].shape[1] <= room:
            return together, {}
    except SampleDropped:
        pass  # one that cannot be read fails all
    problems = dict[int, str]()
    for index, pair in enumerate(pairs):
        try:
            if prompt_inputs(adapter, [pair])["attention_mask"].shape[1] > room:
                problems[index] = NO_ROOM
        except SampleDropped as problem:
            problems[index] = problem.reason
    kept = [pair for index, pair in enumerate(pairs) if index not in problems]
    return prompt_inputs(adapter, kept) if kept else None, problems


@contextlib.contextmanager
def without_sync(accelerator: Accelerator, model: Any) -> Iterator[None]:
    """Inside, gradients are added up in this process and no optimizer moves: a micro-batch goes on.

    One backward of two forward passes is none that DDP allows.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        with accelerator.no_sync(model):
            yield
        return
    last = accelerator.sync_gradients
    accelerator.gradient_state._set_sync_gradients(False)
    try:
        yield
    finally:
        accelerator.gradient_state._set_sync_gradients(last)


def _unused(counts: Mapping[str, int]) -> dict[str, int]:
    """Answers that were not learned, by reason."""
    return {name.removeprefix(f"{UNUSED}/"): n for name, n in counts.items()
            if name.startswith(f"{UNUSED}/")}


def _record(row: Any) -> Any:
    """A row as a record with a name of its own; what is no record stays as it is."""
    if isinstance(row, Mapping):
        try:
            row = parse_record(row, "a row")
        except RecordError:
            return row
        said = hashlib.sha256(repr([(m.role, m.parts) for m in row.messages]).encode())
        row = replace(row, source=f"a row ({said.hexdigest()[:12]})")
    return row
