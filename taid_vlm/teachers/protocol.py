"""What a vLLM server is asked for the laws at a prompt's tokens, and how its answer is read.

Completions take a prompt as token ids; images go as data URIs with chat completions, where the
server makes the ids itself. Either way it says which ids it has read, and of every id but the first
the log-probabilities (of the raw logits) of the k most likely tokens there and of the id itself.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from taid_vlm.adapters import ModelAdapter, Rendered
from taid_vlm.adapters.turns import chat_message, style_of
from taid_vlm.batch.forward import Batch
from taid_vlm.errors import TaidError
from taid_vlm.io.endpoint import WrongAnswer
from taid_vlm.io.images import png
from taid_vlm.records import Record
from taid_vlm.records.videos import Picture

COMPLETIONS, CHAT = "/completions", "/chat/completions"
MOST_MASS = 1.001  # that k probabilities, each rounded, may have together

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One row: what a server is asked, and about which of its tokens.

    ids: the row's tokens. places: positions in it of the tokens that are predicted, all >= 1.
    chat: the conversation with its images, instead of the ids. source: of the record.
    """

    ids: list[int]
    places: list[int]
    chat: Message | None
    source: str


class Laws(NamedTuple):
    """Of n tokens: ids [n, k], log_probs [n, k] and own [n], in float64; size: bytes received."""

    ids: Tensor
    log_probs: Tensor
    own: Tensor
    size: int = 0


def as_chat(
    adapter: ModelAdapter, record: Record, rendered: Rendered, images: Sequence[Picture]
) -> Message | None:
    """A record as a chat request has it, images inline as PNG; None without images.

    Raises:
        TaidError: a video, which a server would sample its own way.
    """
    if not images:
        return None
    stills = [image for image in images if isinstance(image, Image.Image)]
    if len(stills) < len(images):
        raise TaidError(f"{record.source} holds a video, which a served teacher cannot be shown: "
                        "the server samples its own frames. Use a teacher in this process.")
    assert adapter.form is not None
    style, pictures = style_of(adapter.processor, adapter.form), iter(stills)
    messages = [chat_message(message, style) for message in record.messages]
    for message in messages:
        if not isinstance(message["content"], str):
            message["content"] = [part if part["type"] != "image" else {
                "type": "image_url", "image_url": {"url": data_uri(next(pictures))}}
                for part in message["content"]]
    tools = {"tools": list(record.tools)} if record.tools else {}
    kwargs = {"chat_template_kwargs": adapter.kwargs} if adapter.kwargs else {}
    return {"messages": messages, "add_generation_prompt": False, **tools, **kwargs,
            "add_special_tokens": rendered.add_special}


def data_uri(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image, longest=None)).decode("ascii")


def questions(batch: Batch) -> list[Question]:
    """One for each row of the batch that has aligned tokens, in order."""
    inputs, chats = batch["teacher_inputs"], batch.get("teacher_chats")
    asked = []
    for row, keep in enumerate(inputs["attention_mask"].bool()):
        predicting = batch["teacher_mask"][row].nonzero()[:, 0]
        if len(predicting):
            places = predicting - int(keep.int().argmax()) + 1
            asked.append(Question(inputs["input_ids"][row][keep].tolist(), places.tolist(),
                                  chats[row] if chats else None, batch["sources"][row]))
    return asked


def request(question: Question, model: str, k: int) -> tuple[str, bytes]:
    """The path and the body of a request."""
    path, prompt = (COMPLETIONS, {"prompt": question.ids}) if question.chat is None else (
        CHAT, question.chat)
    body = {"model": model, **prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": k,
            "return_token_ids": True}
    return path, json.dumps(body).encode()


def read_laws(data: bytes, question: Question, model: str, k: int, rows: int) -> Laws:
    """The laws at a question's places.

    Args:
        k: as many most likely tokens are wanted at each; rows: ids there can be.

    Raises:
        ValueError: no JSON (an answer that was cut off).
        WrongAnswer: another model's, of other tokens, or laws that are none.
    """
    tree = json.loads(data)
    if not isinstance(tree, Mapping):
        raise WrongAnswer("no completion")
    if tree.get("model") != model:
        raise WrongAnswer(f"the answer is of the model '{tree.get('model')}', not of '{model}'")
    try:
        part = tree if question.chat is not None else tree["choices"][0]
        read, entries = part["prompt_token_ids"], part["prompt_logprobs"]
    except (LookupError, TypeError):
        read = entries = None
    if not isinstance(read, list) or not isinstance(entries, list):
        raise WrongAnswer("the answer has no prompt_token_ids and prompt_logprobs, which vLLM "
                          "gives; other servers may not")
    needed = question.places[-1] + 1
    if read[:needed] != question.ids[:needed]:
        raise WrongAnswer(_other_ids(read, question, needed))
    if len(entries) != len(read):
        raise WrongAnswer(f"log-probabilities of {len(entries)} tokens for {len(read)}")
    laws = [_law(entries[place], question.ids[place], k, rows) for place in question.places]
    ids, log_probs, own = zip(*laws, strict=True)
    return Laws(torch.tensor(ids), torch.tensor(log_probs, dtype=torch.float64),
                torch.tensor(own, dtype=torch.float64), len(data))


def _law(entry: Any, token: int, k: int, rows: int) -> tuple[list[int], list[float], float]:
    """Ids and log-probabilities of the k most likely tokens, and the token's own."""
    try:
        known = sorted((int(law["rank"]), int(key), float(law["logprob"]))
                       for key, law in entry.items())
    except (AttributeError, LookupError, TypeError, ValueError):
        raise WrongAnswer(f"no law at a token, but {entry!r:.100}") from None
    own = next((value for _, key, value in known if key == token), None)
    best = known[:k]
    ids, values = [key for _, key, _ in best], [value for *_, value in best]
    if own is None:
        raise WrongAnswer(f"the law at token {token} does not hold the token itself, so it stands "
                          "at another place")
    if len(best) < k or values != sorted(values, reverse=True):
        raise WrongAnswer(f"{len(best)} tokens that are not the {k} most likely ones in order")
    if not all(0 <= key < rows for key in ids):
        raise WrongAnswer(f"token {max(ids)}, but the configuration knows {rows} of them")
    if not sum(map(math.exp, values)) <= MOST_MASS:  # true of NaN, too
        raise WrongAnswer(f"probabilities that add up to {sum(map(math.exp, values)):.3f}")
    return ids, values, own


def _other_ids(read: list[int], question: Question, needed: int) -> str:
    place = next((i for i, pair in enumerate(zip(read, question.ids, strict=False))
                  if pair[0] != pair[1]), min(len(read), len(question.ids)))
    found = read[place] if place < len(read) else "nothing"
    return (f"the server reads {question.source} as other tokens than the processor in "
            f"teacher.processor_name_or_path: {found} in place of {question.ids[place]} at "
            f"position {place} of {needed}. Serve the model with that very processor and chat "
            "template")
