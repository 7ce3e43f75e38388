"""`build(family)`: two layers of a real family with its real processor, in well under 1 s."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import torch
import transformers as hf
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.smolvlm import processing_smolvlm

from .tokenizers import END_OF_TURN, make_tokenizer

VLM_FAMILIES: tuple[str, ...] = (
    "llava",
    "qwen2_5_vl",
    "qwen3_vl",
    "smolvlm",
    "idefics3",
    "internvl",
    "gemma3",
)
TEXT_FAMILIES: tuple[str, ...] = ("llama", "qwen2", "gemma2", "gpt2")

Text = dict[str, Any]  # arguments of the language model's config
Parts = tuple[ProcessorMixin | PreTrainedTokenizerBase, PreTrainedConfig, type[PreTrainedModel]]


@dataclass(frozen=True)
class Built:
    """A model in eval mode and the processor (text families: the tokenizer) that feeds it."""

    family: str
    processor: ProcessorMixin | PreTrainedTokenizerBase
    model: PreTrainedModel

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return getattr(self.processor, "tokenizer", self.processor)


def _vision(**changes: Any) -> dict[str, Any]:
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


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


# --- vision-language families -------------------------------------------------------------------


def _llava(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """16 image tokens per image, whatever its size (SigLIP tower, a Qwen2 as in interleave)."""
    config = hf.LlavaConfig(
        vision_config=hf.SiglipVisionConfig(**_vision(vision_use_head=False)),
        text_config=hf.Qwen2Config(**text),
        image_token_index=tok.image_token_id,
        image_seq_length=16,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    processor = hf.LlavaProcessor(
        hf.SiglipImageProcessor(size=_square(32)),
        tok,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=tok.chat_template,
    )
    return processor, config, hf.LlavaForConditionalGeneration


def _qwen_ids(tok: PreTrainedTokenizerBase) -> dict[str, int]:
    return {
        "image_token_id": tok.image_token_id,
        "video_token_id": tok.video_token_id,
        "vision_start_token_id": tok.vision_bos_token_id,
        "vision_end_token_id": tok.vision_eos_token_id,
    }


def _qwen_tower(**changes: Any) -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **changes,
    }


def _rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **changes}}


def _qwen_sizes(longest: int) -> dict[str, Any]:
    # "edges" are areas in this processor; one image token covers 16 x 16 pixels
    return {
        "patch_size": 8,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 32 * 32, "longest_edge": longest * longest},
    }


def _qwen2_5_vl(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """Dynamic: 4 to 16 image tokens by the image's size and aspect ratio."""
    config = hf.Qwen2_5_VLConfig(
        text_config=text | _rope(mrope_section=[1, 1, 2]),
        vision_config=_qwen_tower(window_size=32, fullatt_block_indexes=[1]),
        tie_word_embeddings=text["tie_word_embeddings"],
        **_qwen_ids(tok),
    )
    processor = hf.Qwen2_5_VLProcessor(
        hf.Qwen2VLImageProcessor(**_qwen_sizes(64)),
        tok,
        hf.Qwen2VLVideoProcessor(patch_size=8, merge_size=2, temporal_patch_size=2),
        chat_template=tok.chat_template,
    )
    return processor, config, hf.Qwen2_5_VLForConditionalGeneration


def _qwen3_vl(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """Dynamic, up to 36 image tokens; visual features also enter the decoder's layers."""
    config = hf.Qwen3VLConfig(
        text_config=text | {"head_dim": 8} | _rope(mrope_section=[2, 1, 1], mrope_interleaved=True),
        vision_config=_qwen_tower(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        tie_word_embeddings=text["tie_word_embeddings"],
        **_qwen_ids(tok),
    )
    processor = hf.Qwen3VLProcessor(
        hf.Qwen2VLImageProcessor(**_qwen_sizes(96)),
        tok,
        hf.Qwen3VLVideoProcessor(patch_size=8, merge_size=2, temporal_patch_size=2),
        chat_template=tok.chat_template,
    )
    return processor, config, hf.Qwen3VLForConditionalGeneration


def _allow_missing_num2words() -> None:
    """SmolVLM's processor refuses to exist without num2words, which only its video prompts use.

    Where the package is absent, put `str` in its place, for this process alone: a subprocess that
    loads a saved SmolVLM needs the real package.
    """
    if processing_smolvlm.num2words is None:
        processing_smolvlm.num2words = str


def _smolvlm(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """Tiles of 32 x 32 plus the whole image: 4 image tokens each, row and column markers too."""
    _allow_missing_num2words()
    config = hf.SmolVLMConfig(
        vision_config=_vision(),
        text_config=hf.LlamaConfig(**text).to_dict(),
        scale_factor=2,
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    tile = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    processor = hf.SmolVLMProcessor(
        hf.SmolVLMImageProcessor(**tile),
        tok,
        hf.SmolVLMVideoProcessor(**tile),
        image_seq_len=4,
        chat_template=tok.chat_template,
    )
    return processor, config, hf.SmolVLMForConditionalGeneration


def _idefics3(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """As SmolVLM, with one image token per tile (patches of 16 pixels)."""
    config = hf.Idefics3Config(
        vision_config=_vision(patch_size=16),
        text_config=hf.LlamaConfig(**text).to_dict(),
        scale_factor=2,
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    processor = hf.Idefics3Processor(
        hf.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tok,
        image_seq_len=1,
        chat_template=tok.chat_template,
    )
    return processor, config, hf.Idefics3ForConditionalGeneration


def _internvl(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """4 image tokens per tile, one to four tiles (and a thumbnail) by the aspect ratio."""
    config = hf.InternVLConfig(
        vision_config=_vision(image_size=[32, 32], patch_size=[8, 8]),
        text_config=hf.Qwen2Config(**text | {"hidden_size": 48}).to_dict(),
        image_token_id=tok.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(
            size=_square(32), crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tok,
        hf.InternVLVideoProcessor(size=_square(32)),
        image_seq_length=4,
        chat_template=tok.chat_template,
    )
    return processor, config, hf.InternVLForConditionalGeneration


def _gemma3(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """9 image tokens per image; embeddings scaled by sqrt(hidden), bidirectional over the image."""
    config = hf.Gemma3Config(
        text_config=text | {"head_dim": 8, "sliding_window": 64},
        vision_config=_vision(image_size=48, vision_use_head=False),
        mm_tokens_per_image=9,
        image_token_index=tok.image_token_id,
        boi_token_index=tok.boi_token_id,
        eoi_token_index=tok.eoi_token_id,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size=_square(48)),
        tok,
        image_seq_length=9,
        chat_template=tok.chat_template,
    )
    return processor, config, hf.Gemma3ForConditionalGeneration


# --- text families ------------------------------------------------------------------------------


def _llama(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    return tok, hf.LlamaConfig(**text), hf.LlamaForCausalLM


def _qwen2(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    return tok, hf.Qwen2Config(**text), hf.Qwen2ForCausalLM


def _gemma2(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """The final softcap is 3 (real: 30), so that it bends these small logits visibly."""
    extra = {"head_dim": 8, "sliding_window": 64, "final_logit_softcapping": 3.0}
    return tok, hf.Gemma2Config(**text | extra), hf.Gemma2ForCausalLM


def _gpt2(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    keep = ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    config = hf.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=64,
        n_positions=text["max_position_embeddings"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **{key: text[key] for key in keep},
    )
    return tok, config, hf.GPT2LMHeadModel


FAMILIES: dict[str, Callable[[PreTrainedTokenizerBase, Text], Parts]] = {
    "llava": _llava,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "smolvlm": _smolvlm,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "llama": _llama,
    "qwen2": _qwen2,
    "gemma2": _gemma2,
    "gpt2": _gpt2,
}


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
