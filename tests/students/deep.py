"""The zoo's families with more layers than the zoo gives them, and their layers by number."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from zoo import Built, build
from zoo.families import _randomise

LAYERS, TOWER = 6, 5
TWO_KINDS = ["sliding_attention", "full_attention"] * 3
TEXT: dict[str, dict[str, Any]] = {
    "gemma2": {"layer_types": TWO_KINDS},
    "gemma3": {"layer_types": TWO_KINDS},
    "gemma4": {"layer_types": TWO_KINDS, "num_kv_shared_layers": 2, "global_head_dim": 16},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 0, 0]},
    "gemma4_text": {"layer_types": TWO_KINDS, "num_kv_shared_layers": 2, "global_head_dim": 16},
    "lfm2_vl": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "qwen3_5": {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2},
}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"fullatt_block_indexes": [1, 4]},
    "qwen3_vl": {"deepstack_visual_indexes": [1, 3]},
}
# What they give is a tuple; the second entry is what the layer before has handed on.
IN_A_TUPLE = {"FalconH1DecoderLayer": (), "HYV4VLDecoderLayer": ("prev_topk_indices",)}
TOP: dict[str, dict[str, Any]] = {"llava": {"vision_feature_layer": -2}}


def deep(family: str, **top: Any) -> Built:
    """A family's model with more layers, its weights random; `top`: changes to its config."""
    built = build(family)
    tree = built.model.config.to_dict() | TOP.get(family, {}) | top
    text, vision = tree.get("text_config", tree), tree.get("vision_config", {})
    names = built.model.config.get_text_config().attribute_map
    text[names.get("num_hidden_layers", "num_hidden_layers")] = LAYERS
    for stale in ("layer_types", "per_layer_config", "mlp_layer_types", "indexer_types"):
        text.pop(stale, None)
        vision.pop(stale, None)
    vision |= {name: TOWER for name in ("num_hidden_layers", "depth") if name in vision}
    text.update(copy.deepcopy(TEXT.get(family, {})))
    vision.update(copy.deepcopy(VISION.get(family, {})))
    model = random_model(type(built.model), type(built.model.config).from_dict(tree))
    model.generation_config = built.model.generation_config
    return Built(family, built.processor, model)


def random_model(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).float().eval()
    _randomise(model, 0)
    return model


def decoder_layers(model: Any) -> nn.ModuleList:
    decoder = model.get_decoder()
    decoder = model.model if decoder is model else decoder
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def tower_layers(model: Any, count: int) -> nn.ModuleList:
    """The tower's list of layers: by every family's own name for it."""
    found = [module for name, module in model.get_encoder(modality="image").named_modules()
             if name.rpartition(".")[2] in ("layers", "layer", "blocks") and len(module) == count]
    assert len(found) == 1
    return found[0]


@contextmanager
def without(layers: nn.ModuleList, kept: tuple[int, ...]) -> Iterator[None]:
    """Layers that are not kept are never run: what they are given goes on."""
    dropped: list[Any] = [layer for i, layer in enumerate(layers) if i not in kept]

    def hand_on(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden_states

    def hand_on_with(names: tuple[str, ...]) -> Any:
        return lambda hidden_states, **kwargs: (hidden_states, *(kwargs[name] for name in names))

    try:
        for layer in dropped:
            names = IN_A_TUPLE.get(type(layer).__name__)
            layer.forward = hand_on if names is None else hand_on_with(names)
        yield
    finally:
        for layer in dropped:
            del layer.forward
