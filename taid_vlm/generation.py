"""Greedy answers of a model through its adapter, for galleries and accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from taid_vlm.adapters import ModelAdapter
from taid_vlm.models import evaluation_mode, forward_names, unwrap
from taid_vlm.records import ImageRef, Record

Question = tuple[Record, int]  # a record, and which of its answers is asked for


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    adapter: ModelAdapter,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: bool = False,
) -> list[str]:
    """The model's greedy answer to every question, special tokens removed, stripped.

    Earlier turns of a conversation are given with their reference answers. The student's mode is
    restored; no random state is touched.
    """
    names = forward_names(type(unwrap(model)))
    answers: list[str] = []
    stops = [i for i in {adapter.end_of_turn_id, adapter.tokenizer.eos_token_id} if i is not None]
    starts = range(0, len(questions), batch_size)
    for start in tqdm(starts, desc="answer", disable=not progress, leave=False):
        part = questions[start : start + batch_size]
        images = [[image.load() for image in _images_before(*question)] for question in part]
        inputs = adapter.encode_prompts(part, images)
        accepted = {key: x.to(model.device) for key, x in inputs.items() if key in names}
        with evaluation_mode(model):
            ids = model.generate(
                **accepted, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stops,
                pad_token_id=adapter.tokenizer.pad_token_id,
            )
        new = ids[:, inputs["input_ids"].shape[1] :]
        decoded = adapter.tokenizer.batch_decode(new, skip_special_tokens=True)
        answers.extend(text.strip() for text in decoded)
    return answers


def _images_before(record: Record, turn: int) -> list[ImageRef]:
    """Images of the messages before the `turn`-th answer."""
    count = sum(part is None for message in record.before(turn) for part in message.parts)
    return list(record.images[:count])
