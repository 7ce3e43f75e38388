"""Choosing by likelihood: how probable each choice is as the answer, with the images in view."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from taid_vlm.adapters import ModelAdapter, Rendered
from taid_vlm.adapters.encoded import EncodedBatch, EncodedRow
from taid_vlm.benchmarks.answering import Answer, LocalAnswerer, Settings
from taid_vlm.benchmarks.question import Question
from taid_vlm.benchmarks.rows import LETTERS
from taid_vlm.errors import AlignmentError, SampleDropped
from taid_vlm.models.forward import answer_logits, ending_logits, evaluation_mode
from taid_vlm.models.generation import processing

logger = logging.getLogger(__name__)

CHOOSE_BY = ("letter", "text")
NORMALISE = ("sum", "bytes", "tokens")
NOT_SPELLED = "tokens do not spell the text"
SHARED_FROM = 128  # tokens: a shorter prompt is not worth two forward passes a question
ROOM = (3e-2, 2e-4)  # relative: what half precision and float32 may round differently
DECIMALS = 3  # of a log-likelihood in nats: what another batch size may round differently is gone


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihood of an answer in nats, summed over its tokens, and how many these are."""

    total: float
    tokens: int


def choose_settings(choose_by: str = "letter", normalise: str = "sum") -> Settings:
    """The settings of a model that chooses.

    Args:
        choose_by: "letter" compares the letters A, B, C ..., "text" the choices' texts.
        normalise: what a log-likelihood is divided by before it is compared: "sum" (nothing),
            "bytes" of the choice in UTF-8, or "tokens".
    """
    return {"method": "likelihood", "choose_by": choose_by, "normalise": normalise}


class Choosing(LocalAnswerer):
    """The choice that is the most likely answer through the model's own template."""

    settle = staticmethod(choose_settings)

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.shared = self.missed = 0  # questions whose cached prompt gave the same, and not

    @property
    def shares(self) -> bool:
        """Whether prompts are worth keeping: not where the model mostly gives something else."""
        return self.missed <= self.shared

    def batch(self, questions: Sequence[Question], seed: int | str) -> list[Answer]:
        texts = [self._candidates(question) for question in questions]
        if not all(text for each in texts for text in each):
            raise SampleDropped("empty choice")
        rendered = [[self.adapter.render(question.record(self._space(question) + text))
                     for text in each] for question, each in zip(questions, texts, strict=True)]
        images = [[image.load() for image in question.images] for question in questions]
        likelihoods = self._likelihoods(rendered, images)
        return [self._chosen(*each) for each in zip(texts, likelihoods, strict=True)]

    def _likelihoods(self, rendered: Sequence[Sequence[Rendered]],
                     images: Sequence[Sequence[Image.Image]]) -> list[list[Likelihood]]:
        """Of every choice of every question; what choices share is computed once.

        Choices that differ in their last token alone (letters) are read off one row. Others go on
        from the cached prompt, if that is long and has given what whole rows give.
        """
        encoded = _endings(self.adapter, rendered, images)
        if encoded is not None:
            batch, rows = encoded
            check_rows([row for group in rows for row in group], self.context)
            if all(map(differ_at_last, rows)):
                return last_likelihoods(self.model, batch.inputs, rows)
            long = min(map(shared_length, rows)) >= SHARED_FROM
            if self.shares and long and len(rows) > 1:
                return [found for each in zip(rendered, images, strict=True)
                        for found in self._likelihoods([each[0]], [each[1]])]
            if self.shares and long and (found := self._from_prompt(batch.inputs, rows[0])):
                return [found]
        flat = [item for group in rendered for item in group]
        shown = [each for group, each in zip(rendered, images, strict=True) for _ in group]
        rest = iter(self._one_by_one(flat, shown))
        return [[next(rest) for _ in group] for group in rendered]

    def _one_by_one(self, rendered: Sequence[Rendered], images: Sequence[Sequence[Image.Image]]
                    ) -> list[Likelihood]:
        return [found for start in range(0, len(rendered), self.batch_size)
                for found in log_likelihoods(
                    self.model, self.adapter, rendered[start: start + self.batch_size],
                    images[start: start + self.batch_size], self.context)]

    def _from_prompt(self, inputs: Mapping[str, Tensor], rows: Sequence[EncodedRow]
                     ) -> list[Likelihood] | None:
        """From the cached prompt; None where the first choice comes out otherwise than as a whole
        row, which is computed for its cache anyway."""
        try:
            whole, found = prompt_likelihoods(self.model, inputs, rows)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # caches of some families are not cut, or not gone on from
            logger.warning("choices are computed row by row: %s: %s", type(error).__name__, error)
            self.missed, self.shared = 1, 0
            return None
        room = ROOM[self.model.dtype == torch.float32] * (1 + abs(whole.total))
        same = abs(found[0].total - whole.total) <= room
        self.shared, self.missed = self.shared + same, self.missed + (not same)
        return found if same else None

    def _candidates(self, question: Question) -> Sequence[str]:
        if self.settings["choose_by"] == "letter":
            return LETTERS[: len(question.choices)]
        return [choice.strip() for choice in question.choices]

    def _space(self, question: Question) -> str:
        """What stands before an answer where no template puts anything there."""
        end = (question.prompt[-1] or "")[-1:]
        return "" if self.adapter.form is not None or end.isspace() else " "

    def _chosen(self, texts: Sequence[str], likelihoods: Sequence[Likelihood]) -> Answer:
        """The letter of the best choice, the first of equals; decided on what is stored."""
        rounded = [(round(each.total, DECIMALS), each.tokens) for each in likelihoods]
        by = self.settings["normalise"]
        scores = [total / {"sum": 1, "bytes": len(text.encode()), "tokens": tokens}[by]
                  for text, (total, tokens) in zip(texts, rounded, strict=True)]
        return Answer(LETTERS[scores.index(max(scores))], likelihoods=tuple(rounded))


def _endings(adapter: ModelAdapter, rendered: Sequence[Sequence[Rendered]],
             images: Sequence[Sequence[Image.Image]]
             ) -> tuple[EncodedBatch, list[list[EncodedRow]]] | None:
    try:
        with processing():
            return adapter.encode_endings(rendered, images)
    except AlignmentError as error:
        raise SampleDropped(NOT_SPELLED, str(error)) from error


def check_rows(rows: Sequence[EncodedRow], context: int | None) -> None:
    """Raise SampleDropped for a row that is too long or has no answer of its own."""
    if context is not None and max(len(row.ids) for row in rows) > context:
        raise SampleDropped("longer than the model's context")
    if not all(row.answers[0].tokens for row in rows):
        raise SampleDropped("a choice without tokens of its own")


def places(row: EncodedRow) -> list[int]:
    """Where the answer's tokens stand."""
    return [token.position for token in row.answers[0].tokens]


def differ_at_last(rows: Sequence[EncodedRow]) -> bool:
    """Whether all answers are the same up to their last token."""
    last = places(rows[0])[-1]
    return all(places(row) == places(rows[0]) and row.ids[:last] == rows[0].ids[:last]
               for row in rows)


def shared_length(rows: Sequence[EncodedRow]) -> int:
    """How many tokens all rows begin with, of those before the one that predicts an answer."""
    most = min(places(row)[0] for row in rows) - 1
    return next((index for index in range(most) if len({row.ids[index] for row in rows}) > 1), most)


@torch.inference_mode()
def last_likelihoods(model: PreTrainedModel, inputs: Mapping[str, Tensor],
                     rows: Sequence[Sequence[EncodedRow]]) -> list[list[Likelihood]]:
    """Of answers that differ in their last token alone, from the first row of every group.

    Args:
        inputs: of the first rows, padded on the right.
    """
    mask = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    for index, group in enumerate(rows):
        mask[index, torch.tensor(places(group[0])) - 1] = True
    given = {key: x.to(model.device) for key, x in inputs.items()}
    with evaluation_mode(model):
        logits = answer_logits(model, given, mask.to(model.device)).float().log_softmax(-1)
    found, rest = [], iter(logits.split([len(places(group[0])) for group in rows]))
    for group in rows:
        said = torch.tensor([[row.ids[place] for place in places(row)] for row in group])
        each = next(rest).gather(-1, said.T.to(logits.device)).double().cpu().sum(0)
        found.append([Likelihood(float(total), said.shape[1]) for total in each])
    return found


@torch.inference_mode()
def prompt_likelihoods(model: PreTrainedModel, inputs: Mapping[str, Tensor],
                       rows: Sequence[EncodedRow]) -> tuple[Likelihood, list[Likelihood]]:
    """Of several answers to one question, whose prompt is computed once.

    Args:
        inputs: of the first row alone.

    Returns:
        The first answer's as a whole row, and those of all from the cached prompt.
    """
    start = shared_length(rows)
    tails = [row.ids[start: places(row)[-1]] for row in rows]  # nothing follows the last token
    width = max(map(len, tails))
    endings = torch.tensor([[*tail, *[0] * (width - len(tail))] for tail in tails])
    mask = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    mask[0, torch.tensor(places(rows[0])) - 1] = True
    given = {key: x.to(model.device) for key, x in inputs.items()}
    with evaluation_mode(model):
        first, logits = ending_logits(model, given, mask.to(model.device), start,
                                      endings.to(model.device))
    each = [own[torch.tensor(places(row), device=own.device) - 1 - start]
            for row, own in zip(rows, logits, strict=True)]
    return _said(rows[0], first), list(map(_said, rows, each))


def _said(row: EncodedRow, logits: Tensor) -> Likelihood:
    """Of a row's answer, from the logits that predict its tokens."""
    said = torch.tensor([row.ids[place] for place in places(row)], device=logits.device)
    chances = logits.float().log_softmax(-1).gather(-1, said[:, None])
    return Likelihood(float(chances.double().sum()), len(said))


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel, adapter: ModelAdapter, rendered: Sequence[Rendered],
    images: Sequence[Sequence[Image.Image]], context: int | None = None,
) -> list[Likelihood]:
    """How likely the first answer of each rendered record is, as training sees it.

    The answer's tokens are those whose bytes it covers; the end of the turn is not counted.

    Args:
        context: how many tokens the model can take.

    Raises:
        SampleDropped: a record that the processor refuses, that is too long, or whose tokens do
            not spell its text.
    """
    try:
        with processing():
            encoded = adapter.encode(rendered, images)
    except AlignmentError as error:
        raise SampleDropped(NOT_SPELLED, str(error)) from error
    rows, ids = encoded.rows, encoded.inputs["input_ids"]
    check_rows(rows, context)
    positions = [places(row) for row in rows]
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for index, own in enumerate(positions):
        mask[index, torch.tensor(own) - 1] = True  # the predicting position is the one before
    inputs = {key: x.to(model.device) for key, x in encoded.inputs.items()}
    with evaluation_mode(model):
        logits = answer_logits(model, inputs, mask.to(model.device))
    said = ids[:, 1:][mask[:, :-1]].to(logits.device)
    each = logits.float().log_softmax(-1).gather(-1, said[:, None])[:, 0].double().cpu()
    totals = each.split([len(own) for own in positions])
    return [Likelihood(float(total.sum()), len(total)) for total in totals]
