"""What an adapter gives: a record in one model's tokens, with the answers' tokens marked."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Side = Literal["left", "right"]
PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


class AnswerToken(NamedTuple):  # a batch has thousands
    """One token of a supervised text.

    position: index in the padded row (the predicting position is the one before).
    start, end: bytes of the answer it covers, relative to the answer's start; none for space that
        has to be generated before it.
    prefix, suffix: bytes of template text glued to it before or after the answer.
    special: whether it is a special token of the model.
    """

    position: int
    start: int
    end: int
    prefix: bytes = b""
    suffix: bytes = b""
    special: bool = False


@dataclass(frozen=True)
class AnswerSpan:
    """One supervised text as this model's tokens.

    end_of_turn: position of the special token that closes it, or None; `tail` are the template's
        bytes between the two.
    weight: a factor of its tokens' losses.
    """

    turn: int
    is_answer: bool
    tokens: tuple[AnswerToken, ...]
    end_of_turn: int | None
    tail: bytes = b""
    weight: float = 1.0

    @property
    def positions(self) -> list[int]:
        """Of its tokens, the end of its turn included."""
        end = [] if self.end_of_turn is None else [self.end_of_turn]
        return [*(token.position for token in self.tokens), *end]


@dataclass(frozen=True)
class EncodedRow:
    """One record in one model's tokens, without padding; `offset` is the padding on its left."""

    ids: list[int]
    offset: int
    text: str
    byte_spans: list[tuple[int, int]]
    answers: tuple[AnswerSpan, ...]
    images: tuple[tuple[int, int], ...]  # byte spans of the expanded images

    @property
    def weights(self) -> dict[int, float]:
        """What the answers' tokens weigh, by position; a token across two texts is the first's."""
        weights: dict[int, float] = {}
        for answer in self.answers:
            for position in answer.positions:
                weights.setdefault(position, answer.weight)
        return weights


@dataclass(frozen=True)
class EncodedBatch:
    """Padded inputs of one model, and its rows."""

    inputs: dict[str, Tensor]
    rows: list[EncodedRow]


def expand(text: str, expansions: list[dict[str, Any]]):  # type: ignore[no-untyped-def]
    """The text after image expansion, and a function from old to new character offsets."""
    ends = [e["span"][1] for e in expansions]
    gains = [0, *(e["new_span"][1] - e["span"][1] for e in expansions)]
    for e in reversed(expansions):
        text = text[: e["span"][0]] + e["replacement"] + text[e["span"][1] :]
    return text, lambda offset: offset + gains[bisect.bisect_right(ends, offset)]


def byte_index(text: str) -> Sequence[int]:
    """Byte offset of every character, and of the end."""
    if text.isascii():
        return range(len(text) + 1)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000).astype(np.int64)
    return [0, *np.cumsum(widths).tolist()]


def with_continuations(
    inputs: Mapping[str, Tensor], own: Sequence[Sequence[int]], side: Side, pad: int, kind: int
) -> dict[str, Tensor]:
    """Padded inputs of prompts [B, T] with every row's own tokens behind its prompt.

    Args:
        kind: what token_type_ids say of an answer's tokens.
    """
    mask = inputs["attention_mask"].bool()
    fills = {"attention_mask": (1, 0), "token_type_ids": (kind, 0), "mm_token_type_ids": (0, 0)}
    joined = dict(inputs)
    for name in PER_TOKEN:
        if name not in inputs:
            continue
        rows = []
        for row, keep, tokens in zip(inputs[name], mask, own, strict=True):
            value = list(tokens) if name == "input_ids" else [fills[name][0]] * len(tokens)
            rows.append(torch.cat([row[keep], torch.tensor(value, dtype=row.dtype)]))
        joined[name] = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_side=side,
            padding_value=pad if name == "input_ids" else fills[name][1])
    return joined
