"""Pieces that the families of the zoo are put together from."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeAlias

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

Text = dict[str, Any]  # arguments of the language model's config
Parts = tuple[ProcessorMixin | PreTrainedTokenizerBase, PreTrainedConfig, type[PreTrainedModel]]
Family: TypeAlias = Callable[[PreTrainedTokenizerBase, Text], Parts]


def vision(**changes: Any) -> dict[str, Any]:
    """A ViT of two layers over 32 x 32 pixels: 16 patches."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        **changes,
    }


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def tied(text: Text) -> dict[str, bool]:
    """Models with vision have the setting twice; the outer one counts."""
    return {"tie_word_embeddings": text["tie_word_embeddings"]}
