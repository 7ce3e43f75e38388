"""What a vLLM server is asked for a sampled answer, and how what it says is read.

A prompt goes as token ids, or as a chat with its images, of which the server says which ids it has
read; the answer comes back as token ids, each with its log-probability (of the raw logits).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from taid_vlm.adapters import ModelAdapter
from taid_vlm.config.sampling import SamplingSpec
from taid_vlm.errors import TaidError
from taid_vlm.io.endpoint import WrongAnswer
from taid_vlm.models.forward import head_rows
from taid_vlm.models.generation import stop_tokens
from taid_vlm.records import Record
from taid_vlm.teachers.protocol import CHAT, COMPLETIONS, Message, as_chat

VIDEO = "a video, of which a server would sample its own frames"
NEVER = -100.0  # added to the logit of a token that no answer can hold


class Prompt(NamedTuple):
    """What is asked: ids, or the chat that stands for them; `key`: of record and turn."""

    key: str
    ids: list[int]
    chat: Message | None


@dataclass(frozen=True)
class Drawing:
    """How an answer is drawn. stops: tokens that end it. never: tokens that it cannot hold."""

    max_new_tokens: int
    temperature: float
    top_p: float
    stops: tuple[int, ...]
    never: tuple[int, ...]


def drawing_of(spec: SamplingSpec, model: Any, adapter: ModelAdapter) -> Drawing:
    """As the student itself would be drawn from in this process."""
    stops = stop_tokens(model, adapter)
    never = {*range(len(adapter.table), head_rows(model)), *adapter.unsayable}.difference(stops)
    return Drawing(spec.max_new_tokens, spec.temperature, spec.top_p, tuple(stops),
                   tuple(sorted(never)))


class Sample(NamedTuple):
    """ids: an answer's tokens, without the one that ends it; end: that one, None where the answer
    was cut; log_probs: of its tokens, None where they are not known any more."""

    ids: tuple[int, ...]
    end: int | None
    log_probs: tuple[float, ...] | None = None


def prompts(
    adapter: ModelAdapter, pairs: Sequence[tuple[Record, int]], inputs: Mapping[str, Tensor]
) -> Iterator[Prompt | str]:
    """What is asked for each pair of a record and a turn, or why that cannot be asked.

    Args:
        inputs: theirs, left-padded, as `models.generation.prompt_inputs` gives them.
    """
    kept = inputs["attention_mask"].bool()
    for (record, turn), row, mask in zip(pairs, inputs["input_ids"], kept, strict=True):
        images = [image.load() for image in record.images_before(turn)]
        before = replace(record, messages=tuple(record.before(turn)),
                         images=record.images_before(turn))
        try:
            chat = as_chat(adapter, before, adapter.prompt(record, turn), images)
        except TaidError:
            yield VIDEO
            continue
        chat = None if chat is None else {**chat, "add_generation_prompt": True}
        yield Prompt(f"{record.source}/{turn}", row[mask].tolist(), chat)


def request(prompt: Prompt, model: str, drawing: Drawing, seed: str) -> tuple[str, bytes]:
    """The path and the body of a request. Nothing is left to the server's own defaults, which vLLM
    takes from the checkpoint.

    Args:
        seed: of the run and the step; every answer has random numbers of its own.
    """
    own = hashlib.sha256(f"{seed}/{prompt.key}".encode()).digest()
    path, content = (COMPLETIONS, {"prompt": prompt.ids, "logprobs": 0}) if prompt.chat is None \
        else (CHAT, {**prompt.chat, "logprobs": True, "top_logprobs": 0})
    body = {
        "model": model, **content, "max_tokens": drawing.max_new_tokens,
        "temperature": drawing.temperature, "top_p": drawing.top_p, "top_k": 0, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "seed": int.from_bytes(own[:8]) >> 1, "stop_token_ids": list(drawing.stops),
        "ignore_eos": True, "logit_bias": {str(index): NEVER for index in drawing.never},
        "return_token_ids": True}
    return path, json.dumps(body).encode()


def read_sample(data: bytes, prompt: Prompt, model: str, drawing: Drawing) -> Sample:
    """The answer to a request.

    Raises:
        ValueError: no JSON (an answer that was cut off).
        WrongAnswer: another model's, to other tokens, or with something else than was asked for.
    """
    tree = json.loads(data)
    if not isinstance(tree, Mapping) or tree.get("model") != model:
        said = tree.get("model") if isinstance(tree, Mapping) else None
        raise WrongAnswer(f"the answer is of the model '{said}', not of '{model}'")
    try:
        choice = tree["choices"][0]
        part = choice if prompt.chat is None else tree
        read, ids, laws = part["prompt_token_ids"], choice["token_ids"], choice["logprobs"]
        values = laws["token_logprobs"] if prompt.chat is None else [
            law["logprob"] for law in laws["content"]]
        log_probs = tuple(float(value) for value in values)
    except (LookupError, TypeError, ValueError):
        raise WrongAnswer("the answer has no token_ids with log-probabilities, which vLLM gives; "
                          "other servers may not") from None
    if read != prompt.ids:
        place = next((i for i, (a, b) in enumerate(zip(read, prompt.ids, strict=False)) if a != b),
                     min(len(read), len(prompt.ids)))
        raise WrongAnswer(f"the server reads {prompt.key} as other tokens than the student's own "
                          f"processor, from position {place} of {len(prompt.ids)} on. Serve it "
                          "with that very processor and chat template")
    return _sample(ids, log_probs, drawing)


def _sample(ids: Any, log_probs: tuple[float, ...], drawing: Drawing) -> Sample:
    if len(log_probs) != len(ids) or len(ids) > drawing.max_new_tokens or not ids:
        raise WrongAnswer(f"{len(ids)} tokens with {len(log_probs)} log-probabilities, where at "
                          f"most {drawing.max_new_tokens} were asked for")
    if not all(-1e5 < value <= 1e-3 for value in log_probs):  # true of no NaN
        raise WrongAnswer("log-probabilities that are none")
    last = next((i for i, token in enumerate(ids) if token in drawing.stops), len(ids))
    if last == len(ids) < drawing.max_new_tokens:
        raise WrongAnswer(f"an answer of {len(ids)} tokens that neither ends nor is cut")
    end = ids[last] if last < len(ids) else None
    return Sample(tuple(ids[:last]), end, log_probs[:last])
