"""`build(family)`: two layers of a real family with its real processor, in well under 1 s."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .parts import Family, Text
from .specs import END_OF_TURN
from .text import TEXT
from .tokenizers import make_tokenizer
from .vlm_dynamic import DYNAMIC
from .vlm_fixed import FIXED
from .vlm_tiles import TILES

# One family of every way to expand images and to write templates: for tests over many pairs.
CORE_FAMILIES: tuple[str, ...] = (
    "llava",
    "qwen2_5_vl",
    "qwen3_vl",
    "smolvlm",
    "idefics3",
    "internvl",
    "gemma3",
)
CORE_TEXT_FAMILIES: tuple[str, ...] = ("llama", "qwen2", "gemma2", "gpt2")
FAMILIES: dict[str, Family] = FIXED | TILES | DYNAMIC | TEXT
VLM_FAMILIES: tuple[str, ...] = tuple(FIXED | TILES | DYNAMIC)
TEXT_FAMILIES: tuple[str, ...] = tuple(TEXT)


@dataclass(frozen=True)
class Built:
    """A model in eval mode and the processor (text families: the tokenizer) that feeds it."""

    family: str
    processor: ProcessorMixin | PreTrainedTokenizerBase
    model: PreTrainedModel

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return getattr(self.processor, "tokenizer", self.processor)


# --- building -----------------------------------------------------------------------------------


def _text_args(tok: PreTrainedTokenizerBase, rows: int, tied: bool) -> Text:
    return {
        "vocab_size": rows,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
    }


def _rows(tokens: int, padded_rows: int | None) -> int:
    return -(-tokens // 64) * 64 if padded_rows is None else tokens + padded_rows


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Weights at a scale where logits spread and images matter; stock init leaves them near 0.

    Done by hand so that the numbers depend on the seed alone, not on a family's init code.
    """
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():  # tied weights appear once
        draw = torch.randn(weight.shape, generator=generator)
        if weight.ndim < 2:  # norms and biases: near their neutral values
            weight.add_(0.1 * draw)
        else:
            weight.copy_(draw * 1.5 / weight[0].numel() ** 0.5)


def _generation_ids(family: str, tok: PreTrainedTokenizerBase) -> int | list[int]:
    """As in real checkpoints: the eos token and, where that is another, the end of a turn."""
    if family not in END_OF_TURN:
        return tok.eos_token_id
    return [tok.eos_token_id, tok.convert_tokens_to_ids(END_OF_TURN[family])]


def build(
    family: str,
    *,
    seed: int = 0,
    tokenizer: str = "plain",
    padded_rows: int | None = None,
    tied: bool = False,
) -> Built:
    """A family's small model, float32 and in eval mode, with its processor.

    `padded_rows`: embedding rows beyond the tokenizer (None: up to a multiple of 64).
    `tied`: share the embedding with the head. The caller's random state is left alone.
    """
    tok = make_tokenizer(family, tokenizer)
    tokens = len(tok)
    text = _text_args(tok, _rows(tokens, padded_rows), tied)
    processor, config, model_class = FAMILIES[family](tok, text)
    if len(tok) != tokens:
        raise RuntimeError(f"{family}: the processor added tokens; list them in the family's spec")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # some biases start from random numbers
        model = model_class(config).float().eval()
    _randomise(model, seed)
    model.generation_config.bos_token_id = tok.bos_token_id
    model.generation_config.pad_token_id = tok.pad_token_id
    model.generation_config.eos_token_id = _generation_ids(family, tok)
    return Built(family, processor, model)


def save(built: Built, folder: str | Path) -> Path:
    """Model and processor into one folder, as a user's checkpoint is."""
    folder = Path(folder)
    built.model.save_pretrained(folder)
    built.processor.save_pretrained(folder)
    return folder
