"""Choosing by likelihood: how probable each choice is as the answer, with the images in view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import PreTrainedModel

from taid_vlm.adapters import ModelAdapter, Rendered
from taid_vlm.benchmarks.answering import Answer, LocalAnswerer, Settings
from taid_vlm.benchmarks.question import Question
from taid_vlm.benchmarks.rows import LETTERS
from taid_vlm.errors import AlignmentError, SampleDropped
from taid_vlm.models.forward import answer_logits, evaluation_mode
from taid_vlm.models.generation import processing

CHOOSE_BY = ("letter", "text")
NORMALISE = ("sum", "bytes", "tokens")
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

    def batch(self, questions: Sequence[Question], seed: int) -> list[Answer]:
        candidates = [self._candidates(question) for question in questions]
        if not all(text for texts in candidates for text in texts):
            raise SampleDropped("empty choice")
        rendered, images = [], []
        for question, texts in zip(questions, candidates, strict=True):
            space = self._space(question)
            rendered += [self.adapter.render(question.record(space + text)) for text in texts]
            images += [[image.load() for image in question.images]] * len(texts)
        likelihoods: list[Likelihood] = []
        for start in range(0, len(rendered), self.batch_size):
            rows = slice(start, start + self.batch_size)
            likelihoods += log_likelihoods(self.model, self.adapter, rendered[rows], images[rows],
                                           self.context)
        rest = iter(likelihoods)
        return [self._chosen(texts, [next(rest) for _ in texts]) for texts in candidates]

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
        raise SampleDropped("tokens do not spell the text", str(error)) from error
    rows, ids = encoded.rows, encoded.inputs["input_ids"]
    if context is not None and max(len(row.ids) for row in rows) > context:
        raise SampleDropped("longer than the model's context")
    positions = [[token.position for token in row.answers[0].tokens] for row in rows]
    if not all(positions):
        raise SampleDropped("a choice without tokens of its own")
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for index, places in enumerate(positions):
        mask[index, torch.tensor(places) - 1] = True  # the predicting position is the one before
    inputs = {key: x.to(model.device) for key, x in encoded.inputs.items()}
    with evaluation_mode(model):
        logits = answer_logits(model, inputs, mask.to(model.device))
    said = ids[:, 1:][mask[:, :-1]].to(logits.device)
    each = logits.float().log_softmax(-1).gather(-1, said[:, None])[:, 0].double().cpu()
    totals = each.split([len(places) for places in positions])
    return [Likelihood(float(total.sum()), len(total)) for total in totals]
