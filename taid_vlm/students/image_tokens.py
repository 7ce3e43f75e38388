"""Fewer image tokens: patches merged or pooled in larger squares, in config and processor alike.

A family that pools keeps its weights. A family that puts s x s patches side by side before its
projector gets a wider first layer, set so that it starts from what the teacher would have given:
with squares k times as wide, a new token is the mean of the k * k old ones that it replaces.

- Where the first layer is linear (SmolVLM, Idefics3, Mistral3, Ovis2): its columns are repeated for
  every old token and divided by k * k, so its output is exactly the mean of the old outputs.
- Where the hidden layer grows with the input (Qwen's mergers): k * k copies of the old projector
  stand side by side, one for every old token, and the output is exactly the mean of theirs.
- Where a LayerNorm stands before it (InternVL, LFM2-VL, Qwen3-VL's deepstack mergers): the same,
  but the old tokens are normalised together, so it is exact only where they have equal mean and
  variance.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from taid_vlm.errors import TaidError
from taid_vlm.students.layers import empty_model, fill

Rule = Literal["mean", "tile", "copies", "repeat", "mean of copies"]


@dataclass(frozen=True)
class Family:
    """How a family says how many tokens an image becomes.

    factor: patches per side of one token, read from config and processor.
    tokens: tokens of one `per` when the factor is changed; None if it does not fit.
    config, processor: dotted names to be set, to a function of the new factor f, the number of
        tokens n and the processor p.
    rules: which parameters change with the factor (a pattern for their names), and how.
    by_channel: whether patches stand side by side within a channel, or channels within a patch.
    largest: squares at most so many times as wide (Qwen's merger grows with the fourth power).
    """

    per: str
    factor: Callable[[PretrainedConfig, Any], int]
    tokens: Callable[[PretrainedConfig, Any, int], int | None]
    config: Mapping[str, Callable[[int, int], Any]]
    processor: Mapping[str, Callable[[int, int, Any], Any]]
    rules: Mapping[str, Rule] = field(default_factory=dict)
    by_channel: bool = False
    largest: int = 16


@dataclass(frozen=True)
class Narrowing:
    """A choice that fits: the family, squares before and after, tokens before and after."""

    family: Family
    old_factor: int
    factor: int
    before: int
    after: int


# ----- the families -------------------------------------------------------------------------


def _first(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def _vision_side(config: PretrainedConfig, processor: Any) -> int:
    """Patches per side of the square that the tower sees."""
    vision = config.vision_config
    return _first(vision.image_size) // _first(vision.patch_size)


def _square(side: Callable[[PretrainedConfig, Any], int]) -> Any:
    """Tokens of a square of `side` patches per side."""
    def tokens(config: PretrainedConfig, processor: Any, factor: int) -> int | None:
        patches = side(config, processor)
        return None if patches % factor else (patches // factor) ** 2
    return tokens


def _intern_tokens(config: PretrainedConfig, processor: Any, factor: int) -> int | None:
    side = _vision_side(config, processor)
    return None if side % (1 / factor) else _square(_vision_side)(config, processor, factor)


def _qwen_tokens(config: PretrainedConfig, processor: Any, factor: int) -> int | None:
    vision, size = config.vision_config, processor.image_processor.size
    pixels = vision.patch_size * factor
    if getattr(vision, "window_size", pixels) % pixels:
        return None
    return int(size["longest_edge"]) // pixels**2  # this "edge" is an area


def _mistral_tokens(config: PretrainedConfig, processor: Any, factor: int) -> int | None:
    longest = int(processor.image_processor.size["longest_edge"])
    return (longest // (config.vision_config.patch_size * factor)) ** 2


def _lfm_tokens(config: PretrainedConfig, processor: Any, factor: int) -> int | None:
    images, old = processor.image_processor, config.downsample_factor
    times = (factor // old) ** 2
    tile = images.tile_size // images.encoder_patch_size
    fits = not (images.max_image_tokens % times or images.min_image_tokens % times or tile % factor)
    return images.max_image_tokens // times if fits else None


def _gemma4_tokens(config: PretrainedConfig, processor: Any, factor: int) -> int | None:
    from transformers.models.gemma4.image_processing_gemma4 import _SUPPORTED_SOFT_TOKENS

    images = processor.image_processor
    patches = images.max_soft_tokens * config.vision_config.pooling_kernel_size**2
    tokens = patches // factor**2
    return tokens if patches % factor**2 == 0 and tokens in _SUPPORTED_SOFT_TOKENS else None


def _perception_side(config: PretrainedConfig, processor: Any) -> int:
    return int(processor.image_processor.tile_size) // int(processor.patch_size)


def _lfm_limit(name: str) -> Callable[[int, int, Any], int]:
    """A limit in tokens, set so that it is the same number of pixels as before."""
    def limit(factor: int, tokens: int, processor: Any) -> int:
        images = processor.image_processor
        return int(getattr(images, name) * images.downsample_factor**2 // factor**2)
    return limit


def _the_factor(factor: int, *_: Any) -> int:
    return factor


def _the_tokens(factor: int, tokens: int, *_: Any) -> int:
    return tokens


_QWEN = Family(
    per="for the largest image",
    factor=lambda config, _: config.vision_config.spatial_merge_size,
    tokens=_qwen_tokens,
    config={"vision_config.spatial_merge_size": _the_factor},
    processor={"image_processor.merge_size": _the_factor,
               "video_processor.merge_size": _the_factor},
    rules={r"(deepstack_)?merger(_list\.\d+)?\.(mlp\.0|linear_fc1)\.weight": "copies",
           r"(deepstack_)?merger(_list\.\d+)?\.(mlp\.0|linear_fc1)\.bias": "repeat",
           r"(deepstack_)?merger(_list\.\d+)?\.(mlp\.2|linear_fc2)\.weight": "mean of copies",
           r"deepstack_merger_list\.\d+\.norm\.(weight|bias)": "tile"},
    largest=4,
)
_IDEFICS = Family(
    per="per tile",
    factor=lambda config, _: config.scale_factor,
    tokens=_square(_vision_side),
    config={"scale_factor": _the_factor},
    processor={"image_seq_len": _the_tokens},
    rules={r"connector\.modality_projection\.proj\.weight": "mean"},
)
_NORM_THEN_LINEAR: dict[str, Rule] = {
    r"multi_modal_projector\.layer_norm\.(weight|bias)": "tile",
    r"multi_modal_projector\.linear_1\.weight": "mean",
}
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5",
                     "qwen3_5_moe"), _QWEN),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "internvl": Family(
        per="per tile",
        factor=lambda config, _: round(1 / config.downsample_ratio),
        tokens=_intern_tokens,
        config={"downsample_ratio": lambda factor, _: 1 / factor, "image_seq_length": _the_tokens},
        processor={"image_seq_length": _the_tokens},
        rules=_NORM_THEN_LINEAR,
    ),
    "lfm2_vl": Family(
        per="per tile",
        factor=lambda config, _: config.downsample_factor,
        tokens=_lfm_tokens,
        config={"downsample_factor": _the_factor},
        processor={"image_processor.max_image_tokens": _lfm_limit("max_image_tokens"),
                   "image_processor.min_image_tokens": _lfm_limit("min_image_tokens"),
                   "image_processor.downsample_factor": _the_factor},
        rules=_NORM_THEN_LINEAR,
    ),
    "mistral3": Family(
        per="for the largest image",
        factor=lambda config, _: config.spatial_merge_size,
        tokens=_mistral_tokens,
        config={"spatial_merge_size": _the_factor},
        processor={"spatial_merge_size": _the_factor},
        rules={r"multi_modal_projector\.patch_merger\.merging_layer\.weight": "mean"},
        by_channel=True,
    ),
    "ovis2": Family(
        per="per tile",
        factor=lambda config, _: config.vision_config.hidden_stride,
        tokens=_square(_vision_side),
        config={"vision_config.hidden_stride": _the_factor},
        processor={"image_seq_length": _the_tokens},
        rules={r"vision_tower\.head_linear\.weight": "mean"},
    ),
    "gemma3": Family(
        per="per image",
        factor=lambda config, p: _vision_side(config, p) // isqrt(config.mm_tokens_per_image),
        tokens=_square(_vision_side),
        config={"mm_tokens_per_image": _the_tokens},
        processor={"image_seq_length": _the_tokens},
    ),
    "gemma4": Family(
        per="for the largest image",
        factor=lambda config, _: config.vision_config.pooling_kernel_size,
        tokens=_gemma4_tokens,
        config={"vision_config.pooling_kernel_size": _the_factor},
        processor={f"{part}.{name}": rule for part in ("image_processor", "video_processor")
                   for name, rule in (("max_soft_tokens", _the_tokens),
                                      ("pooling_kernel_size", _the_factor))},
    ),
    "perception_lm": Family(
        per="per tile",
        factor=lambda config, _: config.projector_pooling_ratio,
        tokens=_square(_perception_side),
        config={"projector_pooling_ratio": _the_factor},
        processor={"pooling_ratio": _the_factor},
    ),
}


# ----- choosing -----------------------------------------------------------------------------


def choose_tokens(config: PretrainedConfig, processor: Any, number: int) -> Narrowing:
    """The setting that gives `number` tokens; raises TaidError with the numbers there are."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise TaidError(
            f"image_tokens = {number}, but the config of {config.model_type} has no setting for "
            "how many of the tower's patches make a token; this works for "
            f"{', '.join(sorted(FAMILIES))}. Make the images smaller in the processor, or compose "
            "a student with another tower.")
    try:
        old = family.factor(config, processor)
        before = family.tokens(config, processor, old)
        factors = [old * k for k in range(family.largest, 1, -1)]  # the smallest has the last word
        counts = {family.tokens(config, processor, factor): factor for factor in factors}
    except (AttributeError, KeyError, TypeError) as error:
        raise TaidError(f"image_tokens = {number}, but {type(processor).__name__} lacks a setting "
                        f"that {config.model_type}'s own processor has ({error}).") from error
    valid = {count: factor for count, factor in counts.items() if count}
    if before is None or number not in valid:
        near = sorted(valid, key=lambda count: abs(count - number))
        fitting = f"nearest: {near[0]}; valid: {', '.join(map(str, sorted(valid)))}" if near else \
            "its patches do not divide into larger squares"
        raise TaidError(f"image_tokens = {number}, but {config.model_type} has {before} "
                        f"{family.per} ({fitting}).")
    return Narrowing(family, old, valid[number], before, number)


def narrow_processor(processor: Any, choice: Narrowing) -> None:
    """Set the processor in place; it has to be saved and loaded again to take effect everywhere."""
    values = {name: rule(choice.factor, choice.after, processor)
              for name, rule in choice.family.processor.items()}
    for name, value in values.items():
        parent, _, last = name.rpartition(".")
        owner = getattr(processor, parent, None) if parent else processor
        if owner is not None:  # not every processor takes videos
            setattr(owner, last, value)


def narrow_model(model: PreTrainedModel, choice: Narrowing) -> PreTrainedModel:
    """The model with larger squares; tensors that do not change are the given model's own."""
    tree = model.config.to_dict()
    for name, rule in choice.family.config.items():
        parent, _, last = name.rpartition(".")
        (tree[parent] if parent else tree)[last] = rule(choice.factor, choice.after)
    tensors = {name: _widened(name, x, choice) for name, x in model.state_dict().items()}
    return fill(empty_model(model, tree), model, tensors)


# ----- weights ------------------------------------------------------------------------------


def _rule(family: Family, name: str) -> Rule | None:
    """How the parameter of this name changes, if it does."""
    return next((rule for pattern, rule in family.rules.items()
                 if re.search(rf"(^|\.){pattern}$", name)), None)


def _widened(name: str, tensor: Tensor, choice: Narrowing) -> Tensor:
    rule = _rule(choice.family, name)
    if rule is None:
        return tensor
    times = (choice.factor // choice.old_factor) ** 2
    if rule == "repeat":
        return tensor.repeat(times)
    if rule == "mean of copies":
        return tensor.repeat(1, times) / times
    token, column = (x.to(tensor.device) for x in _places(tensor.shape[-1], choice))
    if rule == "tile":
        return tensor[column]
    if rule == "mean":
        return tensor[:, column] / times
    copies = [tensor[:, column] * (token == copy).to(tensor.dtype) for copy in range(times)]
    return torch.cat(copies)


def _places(width: int, choice: Narrowing) -> tuple[Tensor, Tensor]:
    """For every entry of a new token, which of the old tokens it was in, and where in it."""
    channels = width // choice.old_factor**2
    side = choice.factor
    patches = torch.arange(side * side * channels).view(side, side, channels)
    old, new = (_side_by_side(patches, f, choice.family.by_channel).flatten()
                for f in (choice.old_factor, choice.factor))
    place = old.argsort()[new]
    return place // width, place % width


def _side_by_side(patches: Tensor, factor: int, by_channel: bool) -> Tensor:
    """[H, W, C] -> [tokens, factor * factor * C], squares row by row."""
    height, width, channels = patches.shape
    split = patches.view(height // factor, factor, width // factor, factor, channels)
    order = (0, 2, 4, 1, 3) if by_channel else (0, 2, 1, 3, 4)
    return split.permute(*order).reshape(-1, factor * factor * channels)
