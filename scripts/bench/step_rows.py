"""The rows of an optimizer step: conversations of one turn, and their tokens.

Text rows are `messages`; rows with an image are `prompt`, `completion` and `images`: the columns
that every trainer here understands.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

Row: TypeAlias = dict[str, Any]
SHORTEST = 0.75  # of the longest row; the others lie evenly between
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tokenizer_of(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)


def make_rows(
    processor: Any, count: int, tokens: int, answer_fraction: float,
    image_sides: Sequence[int] = (), seed: int = 0,
) -> list[Row]:
    """Random words, the longest row first.

    Args:
        tokens: of the longest row, about, those of its images with them.
        answer_fraction: of a row's tokens.
        image_sides: pixels of the images of noise in every row.
    """
    rng, tokenizer = random.Random(seed), tokenizer_of(processor)
    shown = sum(_image_tokens(processor, side) for side in image_sides)
    rows = []
    for index in range(count):
        length = tokens * (1 - (1 - SHORTEST) * index / max(1, count - 1))
        answer = max(1, round(length * answer_fraction))
        question = max(1, round(length) - answer - shown)
        asked, told = (random_words(rng, tokenizer, n) for n in (question, answer))
        rows.append(_row(asked, told, [_noise(rng, side) for side in image_sides]))
    return rows


def as_prompt(row: Row) -> Row:
    """The row with `prompt` and `completion`, lists of messages."""
    if "messages" not in row:
        return row
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


def encode(processor: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Prompts padded on the left and completions on the right, [B, T] with their masks, as
    generation leaves them; pixels where there are images."""
    rows = [as_prompt(row) for row in rows]
    prompts, whole = (
        [processor.apply_chat_template(_messages(row, told), tokenize=False,
                                       add_generation_prompt=not told) for row in rows]
        for told in (False, True))
    ends = [text[len(prompt):] for prompt, text in zip(prompts, whole, strict=True)]
    images = {"images": [row["images"] for row in rows]} if "images" in rows[0] else {}
    options: dict[str, Any] = {"return_tensors": "pt", "padding": True,
                               "add_special_tokens": False}
    asked = processor(text=prompts, padding_side="left", **images, **options)
    told = processor(text=ends, padding_side="right", **options)
    pixels = {"pixel_values": asked["pixel_values"]} if images else {}
    return {"prompt_ids": asked["input_ids"], "prompt_mask": asked["attention_mask"],
            "completion_ids": told["input_ids"], "completion_mask": told["attention_mask"],
            **pixels}


def encode_alone(processor: Any, row: Row) -> tuple[dict[str, Tensor], Tensor]:
    """One row's inputs without padding, and its answer's ids [n], which stand last."""
    given = encode(processor, [row])
    inputs = {"input_ids": torch.cat([given["prompt_ids"], given["completion_ids"]], 1)}
    if "pixel_values" in given:
        inputs["pixel_values"] = given["pixel_values"]
    return inputs, given["completion_ids"][0]


def count_tokens(processor: Any, rows: Sequence[Row]) -> tuple[int, int]:
    """Answer tokens and all tokens, without padding."""
    lengths = [(len(answer), inputs["input_ids"].shape[1])
               for inputs, answer in (encode_alone(processor, row) for row in rows)]
    return sum(answer for answer, _ in lengths), sum(length for _, length in lengths)


def _messages(row: Row, whole: bool) -> list[dict[str, Any]]:
    """Of the prompt or of all; an image stands before its question."""
    messages = row["prompt"] + (row["completion"] if whole else [])
    if "images" not in row:
        return messages
    text = {"type": "text", "text": messages[0]["content"]}
    parts = [*({"type": "image"} for _ in row["images"]), text]
    return [{**messages[0], "content": parts}, *messages[1:]]


def _row(asked: str, told: str, images: Sequence[Image.Image] = ()) -> Row:
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    if not images:
        return {"messages": messages}
    return {"prompt": messages[:1], "completion": messages[1:], "images": list(images)}


def _noise(rng: random.Random, side: int) -> Image.Image:
    return Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))


def _image_tokens(processor: Any, side: int) -> int:
    row = _row("a", "a", [_noise(random.Random(0), side)])
    inputs, _ = encode_alone(processor, row)
    without, _ = encode_alone(tokenizer_of(processor), _row("a", "a"))
    return inputs["input_ids"].shape[1] - without["input_ids"].shape[1]


def random_words(rng: random.Random, tokenizer: Any, tokens: int) -> str:
    """Random words of about so many tokens."""
    text = " ".join("".join(rng.choices(LETTERS, k=rng.randint(1, 6))) for _ in range(tokens))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    return tokenizer.decode(ids).strip()
