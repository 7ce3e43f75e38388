"""Answers that the student gives itself, sampled before the optimizer step that learns from them.

Who samples, and with which random numbers, follows from the seed, the step and the record alone:
it is the same for any number of processes and any split of the step, and a resumed run needs no
state for it. A record of which no answer can be learned is learned from its reference, so that no
record is lost.
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

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor

from taid_vlm.adapters import Continuation, ModelAdapter
from taid_vlm.batch.collator import Batch
from taid_vlm.batch.figures import Measured
from taid_vlm.config.objective import OnPolicy
from taid_vlm.errors import RecordError, SampleDropped, TaidError
from taid_vlm.io.files import read_json, write_json
from taid_vlm.models.generation import Continued, Sampling, continue_prompts, prompt_inputs
from taid_vlm.records import Message, Record, parse_record

logger = logging.getLogger(__name__)

Collate = Callable[[Sequence[Any]], Batch]

STATE = "on_policy.json"
NOT_LEARNED = "A sampled answer is not learned, but its record's own"
OWN = "own"  # marks the batch of sampled answers
ASKED, SAMPLED, REUSED, STALE = "asked", "sampled", "reused", "stale"
CUT, REPEATING, UNUSED, TOKENS, ROWS = "cut", "repeating", "unused", "tokens", "rows"
NO_ROOM = "no room for an answer"
WATCHED, COLLAPSED = 64, 0.75  # of so many answers in a row, the share that makes a collapse
CYCLE, REPEATED = 8, 24  # an answer repeats itself if the last so many (second) tokens are copies
# of at most so many (first)


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


class Rollouts:
    """The sampled answers of one run; every process knows what became of those of all.

    Args:
        spec: of the objective.
        student: its adapter.
        references, samples: make batches of records, and of `Continuation`s.
        seed: of the run.

    Raises:
        TaidError: a student whose weights no process can have whole for a forward pass.
    """

    def __init__(
        self, spec: OnPolicy, student: ModelAdapter, references: Collate, samples: Collate,
        accelerator: Accelerator, seed: int,
    ) -> None:
        self.spec, self.student, self.accelerator, self.seed = spec, student, accelerator, seed
        self.references, self.samples = references, samples
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0  # of sampling, over all processes
        self._since: Counter[str] = Counter()  # the same since the last log line
        self._recent: deque[bool] = deque(maxlen=WATCHED)
        self._known: dict[str, tuple[int, tuple[int, ...], int | None]] = {}  # step, ids, end
        self._said = False
        self._clock, self._seconds_then = time.perf_counter(), 0.0
        kind = accelerator.distributed_type
        self._sharded = kind in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        plugin = accelerator.state.deepspeed_plugin if kind == DistributedType.DEEPSPEED else None
        if plugin is not None and plugin.zero_stage == 3:
            raise TaidError("objective.on_policy samples from the student, whose weights ZeRO-3 "
                            "has in parts. Use ZeRO-2, or FSDP2.")

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
        for question, said in self._sampled(list(fresh.values()), model, step):
            if isinstance(said, str):
                happened.counts[f"{UNUSED}/{said}"] += 1
                continue
            answers[question.key] = Continuation(
                question.record, question.turn, tuple(said.ids), said.end)
            happened.known[question.key] = tuple(said.ids), said.end
        return answers

    def _sampled(
        self, questions: Sequence[Question], model: Any, step: int
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

    # ----- what became of them --------------------------------------------------------------

    def _take(self, happened: Happened, step: int) -> None:
        """Add up what happened in all processes, and look at the last answers."""
        for each in gather_object([happened]):
            self.counts.update(each.counts)
            self._since.update(each.counts)
            self.seconds += each.seconds
            self._recent.extend(each.degenerate)
            if self.spec.max_age:
                self._known |= {key: (step, *said) for key, said in each.known.items()}
        if self.spec.max_age:
            self._known = {key: kept for key, kept in self._known.items()
                           if step - kept[0] <= self.spec.max_age}
        self._judge()

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
        return {f"on_policy/{name}": value for name, value in logs.items()}

    def report(self) -> dict[str, Any]:
        """For the run's results."""
        counts, sampled = self.counts, self.counts[SAMPLED]
        return {
            "share": sampled / max(counts[ROWS], 1), "asked": counts[ASKED], "sampled": sampled,
            "reused": counts[REUSED], "stale": counts[STALE], "cut": counts[CUT],
            "repeating": counts[REPEATING], "tokens": counts[TOKENS], "seconds": self.seconds,
            "unused": _unused(counts)}

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
        """What a run goes on with; nothing of it decides who samples or what is drawn."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json({"counts": dict(self.counts), "seconds": self.seconds, "said": self._said,
                    "recent": list(self._recent), "known": self._known}, folder / STATE)

    def load(self, folder: Path) -> None:
        saved = read_json(folder / STATE, "the state of sampled answers")
        self.counts, self.seconds = Counter(saved["counts"]), float(saved["seconds"])
        self._recent, self._said = deque(saved["recent"], WATCHED), bool(saved["said"])
        self._known = {key: (step, tuple(ids), end)
                       for key, (step, ids, end) in saved["known"].items()}
        self._seconds_then = self.seconds


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


def on_policy_figures(
    batch: Batch, figures: Mapping[str, Measured]
) -> dict[str, Measured]:
    """Figures of sampled answers under names of their own; KL also of the first and the second
    half of each answer: what a student that has left the references' ground does not know."""
    named = {f"on_policy/{name}": figure for name, figure in figures.items()}
    if "kl" in figures:
        values, tokens = figures["kl"]
        late = _late(batch["row"])
        late = late if tokens is None else late[tokens]
        for half, inside in (("early", ~late), ("late", late)):
            at = inside.nonzero()[:, 0]
            named[f"on_policy/kl_{half}"] = Measured(
                values[at], at if tokens is None else tokens[at])
    return named


def _late(row: Tensor) -> Tensor:
    """Whether each of the tokens, in order, stands in the second half of its row's."""
    counts = torch.bincount(row)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    return 2 * place >= counts[row]


def repeating(ids: Sequence[int]) -> bool:
    """Whether an answer ends in copies of a few tokens."""
    last = list(ids[-REPEATED:])
    return len(last) == REPEATED and any(
        last[cycle:] == last[:-cycle] for cycle in range(1, CYCLE + 1))


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
