"""Answers of a model through its adapter, for galleries, accuracy and benchmarks."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from taid_vlm.adapters import ModelAdapter
from taid_vlm.errors import SampleDropped, TaidError
from taid_vlm.models.forward import evaluation_mode, forward_names, unwrap
from taid_vlm.records import Record

Question = tuple[Record, int]  # a record, and which of its answers is asked for

BEFORE = 16  # tokens of a prompt's end

PROCESSOR_FAILED = "the processor failed"

# what checkpoints bring in generation_config.json would make "greedy" something else in each
PLAIN: dict[str, Any] = {
    "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "min_length": 0, "min_new_tokens": None, "temperature": None, "top_p": None, "top_k": None,
}


@dataclass(frozen=True)
class Sampling:
    """Answers are drawn instead of taking the most likely token.

    Every question has random numbers of its own, from `seed` and its record's source. What is
    drawn for it depends neither on its batch nor on the order nor on the kind of device.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | str = 0


@dataclass(frozen=True)
class Generated:
    """A model's answer, stripped.

    Args:
        text: without special tokens, but for those that were to be kept.
        cut: whether max_new_tokens ended it.
        before: the last tokens of its prompt as text, special ones too.
    """

    text: str
    cut: bool
    before: str = ""


def generate_answers(
    model: PreTrainedModel,
    adapter: ModelAdapter,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: bool = False,
    sampling: Sampling | None = None,
) -> list[str]:
    """The model's answer to every question, special tokens removed, stripped.

    Earlier turns of a conversation are given with their reference answers. The student's mode is
    restored; no random state is touched.
    """
    answers: list[str] = []
    starts = range(0, len(questions), batch_size)
    for start in tqdm(starts, desc="answer", disable=None if progress else True, leave=False):
        part = questions[start : start + batch_size]
        generated = generate_batch(model, adapter, part, max_new_tokens=max_new_tokens,
                              sampling=sampling)
        answers.extend(each.text for each in generated)
    return answers


class Continued(NamedTuple):
    """ids: an answer's tokens, without the one that ends it; end: that one, None where
    max_new_tokens did."""

    ids: list[int]
    end: int | None


def generate_batch(
    model: PreTrainedModel,
    adapter: ModelAdapter,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    context: int | None = None,
    keep: Collection[str] = (),
) -> list[Generated]:
    """Answers to questions that are asked at once, greedy unless `sampling` is given.

    Args:
        context: how many tokens the model can take, question and answer together.
        keep: special tokens that stay in an answer's text.

    Raises:
        SampleDropped: an image that cannot be read, a question that the template or the processor
            refuses or that leaves no room in the context.
    """
    inputs = prompt_inputs(adapter, questions)
    check_room(inputs, max_new_tokens, context)
    continued = continue_prompts(model, adapter, inputs, questions,
                                 max_new_tokens=max_new_tokens, sampling=sampling)
    decoded = _decoded(adapter.tokenizer, [each.ids for each in continued], keep)
    before = adapter.tokenizer.batch_decode(inputs["input_ids"][:, -BEFORE:])
    return [Generated(text.strip(), each.end is None, prompt)
            for text, each, prompt in zip(decoded, continued, before, strict=True)]


def _decoded(tokenizer: Any, rows: list[list[int]], keep: Collection[str]) -> list[str]:
    """Texts without special tokens but those to `keep`."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    kept = special & {index for index, token in tokenizer.added_tokens_decoder.items()
                      if token.content in keep}
    if not any(kept.intersection(row) for row in rows):
        return list(tokenizer.batch_decode(rows, skip_special_tokens=True))
    special -= kept
    return list(tokenizer.batch_decode([[i for i in row if i not in special] for row in rows]))


def check_room(inputs: Mapping[str, Tensor], max_new_tokens: int, context: int | None) -> None:
    """Raise SampleDropped where questions leave no room for their answers in the context."""
    longest = int(inputs["attention_mask"].sum(-1).max()) + max_new_tokens
    if context is not None and longest > context:
        raise SampleDropped("longer than the model's context", f"{longest} tokens of {context}")


def prompt_inputs(adapter: ModelAdapter, questions: Sequence[Question]) -> dict[str, Tensor]:
    """Left-padded inputs of what stands before each answer, with its images; raises SampleDropped
    for what cannot be read or is refused."""
    images = [[image.load() for image in record.images_before(turn)]
              for record, turn in questions]
    with processing():
        return adapter.encode_prompts(questions, images)


@torch.no_grad()  # inference mode would leave tensors behind that sharded models cannot use
def continue_prompts(
    model: PreTrainedModel, adapter: ModelAdapter, inputs: Mapping[str, Tensor],
    questions: Sequence[Question], *, max_new_tokens: int, sampling: Sampling | None = None,
    synced: bool = False, as_text: bool = False,
) -> list[Continued]:
    """What a model says after prompts, in its own tokens; its mode is restored.

    Args:
        inputs: of `prompt_inputs`.
        synced: whether the other processes have to take part in every forward pass, because each
            holds a part of the weights.
        as_text: nothing is said that no answer can hold: tokens that begin turns or stand for
            images, rows of the head without a token.
    """
    names, stops = forward_names(type(unwrap(model))), stop_tokens(model, adapter)
    accepted = {key: x.to(model.device) for key, x in inputs.items() if key in names}
    plain = unwrap(model)
    spread = synced or _is_sharded(plain)
    kept = contextlib.nullcontext() if spread else _casts_kept(model.device.type)
    with evaluation_mode(model), _images_in_forward(plain), kept:
        ids = model.generate(
            **accepted, **PLAIN, max_new_tokens=max_new_tokens, eos_token_id=stops,
            pad_token_id=adapter.tokenizer.pad_token_id, synced_gpus=synced,
            logits_processor=_drawing(questions, sampling, _Sayable(
                len(adapter.table), adapter.unsayable.difference(stops)) if as_text else None),
        )
    rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
    ends = [next((i for i, token in enumerate(row) if token in stops), len(row)) for row in rows]
    return [Continued(row[:end], row[end] if end < len(row) else None)
            for row, end in zip(rows, ends, strict=True)]


def _is_sharded(model: PreTrainedModel) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def _casts_kept(device: str) -> contextlib.AbstractContextManager[Any]:
    """In mixed precision every forward pass casts the weights, and an answer has one for each
    token: inside, what the innermost autocast has cast is kept, and nothing else changes. Not for
    weights spread over processes, which are whole for one forward pass only."""
    return torch.autocast(device, torch.get_autocast_dtype(device),
                          enabled=torch.is_autocast_enabled(device))


@contextlib.contextmanager
def _images_in_forward(model: PreTrainedModel) -> Iterator[None]:
    """transformers encodes images before the first forward pass, which is what brings the weights
    of a model that FSDP2 shards together: there, images are encoded in that pass."""
    if not _is_sharded(model):
        yield
        return
    model._supports_mm_encoder_outputs = lambda: False
    try:
        yield
    finally:
        del model._supports_mm_encoder_outputs


@contextlib.contextmanager
def processing() -> Iterator[None]:
    """Inside, what a processor raises (anything) means that its records cannot be used."""
    try:
        yield
    except (TaidError, SampleDropped):
        raise
    except Exception as error:
        raise SampleDropped(PROCESSOR_FAILED, f"{type(error).__name__}: {error}") from error


def stop_tokens(model: PreTrainedModel, adapter: ModelAdapter) -> list[int]:
    """Every token that ends an answer: by template, tokenizer and the checkpoint's own list."""
    listed = unwrap(model).generation_config.eos_token_id
    stops = {adapter.end_of_turn_id, adapter.tokenizer.eos_token_id,
             *(listed if isinstance(listed, list) else [listed])}
    return sorted(index for index in stops if index is not None)


def _drawing(
    questions: Sequence[Question], sampling: Sampling | None, first: LogitsProcessor | None = None
) -> LogitsProcessorList:
    before = [] if first is None else [first]
    if sampling is None:
        return LogitsProcessorList(before)
    names = [f"{record.source}/{turn}" for record, turn in questions]
    return LogitsProcessorList([
        *before, TemperatureLogitsWarper(float(sampling.temperature)),
        TopPLogitsWarper(sampling.top_p), _OwnDraws(names, sampling.seed)])


class _Sayable(LogitsProcessor):
    """Leaves the first `rows` tokens but those of `never`."""

    def __init__(self, rows: int, never: Collection[int]) -> None:
        self.rows, self.never = rows, list(never)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.rows :] = -torch.inf
        scores[:, self.never] = -torch.inf
        return scores


class _OwnDraws(LogitsProcessor):
    """Leaves one token per row: where the row's own random number falls among the probabilities.

    In place of `do_sample`, whose draws are one stream of random numbers for the whole batch.
    """

    def __init__(self, names: Sequence[str], seed: int | str) -> None:
        self._draws = [random.Random(f"{seed}/{name}") for name in names]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        exact = torch.float32 if scores.device.type == "mps" else torch.float64
        below = scores.to(exact).softmax(-1).cumsum(-1)
        drawn = torch.tensor([[own.random()] for own in self._draws], dtype=exact)
        token = torch.searchsorted(below, drawn.to(below.device) * below[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)
