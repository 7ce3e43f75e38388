"""What is known of the demo's worlds: right answers, and the probabilities of captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

from taid_vlm.benchmarks.asking import Task
from taid_vlm.benchmarks.metrics.text import equal_after
from taid_vlm.benchmarks.question import Benchmark, Question, Rule
from taid_vlm.benchmarks.store import question_hash
from taid_vlm.compare import Method
from taid_vlm.compare.folders import Distillation
from taid_vlm.compare.measures import BASE, TEACHER, Items, Measure
from taid_vlm.config.data import DataSource
from taid_vlm.evaluation.answers import AnswerPair
from taid_vlm.evaluation.pairs import Arm
from taid_vlm.evaluation.statistics import mean_of
from taid_vlm.records import Record, open_records
from taid_vlm.report import Column

CAPTION = "caption"
CAPTION_KL = Column("caption_kl", "caption KL", "lower", ".3f", "nats/caption",
                    "KL(truth ‖ model) of whole captions, unbiased: the truth's probabilities are "
                    "known.")
EXACT = Rule("exact", 1, equal_after(str.strip), source="own: the one right answer, as it is")
QUESTIONS = Benchmark("questions", "questions", lambda row: [], (EXACT,), max_new_tokens=48)


# ----- questions ----------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOutQuestion(Question):
    """A turn of a held-out conversation, asked after the right answers to those before it."""

    conversation: Record = field(kw_only=True)
    turn: int = field(kw_only=True)

    def asked(self) -> tuple[Record, int]:
        return self.conversation, self.turn


class HeldOutTask(Task):
    """A task whose questions stand in conversations."""

    questions: Sequence[HeldOutQuestion]

    @cached_property
    def hashes(self) -> dict[str, str]:
        return {question.id: question_hash(_whole(question)) for question in self.questions}


def questions_task(source: DataSource, number: int) -> Task:
    """The first `number` questions of held-out records that have one right answer."""
    records: Any = open_records(source)
    turns = ((record, turn) for record in (records[i] for i in range(len(records)))
             for turn in range(len(record.answers)) if record.category(turn) != CAPTION)
    questions = [_question(*turn) for turn in islice(turns, number)]
    return HeldOutTask(QUESTIONS, EXACT, source, questions)


def _question(record: Record, turn: int) -> HeldOutQuestion:
    last = [message for message in record.before(turn) if message.role == "user"][-1]
    return HeldOutQuestion(
        f"{record.source}/{turn}", tuple(part for part in last.parts if part is not None),
        record.images, (record.answers[turn],), tags={"category": record.category(turn)},
        group=record.source, conversation=record, turn=turn)


def _whole(question: HeldOutQuestion) -> Question:
    """With all that a model is shown."""
    before = question.conversation.before(question.turn)
    return replace(question, prompt=tuple(part for message in before for part in message.parts))


# ----- captions -----------------------------------------------------------------------------


def caption_entropies(source: DataSource) -> dict[str, float]:
    """-log p(caption | scene) in nats of every held-out record, by the record's source."""
    records: Any = open_records(source)
    return {records.where(index): -float(records.columns_of(index)["caption_log_probability"])
            for index in range(len(records))}


def caption_losses(run: Distillation, who: str, truth: Mapping[str, float]) -> dict[str, float]:
    """log p_truth - log p_model in nats of every held-out caption, by the record's source.

    Args:
        who: TEACHER, BASE, or any other name for the student that was trained.
        truth: from `caption_entropies`.
    """
    def nll(answer: AnswerPair) -> Any:
        if who == TEACHER:
            return answer.teacher["teacher_nll"]
        return (answer.before if who == BASE else answer.after)["nll"]

    return {answer.key[0]: nll(answer) - truth[answer.key[0]]
            for answer in run.answers if answer.category == CAPTION}


def caption_measure(methods: Sequence[Method], truth: Mapping[str, float]) -> Measure:
    """KL from the truth to every model, caption by caption."""
    first = methods[0].runs[:1]
    rows = {TEACHER: first, BASE: first, **{method.name: method.runs for method in methods}}
    losses = {name: [caption_losses(run, name, truth) for run in runs]
              for name, runs in rows.items()}
    sources = list(losses[TEACHER][0])
    scores = {name: [[each[source] for source in sources] for each in own]
              for name, own in losses.items()}
    arms = {name: Arm(own, name not in (TEACHER, BASE)) for name, own in scores.items()}
    return Measure(CAPTION_KL, {name: [mean_of(of_seed, shares=False) for of_seed in own]
                                for name, own in scores.items()},
                   Items(arms, None, sources, binary=False))
