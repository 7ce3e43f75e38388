"""A plain timm ViT as transformers' `ViTModel`: the same weights under other names.

A model that was rewritten this way loads without timm. What `ViTModel` cannot express (LayerScale,
normalised queries and keys, registers, another order of norms) is named, never left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import ViTConfig

ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}


def obstacles(model: Any) -> list[str]:
    """What keeps a timm model from being a `ViTModel`; empty if nothing does."""
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

    if type(model) is not VisionTransformer:
        return [f"its class is {type(model).__name__}"]
    problems, keys = [], set(model.state_dict())
    block, patches = model.blocks[0], model.patch_embed
    if "cls_token" not in keys:
        problems.append("no class token")
    elif model.num_prefix_tokens != 1:
        problems.append(f"{model.num_prefix_tokens} tokens before the patches")
    elif model.pos_embed is None or model.pos_embed.shape[1] != patches.num_patches + 1:
        problems.append("no position embedding for the class token")
    if type(block) is not Block or type(block.attn) is not Attention:
        problems.append(f"its blocks are {type(block).__name__} with {type(block.attn).__name__}")
    elif type(block.mlp.act).__name__ not in ACTIVATIONS:
        problems.append(f"its activation is {type(block.mlp.act).__name__}")
    surplus, missing = keys - _plain_keys(model), _plain_keys(model) - keys
    if surplus:
        problems.append(f"parameters a ViTModel lacks ({_unnumbered(surplus)})")
    if missing:
        problems.append(f"no {_unnumbered(missing)}")
    if len(set(patches.patch_size)) > 1:
        problems.append("its patches are not square")
    return problems


def _plain_keys(model: Any) -> set[str]:
    """Names of all parameters of a plain timm ViT of this depth."""
    modules = ["patch_embed.proj", "norm"]
    for index in range(len(model.blocks)):
        modules += [f"blocks.{index}.{part}" for part in (
            "norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
    both = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    bias_free = {key for key in both if key.endswith("attn.qkv.bias")}
    biased = any(key.endswith("attn.qkv.bias") for key in model.state_dict())
    return (both if biased else both - bias_free) | {"cls_token", "pos_embed"}


def _unnumbered(keys: Iterable[str]) -> str:
    """Parameters' names without the blocks' numbers."""
    names = {".".join(part for part in key.split(".") if not part.isdigit()) for key in keys}
    return ", ".join(sorted(names))


def vit_config(model: Any) -> ViTConfig:
    """The `ViTModel` configuration of a plain timm ViT."""
    block, patches = model.blocks[0], model.patch_embed
    height, width = patches.img_size
    return ViTConfig(
        hidden_size=model.embed_dim, num_hidden_layers=len(model.blocks),
        num_attention_heads=block.attn.num_heads, intermediate_size=block.mlp.fc1.out_features,
        hidden_act=ACTIVATIONS[type(block.mlp.act).__name__], layer_norm_eps=block.norm1.eps,
        image_size=height if height == width else [height, width],
        patch_size=patches.patch_size[0], qkv_bias=block.attn.qkv.bias is not None,
    )


def vit_state(model: Any) -> dict[str, Tensor]:
    """A plain timm ViT's weights under the names of a `ViTModel`; the numbers are not touched."""
    state = model.state_dict()
    moved = {"embeddings.cls_token": state["cls_token"],
             "embeddings.position_embeddings": state["pos_embed"]}
    names = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    for index in range(len(model.blocks)):
        new, old = f"layers.{index}", f"blocks.{index}"
        names |= {f"{old}.norm1": f"{new}.layernorm_before",
                  f"{old}.norm2": f"{new}.layernorm_after",
                  f"{old}.attn.proj": f"{new}.attention.o_proj",
                  f"{old}.mlp.fc1": f"{new}.mlp.fc1", f"{old}.mlp.fc2": f"{new}.mlp.fc2"}
        for kind in ("weight", "bias"):
            if (joint := state.get(f"{old}.attn.qkv.{kind}")) is not None:
                for part, tensor in zip("qkv", joint.chunk(3), strict=True):
                    moved[f"{new}.attention.{part}_proj.{kind}"] = tensor
    for old, new in names.items():
        moved |= {f"{new}.{kind}": state[f"{old}.{kind}"] for kind in ("weight", "bias")}
    return {key: tensor.detach().clone() for key, tensor in moved.items()}
