"""Families that give an image as many tokens as its size and aspect ratio ask for."""

from __future__ import annotations

from typing import Any

import transformers as hf
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .parts import Family, Parts, Text, square, tied


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
        **tied(text),
        **_qwen_ids(tok),
    )
    processor = hf.Qwen2_5_VLProcessor(
        hf.Qwen2VLImageProcessor(**_qwen_sizes(64)),
        tok,
        hf.Qwen2VLVideoProcessor(patch_size=8, merge_size=2, temporal_patch_size=2),
        chat_template=tok.chat_template,
    )
    return processor, config, hf.Qwen2_5_VLForConditionalGeneration


def _qwen3_processor(tok: PreTrainedTokenizerBase, longest: int = 96) -> ProcessorMixin:
    return hf.Qwen3VLProcessor(
        hf.Qwen2VLImageProcessor(**_qwen_sizes(longest)),
        tok,
        hf.Qwen3VLVideoProcessor(patch_size=8, merge_size=2, temporal_patch_size=2),
        chat_template=tok.chat_template,
    )


def _qwen3_vl(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """Dynamic, up to 36 image tokens; visual features also enter the decoder's layers."""
    config = hf.Qwen3VLConfig(
        text_config=text | {"head_dim": 8} | _rope(mrope_section=[2, 1, 1], mrope_interleaved=True),
        vision_config=_qwen_tower(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        **tied(text),
        **_qwen_ids(tok),
    )
    return _qwen3_processor(tok), config, hf.Qwen3VLForConditionalGeneration


def _qwen3_vl_moe(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """As Qwen3-VL, two of four experts per token."""
    experts = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
               "moe_intermediate_size": 16}
    config = hf.Qwen3VLMoeConfig(
        text_config=text | experts | _rope(mrope_section=[2, 1, 1], mrope_interleaved=True),
        vision_config=_qwen_tower(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        **tied(text),
        **_qwen_ids(tok),
    )
    return _qwen3_processor(tok), config, hf.Qwen3VLMoeForConditionalGeneration


def _hy_v4_vl(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """Latent attention over keys that an indexer picks, hyper-connections, experts; a token ends
    every row of an image."""
    layers = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
              "v_head_dim": 8, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 512,
              "hc_mult": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
              "moe_intermediate_size": 16}
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "out_hidden_size": 32, "patch_size": 8,
             "max_image_size": 96}
    config = hf.HYV4VLConfig(
        text_config=text | layers | _rope(mrope_section=[2, 1, 1]),
        vision_config=tower,
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
        **tied(text),
    )
    sizes = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 32 * 32,
                                                        "longest_edge": 64 * 64}}
    processor = hf.HYV4VLProcessor(
        hf.HYV4VLImageProcessor(**sizes), tok, hf.HYV4VLVideoProcessor(patch_size=8, merge_size=2),
        chat_template=tok.chat_template,
    )
    return processor, config, hf.HYV4VLForConditionalGeneration


def _qwen2_vl(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """As Qwen2.5-VL, without windows in the tower."""
    tower = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2,
             "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = hf.Qwen2VLConfig(
        text_config=text | _rope(mrope_section=[1, 1, 2]),
        vision_config=tower,
        **tied(text),
        **_qwen_ids(tok),
    )
    processor = hf.Qwen2VLProcessor(
        hf.Qwen2VLImageProcessor(**_qwen_sizes(48)),
        tok,
        hf.Qwen2VLVideoProcessor(patch_size=8, merge_size=2, temporal_patch_size=2),
        chat_template=tok.chat_template,
    )
    return processor, config, hf.Qwen2VLForConditionalGeneration


def _qwen3_5(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """As Qwen3-VL without deep features; three of four decoder layers have linear attention."""
    linear = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    rope = _rope(mrope_section=[2, 1, 1], mrope_interleaved=True, partial_rotary_factor=1.0)
    config = hf.Qwen3_5Config(
        text_config=text | {"head_dim": 8, "num_hidden_layers": 4} | linear | rope,
        vision_config=_qwen_tower(num_position_embeddings=64),
        **tied(text),
        **_qwen_ids(tok),
    )
    return _qwen3_processor(tok, 80), config, hf.Qwen3_5ForConditionalGeneration


def _gemma4(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """At most 70 soft tokens by the aspect ratio; embeddings per layer, softcap behind the head."""
    ids = tok.convert_tokens_to_ids
    decoder = hf.Gemma4TextConfig(
        **text,
        vocab_size_per_layer_input=text["vocab_size"],
        hidden_size_per_layer_input=8,
        head_dim=8,
        global_head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=3.0,
    )
    tower = hf.Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        patch_size=8,
        pooling_kernel_size=2,
        position_embedding_size=64,
    )
    config = hf.Gemma4Config(
        text_config=decoder,
        vision_config=tower,
        image_token_id=tok.image_token_id,
        boi_token_id=tok.boi_token_id,
        eoi_token_id=tok.eoi_token_id,
        video_token_id=ids("<|video|>"),
        audio_token_id=tok.audio_token_id,
        **tied(text),
    )
    processor = hf.Gemma4Processor(
        hf.Gemma4AudioFeatureExtractor(),
        hf.Gemma4ImageProcessor(patch_size=8, pooling_kernel_size=2, max_soft_tokens=70),
        tok,
        hf.Gemma4VideoProcessor(patch_size=8, pooling_kernel_size=2),
        image_seq_length=70,
        chat_template=tok.chat_template,
    )
    return processor, config, hf.Gemma4ForConditionalGeneration


def _mistral3(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """Pixtral's processor: a token per 16 x 16 pixels, a break after every row of them."""
    tower = hf.PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=8,
        image_size=64,
        patch_size=8,
    )
    config = hf.Mistral3Config(
        vision_config=tower,
        text_config=hf.MistralConfig(**text, head_dim=8),
        image_token_index=tok.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
        **tied(text),
    )
    processor = hf.PixtralProcessor(
        hf.PixtralImageProcessor(size={"longest_edge": 64}, patch_size=square(8)),
        tok,
        patch_size=8,
        spatial_merge_size=2,
        chat_template=tok.chat_template,
    )
    return processor, config, hf.Mistral3ForConditionalGeneration


DYNAMIC: dict[str, Family] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "qwen3_5": _qwen3_5,
    "gemma4": _gemma4,
    "mistral3": _mistral3,
} | ({"hy_v4_vl": _hy_v4_vl} if hasattr(hf, "HYV4VLConfig") else {})  # from transformers 5.24 on
