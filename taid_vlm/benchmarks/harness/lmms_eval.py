"""A model for lmms-eval: `lmms-eval --model taid_vlm --model_args pretrained=FOLDER ...`.

lmms-eval finds it through the entry-point group `lmms_eval.models`; nothing else imports this
file. Prompts are this package's, so a student is asked as it was taught, whatever its family, and
an answer does not depend on the batch.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from taid_vlm.adapters import make_adapter
from taid_vlm.benchmarks.answering import Generating
from taid_vlm.benchmarks.question import Question
from taid_vlm.config.model import Dtype, ModelSpec
from taid_vlm.errors import TaidError
from taid_vlm.models.loading import load_model, load_processor
from taid_vlm.records import ImageRef, Message, Record
from taid_vlm.records.images import stored_image

logger = logging.getLogger(__name__)
_READ = {"until", "max_new_tokens", "temperature", "top_p", "do_sample", "num_beams"}

MANIFEST = ModelManifest(
    "taid_vlm", chat_class_path="taid_vlm.benchmarks.harness.lmms_eval.TaidVlm")


@dataclass(frozen=True)
class Conversation(Question):
    """A question with what stands before it, a system message for example."""

    messages: tuple[Message, ...] = ()

    def record(self, answer: str = "") -> Record:
        assert not answer  # lmms-eval judges itself
        return Record(self.id, self.messages, self.images)


class TaidVlm(lmms):  # type: ignore[misc]
    """Any model that this package can distil, text models included.

    Args:
        pretrained: folder or hub name.
        max_new_tokens: for tasks that do not say.
        chat_template_kwargs: variables of the chat template, as JSON.
        device: None takes the process's own; others are as in `ModelSpec`.
    """

    is_simple = False

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, device: str | None = None,
        max_batch_size: int | None = None, revision: str = "main", dtype: Dtype | None = None,
        attn_implementation: str | None = None, trust_remote_code: bool = False,
        chat_template: str | None = None, max_new_tokens: int = 1024, seed: int = 0,
        chat_template_kwargs: str = "{}",
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.device = self.accelerator.device
        if device is not None and self._world_size == 1:
            self.device = torch.device(device)
        spec = ModelSpec(model_name_or_path=pretrained, revision=revision, dtype=dtype,
                         chat_template=chat_template,
                         chat_template_kwargs=json.loads(chat_template_kwargs),
                         attn_implementation=attn_implementation,
                         trust_remote_code=trust_remote_code)
        self.adapter = make_adapter(load_processor(spec, "model"), "model",
                                    chat_template_kwargs=spec.chat_template_kwargs)
        self.model = load_model(spec, "model").to(self.device).eval()
        self.batch_size, self.max_new_tokens, self.seed = int(batch_size), max_new_tokens, seed

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer per request, in their order; requests of the same settings share batches."""
        same: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            same[json.dumps(request.args[2], sort_keys=True, default=str)].append(index)
        texts = [""] * len(requests)
        for indices in same.values():
            settings = requests[indices[0]].args[2]
            answerer = Generating(self.model, self.adapter, self.batch_size,
                                  **generation_settings(settings, self.max_new_tokens))
            questions = [self._conversation(index, requests[index]) for index in indices]
            for batch in answerer.answers(questions, (), self.seed):
                for question, answer in batch:
                    if answer.problem:
                        logger.warning("%s has no answer: %s.", question.id, answer.problem)
                    texts[question.extra["index"]] = until(answer.text, settings.get("until"))
        return texts

    def _conversation(self, index: int, request: Any) -> Conversation:
        _, to_messages, _, doc_id, task, split = request.args
        source = f"{task}/{split}/{doc_id}/{request.idx}"
        return conversation(to_messages(self.task_dict[task][split][doc_id]), source, index)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("lmms-eval gives chat models no likelihood tasks; "
                                  "`taid-vlm evaluate --method likelihood` has them.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("taid_vlm answers one question at a time.")


def conversation(messages: Sequence[Mapping[str, Any]], source: str, index: int) -> Conversation:
    """lmms-eval's messages as a question; raises TaidError for videos, audio and given answers."""
    turns: list[Message] = []
    images: list[ImageRef] = []
    for message in messages:
        if message["role"] == "assistant":
            raise TaidError(f"{source}: an answer stands in the prompt, which cannot be asked on.")
        for part in message["content"]:
            if part["type"] not in ("text", "image"):
                raise TaidError(f"{source}: '{part['type']}' cannot be shown to an image-text "
                                "model of this package.")
        images += [ImageRef(stored_image(part["url"], None), source) for part in message["content"]
                   if part["type"] == "image"]
        turns.append(Message(message["role"], tuple(
            part["text"] if part["type"] == "text" else None for part in message["content"])))
    return Conversation(source, turns[-1].parts, tuple(images), extra={"index": index},
                        messages=tuple(turns))


def generation_settings(given: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """A task's generation_kwargs as `Generating` takes them; what has no effect is said."""
    if (given.get("num_beams") or 1) != 1:
        raise TaidError(f"num_beams = {given['num_beams']}: answers are greedy or sampled here.")
    if unread := sorted(key for key in given if key not in _READ):
        logger.warning("generation_kwargs without effect on this model: %s.", ", ".join(unread))
    temperature = given.get("temperature")
    sampled = given.get("do_sample", bool(temperature))
    return {
        "max_new_tokens": int(given.get("max_new_tokens") or max_new_tokens),
        "temperature": float(1.0 if temperature is None else temperature) if sampled else 0.0,
        "top_p": float(given.get("top_p") or 1.0),
    }


def until(text: str, stops: str | Sequence[str] | None) -> str:
    """The text before the first of the strings that end it."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.split(stop)[0] if stop else text
    return text.strip()
