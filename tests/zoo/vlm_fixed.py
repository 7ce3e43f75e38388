"""Families that give every image the same number of tokens, whatever its size."""

from __future__ import annotations

import transformers as hf
from transformers import PreTrainedTokenizerBase

from .parts import Family, Parts, Text, square, tied, vision


def _llava(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """16 image tokens per image, whatever its size (SigLIP tower, a Qwen2 as in interleave)."""
    config = hf.LlavaConfig(
        vision_config=hf.SiglipVisionConfig(**vision(vision_use_head=False)),
        text_config=hf.Qwen2Config(**text),
        image_token_index=tok.image_token_id,
        image_seq_length=16,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        **tied(text),
    )
    processor = hf.LlavaProcessor(
        hf.SiglipImageProcessor(size=square(32)),
        tok,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=tok.chat_template,
    )
    return processor, config, hf.LlavaForConditionalGeneration


def _fast_vlm(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """4 image tokens per image, from a convolutional tower of timm (real: FastViT)."""
    tower = hf.TimmWrapperConfig(
        architecture="convnext_atto",
        model_args={"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 48]},
        do_pooling=False,
        hidden_size=48,
    )
    config = hf.FastVlmConfig(
        vision_config=tower,
        text_config=hf.Qwen2Config(**text),
        image_token_index=tok.image_token_id,
        image_seq_length=4,
        **tied(text),
    )
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=square(64)),
        tok,
        patch_size=32,
        vision_feature_select_strategy="full",
        chat_template=tok.chat_template,
    )
    return processor, config, hf.FastVlmForConditionalGeneration


def _gemma3(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """9 image tokens per image; embeddings scaled by sqrt(hidden), bidirectional over the image."""
    config = hf.Gemma3Config(
        text_config=text | {"head_dim": 8, "sliding_window": 64},
        vision_config=vision(image_size=48, vision_use_head=False),
        mm_tokens_per_image=9,
        image_token_index=tok.image_token_id,
        boi_token_index=tok.boi_token_id,
        eoi_token_index=tok.eoi_token_id,
        **tied(text),
    )
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size=square(48)),
        tok,
        image_seq_length=9,
        chat_template=tok.chat_template,
    )
    return processor, config, hf.Gemma3ForConditionalGeneration


def _paligemma(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """16 image tokens per image, in front of everything; the prefix sees itself both ways."""
    config = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**text | {"head_dim": 8}),
        vision_config=hf.SiglipVisionConfig(
            **vision(vision_use_head=False, projection_dim=32)
        ),
        image_token_index=tok.image_token_id,
        projection_dim=32,
        hidden_size=32,
        **tied(text),
    )
    images = hf.SiglipImageProcessor(size=square(32))
    images.image_seq_length = 16
    return hf.PaliGemmaProcessor(images, tok), config, hf.PaliGemmaForConditionalGeneration


FIXED: dict[str, Family] = {
    "llava": _llava,
    "fast_vlm": _fast_vlm,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
}
