"""What a benchmark asks, how an answer is judged, and what a benchmark is made of."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from taid_vlm.benchmarks.rows import Row
from taid_vlm.evaluation.statistics import Estimate, mean_of
from taid_vlm.records import ImageRef, Message, Record

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Question:
    """One question as it is put to a model.

    Args:
        id: unique within the benchmark's data.
        prompt: texts, and None where an image stands, in the order the model sees them.
        answers: every accepted answer; the option's letter where there are choices.
        choices: texts of the options A, B, C ...; none for open questions.
        tags: what figures are split by, for example {"category": "chart"}.
        extra: columns that only this benchmark's rules read (unit, precision ...).
        group: questions with the same group share an item (the rotations of MMBench, the questions
            about one image) and are no independent draws; "" stands for a group of its own.
    """

    id: str
    prompt: tuple[str | None, ...]
    images: tuple[ImageRef, ...] = ()
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""

    def record(self, answer: str = "") -> Record:
        """The question as a conversation, closed with `answer` where one is given."""
        said = (Message("assistant", (answer,)),) if answer else ()
        return Record(self.id, (Message("user", self.prompt), *said), self.images)

    def asked(self) -> tuple[Record, int]:
        """What a model is given: a conversation, and which of its answers it is to give."""
        return self.record(), 0

    @property
    def length(self) -> tuple[int, int]:
        """How long it is to a model: images, and characters."""
        return len(self.images), sum(len(part or "") for part in self.prompt)


@dataclass(frozen=True)
class Verdict:
    """What a rule says of one answer.

    score: in [0, 1] (CIDEr: its own scale); an answer that cannot be read has 0, but for a rule
        that guesses.
    read: what the rule took for the answer; None where it could not be read, which is counted.
    unscored: why the answer has no score at all (there is no judge, a metric is missing); it is in
        no figure, and counted by reason.
    """

    score: float
    read: str | None
    unscored: str = ""


@dataclass(frozen=True)
class Judged:
    """A question, a model's answer to it without its thought, and the verdict.

    missing: why there is no answer, "" where there is one; such a question is wrong.
    thought: what was taken off the answer, by the rule that is named in `thought_rule`.
    """

    question: Question
    answer: str
    verdict: Verdict
    missing: str = ""
    thought: str = ""
    thought_rule: str = ""


def accuracy(judged: Sequence[Judged]) -> dict[str, Estimate]:
    """The mean score of all questions: what most benchmarks report."""
    return {"accuracy": mean_of([j.verdict.score for j in judged], groups(judged))}


def split_by(judged: Sequence[Judged], key: Callable[[Judged], Key]) -> dict[Key, list[Judged]]:
    """What has one value of `key` together, in the order of first appearance."""
    parts: dict[Key, list[Judged]] = {}
    for j in judged:
        parts.setdefault(key(j), []).append(j)
    return parts


def all_right(judged: Sequence[Judged], key: Callable[[Judged], Key]) -> dict[Key, float]:
    """For every value of `key`, 1.0 where all questions that have it are right."""
    return {name: float(all(j.verdict.score == 1.0 for j in part))
            for name, part in split_by(judged, key).items()}


def groups(judged: Sequence[Judged]) -> list[str]:
    """The group of every question, its own id where it stands alone."""
    return [j.question.group or j.question.id for j in judged]


NO_JUDGE = "no judge (--judge-url, --judge-model)"


@dataclass(frozen=True)
class JudgePrompt:
    """How a rule asks a language model about an answer.

    Args:
        name, version: stand in the results, beside a hash of what is asked.
        write: template, question and answer -> what the judge is asked.
        read: question and the judge's reply -> a verdict; None where the reply says none.
        max_new_tokens: what a reply may take.
        template: the words that `write` fills in, which a user may replace; "" where each question
            brings its own.
    """

    name: str
    version: int
    write: Callable[[str, Question, str], str]
    read: Callable[[Question, str], Verdict | None]
    max_new_tokens: int = 64
    template: str = ""


@dataclass(frozen=True)
class Rule:
    """One way of judging a benchmark's answers, as one institution does it.

    Args:
        name: "official" | "lmms" | "vlmevalkit", or what it does where there is only one.
        version: counted up whenever a verdict changes; stands in every results file.
        judge: questions and answers -> one verdict each. Of pure text: no model, and no chance
            but that of a seed.
        figures: the judged questions -> the benchmark's figures, the headline first. Values are
            shares of 1, except where the benchmark has points of its own.
        source: where the rule was read, for example a repository and file.
        guesses: whether it takes an option at random for what it cannot read, which stays unread.
        prompt: what a language model is asked about the answers that `judge` leaves unscored.
    """

    name: str
    version: int
    judge: Callable[[Sequence[Question], Sequence[str]], list[Verdict]]
    figures: Callable[[Sequence[Judged]], dict[str, Estimate]] = accuracy
    source: str = ""
    prompt: JudgePrompt | None = None
    guesses: bool = False


def left_to_judge(questions: Sequence[Question], answers: Sequence[str]) -> list[Verdict]:
    """A rule's `judge` where all of it is up to a language model."""
    return [Verdict(0.0, None, NO_JUDGE) for _ in questions]


def one_by_one(
    judge: Callable[[Question, str], Verdict]
) -> Callable[[Sequence[Question], Sequence[str]], list[Verdict]]:
    """A rule's `judge` from one that looks at a single answer."""
    def all_of_them(questions: Sequence[Question], answers: Sequence[str]) -> list[Verdict]:
        return [judge(q, a) for q, a in zip(questions, answers, strict=True)]

    return all_of_them


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: how its rows become questions, and how answers to them are judged.

    Args:
        name: as it is asked for on the command line.
        title: as it stands in a table.
        read: one row in the hub's own columns -> its questions (several for rotations); raises
            SampleDropped for a row that is no part of the benchmark, which is counted.
        rules: the first is the default.
        hub: (path, configuration or None, split) for `datasets.load_dataset`.
        max_new_tokens: what an answer may take.
        likelihood: whether its questions can be answered by the likelihood of their choices.
        decimals: how figures are shown: 100 times the value with so many decimals; None for
            figures with points of their own.
        complete: all the questions read -> those asked, where a row alone cannot tell.
        file: the YAML file of a user's own; "" for those of the package.
    """

    name: str
    title: str
    read: Callable[[Row], list[Question]]
    rules: tuple[Rule, ...]
    hub: tuple[str, str | None, str] | None = None
    max_new_tokens: int = 32
    likelihood: bool = False
    decimals: int | None = 1
    complete: Callable[[list[Question]], list[Question]] = list
    file: str = ""
