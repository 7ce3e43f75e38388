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


TEXT: dict[str, Family] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3_text,
    "mistral": _mistral,
    "phi3": _phi3,
    "gpt2": _gpt2,
}
