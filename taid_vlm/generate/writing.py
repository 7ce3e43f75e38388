"""How answers are written, and the model on this machine that writes them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from taid_vlm.adapters import Continuation, ModelAdapter
from taid_vlm.adapters.continued import continued_record
from taid_vlm.adapters.texts import ONE_QUESTION
from taid_vlm.benchmarks.answering import (
    Answer,
    Answerer,
    Generating,
    Given,
    Seed,
    Settings,
    generate_settings,
)
from taid_vlm.benchmarks.asking import Asking
from taid_vlm.benchmarks.metrics.thoughts import AUTO, KEEP, MARKS, check_rule
from taid_vlm.benchmarks.question import Question
from taid_vlm.errors import AlignmentError, SampleDropped, TaidError, at_least
from taid_vlm.generate.filters import JUDGE, USUAL, Filter, parse_filters
from taid_vlm.generate.prompts import STAND_IN, Turns
from taid_vlm.io.terminal import Pace
from taid_vlm.models.generation import Sampling, check_room, continue_prompts, prompt_inputs
from taid_vlm.records import Record

MAX_NEW_TOKENS = 512


@dataclass(frozen=True)
class Writing:
    """What is asked of a model, and what becomes of its answers.

    Args:
        n: answers per prompt. seed: of the run; each has random numbers of its own, from this one,
            the record and its number.
        turns: as `read_prompts`.
        thoughts: "keep" leaves an answer's text as the model wrote it, a rule of
            `metrics.thoughts` takes thoughts off; reasoning: these stand beside their answers then
            (with "keep", too, where the model `thinks_apart`).
        filters: rules by name, in any order.
        copies: image files are copied, too.

    Raises:
        TaidError: values that make no sense, alone or together.
    """

    n: int = 1
    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    batch_size: int = 8
    turns: Turns = "each"
    thoughts: str = KEEP
    reasoning: bool = False
    filters: Sequence[Filter] = tuple(parse_filters(USUAL))
    copies: bool = False

    def __post_init__(self) -> None:
        at_least("--n", self.n, 1)
        check_rule(self.thoughts)
        if not self.temperature:
            if self.n > 1:
                raise TaidError(f"--n = {self.n}, but at temperature 0 all answers are the same; "
                                "set --temperature, for example to 1.")
            for name in ("top_p", "seed"):
                if getattr(self, name) is not None:
                    raise TaidError(f"--{name.replace('_', '-')} is for sampled answers, but "
                                    "--temperature is 0; set it, for example to 1.")
        if self.reasoning and self.thoughts == KEEP:
            raise TaidError("--reasoning goes with --thoughts: which rule takes thoughts off?")
        if self.n == 1 and "agree" in self.names:
            raise TaidError("--filters agree compares several answers to a prompt; set --n.")
        Asking(max_new_tokens=self.max_new_tokens, temperature=self.temperature,
               top_p=1.0 if self.top_p is None else self.top_p, batch_size=self.batch_size)

    @property
    def names(self) -> list[str]:
        """Of the filters."""
        return [each.name for each in self.filters]

    @property
    def judged_from(self) -> float | None:
        """The least score of an answer that is kept; None where nobody judges."""
        return next((each.value for each in self.filters if each.name == JUDGE), None)

    @property
    def reading(self) -> str:
        """The rule by which filters see an answer without its thought."""
        return AUTO if self.thoughts == KEEP else self.thoughts

    @property
    def settings(self) -> Settings:
        """What answers depend on beside model and prompt."""
        how = generate_settings(self.max_new_tokens, self.temperature, self.top_p or 1.0)
        return how | ({"seed": self.seed or 0} if self.temperature else {})

    def seeds(self) -> dict[int, Seed]:
        """What the answers of each number are drawn with."""
        return {number: f"{self.seed or 0}/{number}" for number in range(self.n)}


def thinks_apart(adapter: ModelAdapter) -> bool:
    """Whether a model says that it thinks in tokens that no answer can hold (gpt-oss, Cohere): its
    thoughts stand beside its answers in any case."""
    names = adapter.tokenizer.convert_ids_to_tokens(sorted(adapter.unsayable))
    return not MARKS.isdisjoint(names)


class Local(Generating):
    """Answers in the model's own words, as it would learn them: with the special tokens that an
    answer can hold and no others, and with the opening of a thought where its prompt has that."""

    def batch(self, questions: Sequence[Question], seed: Seed) -> list[Answer]:
        how, asked = self.settings, [question.asked() for question in questions]
        for record, turn in asked:
            self._check(record, turn)
        if thinks_apart(self.adapter):
            return super().batch(questions, seed)
        inputs = prompt_inputs(self.adapter, asked)
        check_room(inputs, how["max_new_tokens"], self.context)
        sampling = Sampling(how["temperature"], how["top_p"], seed) if how["temperature"] else None
        said = continue_prompts(self.model, self.adapter, inputs, asked, sampling=sampling,
                                max_new_tokens=how["max_new_tokens"], as_text=True)
        return [self._answer(Continuation(record, turn, tuple(ids), end))
                for (record, turn), (ids, end) in zip(asked, said, strict=True)]

    def _check(self, record: Record, turn: int) -> None:
        """Raise SampleDropped where the model's template does not show all that is asked."""
        before = record.before(turn)
        if self.adapter.form is None and [message.role for message in before] != ["user"]:
            raise SampleDropped(ONE_QUESTION, record.source)
        earlier = [replace(each, weight=0.0) for each in before]
        try:
            self.adapter.render(replace(record, messages=(*earlier, STAND_IN)))
        except AlignmentError as error:
            raise SampleDropped(error.reason, str(error)) from None

    def _answer(self, said: Continuation) -> Answer:
        try:
            record, rendered = continued_record(self.adapter, said)
        except SampleDropped as problem:
            return Answer(problem=problem.reason, cut=said.end is None)
        ended = len(rendered.own) > len(said.ids)  # not by the limit, nor by bytes that are no text
        text = record.messages[-1].text
        if self.adapter.form is not None:  # without a template, the space is between two words
            text = text.strip()
        return Answer(text, cut=not ended)


@dataclass
class Shared:
    """An answerer that is asked a process's part of the questions, and says once, after some
    answers, how long all of them take.

    of: how many questions are left for it, all seeds together.
    process: (rank, world size) where the answerer does not share out questions itself.
    """

    answerer: Answerer
    batch_size: int
    of: int
    process: tuple[int, int]
    main: bool

    def __post_init__(self) -> None:
        self.settings = self.answerer.settings
        self.pace = Pace(self.of, self.batch_size, " (the longest prompts come first)", self.main)

    def answers(
        self, questions: Sequence[Question], done: Collection[str], seed: Any
    ) -> Iterator[Given]:
        rank, world = self.process
        for given in self.answerer.answers(questions[rank::world], done, seed):
            self.pace.add(len(given))
            yield given
