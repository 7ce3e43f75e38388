"""Models that answer a benchmark's questions: what they give, and the local one that generates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from taid_vlm.adapters import ModelAdapter
from taid_vlm.benchmarks.metrics.thoughts import MARKS, ends_inside
from taid_vlm.benchmarks.question import Question
from taid_vlm.errors import SampleDropped, TaidError
from taid_vlm.models.generation import PROCESSOR_FAILED, Sampling, generate_batch

REFUSALS = 8  # so many without one answer: the way of asking is wrong, not the questions

Settings = dict[str, Any]
Seed = int | str


@dataclass(frozen=True)
class Answer:
    """What a model gave to one question.

    Args:
        problem: why there is no answer; such a question counts as wrong and is never judged.
        cut: whether the limit of new tokens ended the answer.
        likelihoods: per choice its log-likelihood in nats and its number of tokens.
        thought: what a server gave apart from the answer; other thoughts stand in `text`.
        thought_tokens: as a server counts them; 0 where it does not.
        opened: whether the prompt ends inside a thought.
        calls: of tools, where a server gave them apart from the answer; as `Message.calls`.
    """

    text: str = ""
    problem: str = ""
    cut: bool = False
    likelihoods: tuple[tuple[float, int], ...] = ()
    thought: str = ""
    thought_tokens: int = 0
    opened: bool = False
    calls: tuple[Mapping[str, Any], ...] = ()


Given = list[tuple[Question, Answer]]


class Answerer(Protocol):
    """What answers questions, a model on this machine or behind a URL.

    settings: everything beside the model that changes its answers; stands in the results.
    """

    settings: Settings

    def answers(
        self, questions: Sequence[Question], done: Collection[str], seed: Seed
    ) -> Iterator[Given]:
        """Answers as they come, to all questions but those whose ids are `done`."""


def generate_settings(max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0
                      ) -> Settings:
    """The settings of a model that generates, here or behind a URL; temperature 0 is greedy."""
    return {"method": "generate", "max_new_tokens": max_new_tokens, "temperature": temperature,
            "top_p": top_p if temperature else 1.0}


def hold_back(
    stream: Iterable[tuple[Given, Sequence[str]]], answered: bool, complaint: str
) -> Iterator[Given]:
    """Answers as they come, but no refusals before the first answer: where there is nothing else,
    the way of asking is wrong and no question is to blame.

    Args:
        stream: answers, and the words of each refusal among them.
        answered: whether some question has been answered before.
        complaint: the error's message where everything is refused; {} stands for the last words.
    """
    held: Given = []
    refused: list[str] = []
    for given, words in stream:
        held += given
        refused += words
        answered |= any(not answer.problem for _, answer in given)
        if answered:
            yield held
            held = []
        elif len(refused) >= REFUSALS:
            break
    if held and refused:
        raise TaidError(complaint.format(refused[-1]))
    if held:
        yield held


def plan_batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Batches of alike lengths, the longest first, so that too large a batch fails at once.

    They depend on the questions alone and not on their order, so that going on after an
    interruption meets the same batches again.
    """
    ordered = sorted(questions, key=lambda question: (
        *(-size for size in question.length), question.id))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


class LocalAnswerer:
    """A model on this machine; what one batch is asked is left to `batch`.

    Args:
        batch_size: rows that are computed at once. Answers do not depend on it but where float
            rounding decides between tokens that are all but equally likely: hardly ever in
            float32, in some long answers in half precision.
        process: (rank, world size); this process takes every world-size-th batch.
        settings: what `settle` takes.
    """

    settle: Callable[..., Settings]  # the settings that are given, and defaults for the others

    def __init__(self, model: PreTrainedModel, adapter: ModelAdapter, batch_size: int,
                 process: tuple[int, int] = (0, 1), **settings: Any) -> None:
        self.model, self.adapter, self.batch_size = model, adapter, batch_size
        self.process, self.settings = process, self.settle(**settings)
        self.context: int | None = getattr(
            model.config.get_text_config(), "max_position_embeddings", None)

    def batch(self, questions: Sequence[Question], seed: Seed) -> list[Answer]:
        """Answers to questions that are asked at once; SampleDropped if one cannot be asked."""
        raise NotImplementedError

    def answers(
        self, questions: Sequence[Question], done: Collection[str], seed: Seed
    ) -> Iterator[Given]:
        return hold_back(self._batches(questions, done, seed), bool(done),
                         "the model's processor takes no question: {}")

    def _batches(
        self, questions: Sequence[Question], done: Collection[str], seed: Seed
    ) -> Iterator[tuple[Given, Sequence[str]]]:
        rank, world = self.process
        for batch in plan_batches(questions, self.batch_size)[rank::world]:
            if any(question.id not in done for question in batch):
                self._failures = list[str]()
                yield list(zip(batch, self._attempt(batch, seed), strict=True)), self._failures

    def _attempt(self, batch: Sequence[Question], seed: Seed) -> list[Answer]:
        """One question that cannot be asked must not take the others of its batch with it."""
        try:
            return self.batch(batch, seed)
        except SampleDropped as problem:
            if len(batch) == 1:
                if problem.reason == PROCESSOR_FAILED:
                    self._failures.append(str(problem))
                return [Answer(problem=problem.reason)]
            half = len(batch) // 2  # what can be asked stays together
            return self._attempt(batch[:half], seed) + self._attempt(batch[half:], seed)
        except torch.OutOfMemoryError as error:
            raise TaidError(f"--batch-size = {self.batch_size}: the device's memory is full. The "
                            "answers so far are kept; run again with a smaller one.") from error


class Generating(LocalAnswerer):
    """Answers in the model's own words, greedy or sampled."""

    settle = staticmethod(generate_settings)

    def batch(self, questions: Sequence[Question], seed: Seed) -> list[Answer]:
        temperature, top_p = self.settings["temperature"], self.settings["top_p"]
        answers = generate_batch(
            self.model, self.adapter, [question.asked() for question in questions],
            max_new_tokens=self.settings["max_new_tokens"], context=self.context, keep=MARKS,
            sampling=Sampling(temperature, top_p, seed) if temperature else None)
        return [Answer(each.text, cut=each.cut, opened=ends_inside(each.before))
                for each in answers]
