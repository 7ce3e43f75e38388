"""Causal language models."""

from __future__ import annotations

import transformers as hf
from transformers import PreTrainedTokenizerBase

from .parts import Family, Parts, Text


def _llama(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    return tok, hf.LlamaConfig(**text), hf.LlamaForCausalLM


def _qwen2(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    return tok, hf.Qwen2Config(**text), hf.Qwen2ForCausalLM


def _gemma2(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """The final softcap is 3 (real: 30), so that it transforms these small logits visibly."""
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


def _qwen3(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    return tok, hf.Qwen3Config(**text | {"head_dim": 8}), hf.Qwen3ForCausalLM


def _gemma3_text(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    extra = {"head_dim": 8, "sliding_window": 64}
    return tok, hf.Gemma3TextConfig(**text | extra), hf.Gemma3ForCausalLM


def _mistral(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    return tok, hf.MistralConfig(**text, sliding_window=64), hf.MistralForCausalLM


def _phi3(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    return tok, hf.Phi3Config(**text), hf.Phi3ForCausalLM


def _smollm3(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """The second layer has no rotary positions (real: every fourth)."""
    return tok, hf.SmolLM3Config(**text | {"no_rope_layers": [1, 0]}), hf.SmolLM3ForCausalLM


def _olmo2(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    return tok, hf.Olmo2Config(**text), hf.Olmo2ForCausalLM


def _granite(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """Divides its logits, multiplies its embeddings and residuals."""
    extra = {"logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}
    return tok, hf.GraniteConfig(**text | extra), hf.GraniteForCausalLM


def _glm4(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    return tok, hf.Glm4Config(**text | {"head_dim": 8}), hf.Glm4ForCausalLM


def _lfm2(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """A short convolution in the first layer, attention in the second."""
    extra = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    return tok, hf.Lfm2Config(**text | extra), hf.Lfm2ForCausalLM


def _gemma4_text(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """Embeddings per layer; the softcap is 3 (real: 30), as in gemma2."""
    extra = {"head_dim": 8, "global_head_dim": 8, "sliding_window": 64,
             "vocab_size_per_layer_input": text["vocab_size"], "hidden_size_per_layer_input": 8,
             "final_logit_softcapping": 3.0}
    return tok, hf.Gemma4TextConfig(**text | extra), hf.Gemma4ForCausalLM


def _falcon_h1(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """Attention and a state space (Mamba 2) side by side in every layer; scales its logits."""
    extra = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1,
             "mamba_d_state": 8, "mamba_chunk_size": 16, "lm_head_multiplier": 0.5}
    return tok, hf.FalconH1Config(**text | extra), hf.FalconH1ForCausalLM


def _qwen3_moe(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    extra = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
             "norm_topk_prob": True}
    return tok, hf.Qwen3MoeConfig(**text | extra), hf.Qwen3MoeForCausalLM


def _mixtral(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    extra = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return tok, hf.MixtralConfig(**text | extra), hf.MixtralForCausalLM


def _gpt_oss(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """Attention sinks, sliding and full layers in turn, experts with biases."""
    extra = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64,
             "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    return tok, hf.GptOssConfig(**text | extra), hf.GptOssForCausalLM


def _deepseek_v3(tok: PreTrainedTokenizerBase, text: Text) -> Parts:
    """Latent attention; a dense layer, then one of routed and shared experts, chosen by sigmoids
    in two groups."""
    extra = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
             "v_head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 1,
             "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
             "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
             "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    return tok, hf.DeepseekV3Config(**text | extra), hf.DeepseekV3ForCausalLM


TEXT: dict[str, Family] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3_text,
    "mistral": _mistral,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "granite": _granite,
    "glm4": _glm4,
    "lfm2": _lfm2,
    "gemma4_text": _gemma4_text,
    "falcon_h1": _falcon_h1,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
}
