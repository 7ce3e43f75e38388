"""Vision towers: what a name stands for, which architecture can carry it, and its weights.

A tower is found and its shapes are worked out on the meta device first; weights are loaded last.

| tower                                        | architecture  | timm needed to load the result |
|----------------------------------------------|---------------|--------------------------------|
| CLIP, SigLIP, ViT, DINOv2 ... (transformers) | LLaVA         | no                             |
| plain timm ViT, rewritten as a `ViTModel`    | LLaVA         | no                             |
| other timm ViT with at most one prefix token | PerceptionLM  | yes                            |
| timm CNN                                     | FastVLM       | yes                            |

LLaVA over a wrapped timm model does not work (it takes hidden states for token sequences), so it
is never made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    PerceptionLMImageProcessor,
    PretrainedConfig,
    TimmWrapperConfig,
    ViTImageProcessor,
    ViTModel,
)

from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import TaidError, nearest
from taid_vlm.io.quiet import quiet
from taid_vlm.models.loading import guarded, read_config
from taid_vlm.students.vit import obstacles, vit_config, vit_state

Architecture = Literal["llava", "perception_lm", "fast_vlm"]
Layer: TypeAlias = int | list[int]
Weights: TypeAlias = Path | Literal["pretrained", "random"]

ROLE = "tower"
TIMM = "timm:"
# model type -> (tokens before the patches, the layer whose output is used unless asked otherwise).
# Training of CLIP and of classifiers shapes the last layer for the class token alone, so the one
# before it is used, as in LLaVA; the others train their last layer's patches.
NATIVE: dict[str, tuple[int, int]] = {
    "clip_vision_model": (1, -2),
    "siglip_vision_model": (0, -1),
    "vit": (1, -2),
    "vit_msn": (1, -2),
    "beit": (1, -2),
    "dinov2": (1, -1),
    "ijepa": (0, -1),
}


@dataclass(frozen=True)
class Tower:
    """A tower that was found and measured; `load(dtype)` gives its module with weights.

    prefix_tokens: tokens before the patches (a class token), which LLaVA takes away.
    patch_size: pixels per image token in each direction, as the processor counts them.
    layer: hidden state that LLaVA projects; None for the other architectures.
    """

    name: str
    architecture: Architecture
    config: PretrainedConfig
    image_processor: Any
    image_size: tuple[int, int]
    patch_size: int
    prefix_tokens: int
    layer: Layer | None
    load: Callable[[torch.dtype], nn.Module]

    @property
    def image_tokens(self) -> int:
        height, width = self.image_size
        return (height // self.patch_size) * (width // self.patch_size)


def find_tower(
    name: str, architecture: str = "auto", *, weights: str | Path | None = None,
    random: bool = False, layer: Layer | None = None,
) -> Tower:
    """What a tower's name stands for, measured without loading weights.

    Args:
        name: `timm:NAME`, or a folder or hub name of transformers.
        architecture: "auto" or the one that is wanted.
        weights: a safetensors file for a timm tower (default: its pretrained weights of the hub).
        random: take no weights at all.
        layer: hidden state for LLaVA, or several that are concatenated.

    Raises:
        TaidError: no such tower, or one that no architecture (or not the wanted one) can carry.
    """
    if weights is not None and random:
        raise TaidError("tower_weights and random_tower exclude each other; give one of them.")
    if name.startswith(TIMM):
        return _timm_tower(name.removeprefix(TIMM), architecture, weights, random, layer)
    if weights is not None:
        raise TaidError(f"tower_weights = '{weights}' is for timm towers; a tower of transformers "
                        f"('{name}') brings its own.")
    return _native_tower(name, architecture, random, layer)


# ----- towers of transformers ---------------------------------------------------------------


def _native_tower(name: str, architecture: str, random: bool, layer: Layer | None) -> Tower:
    spec = ModelSpec(model_name_or_path=name)
    if name.startswith("timm/") and not Path(name).exists():
        raise TaidError(f"tower = '{name}' is a timm model: write 'timm:{name[5:]}'.")
    whole = read_config(spec, ROLE)
    config = getattr(whole, "vision_config", whole)
    if config.model_type not in NATIVE:
        raise TaidError(
            f"tower = '{name}' ({config.model_type}) is none that LLaVA can read as one class "
            "token or none before a fixed grid of patches; choose one of these model types: "
            f"{', '.join(NATIVE)}, or a timm model ('timm:NAME')."
        )
    if architecture not in ("auto", "llava"):
        raise TaidError(f"architecture = '{architecture}' takes timm towers only; '{name}' goes "
                        "with 'llava'.")
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False  # a pooling head, which nothing would use or train
    images = guarded(ROLE, name, AutoImageProcessor.from_pretrained, name)
    images.do_convert_rgb = True  # some leave grey and transparent images as they are

    def load(dtype: torch.dtype) -> nn.Module:
        if random:
            return AutoModel.from_config(config, dtype=dtype)
        with quiet("transformers"):  # the text half of a CLIP, a classifier: left behind on purpose
            module, info = guarded(
                ROLE, name, AutoModel.from_pretrained, name, config=config, dtype=dtype,
                use_safetensors=True, output_loading_info=True)
        missing = [key for key in info["missing_keys"] if not key.startswith("pooler.")]
        if missing:
            raise TaidError(f"tower = '{name}' lacks weights: {_some(missing)}.")
        return module

    prefix, usual = NATIVE[config.model_type]
    return _for_llava(name, config, images, prefix, usual if layer is None else layer, load)


def _for_llava(
    name: str, config: PretrainedConfig, images: Any, prefix: int, layer: Layer,
    load: Callable[[torch.dtype], nn.Module],
) -> Tower:
    """Check layer, image size and token count against the tower's own forward."""
    size, patch = _processed_size(name, images), config.patch_size
    if not isinstance(patch, int):
        patch = _square(name, "patches", patch)
    with torch.device("meta"):
        tower = AutoModel.from_config(config)
    try:
        states = tower(torch.empty(1, 3, *size, device="meta"), output_hidden_states=True)
    except (ValueError, RuntimeError) as error:
        raise TaidError(f"tower = '{name}' does not take the images that its own image processor "
                        f"makes ({size[0]} x {size[1]} pixels): {error}") from error
    hidden = states.hidden_states
    for one in layer if isinstance(layer, list) else [layer]:
        if not -len(hidden) <= one < len(hidden):
            raise TaidError(f"vision_feature_layer = {one}, but '{name}' has the hidden states "
                            f"{-len(hidden)} to {len(hidden) - 1}.")
    tokens, expected = hidden[-1].shape[1], prefix + (size[0] // patch) * (size[1] // patch)
    if tokens != expected:
        raise TaidError(f"tower = '{name}' gives {tokens} tokens for an image, but its patches "
                        f"({patch} pixels) and class token make {expected}.")
    return Tower(name, "llava", config, images, size, patch, prefix, layer, load)


def _processed_size(name: str, images: Any) -> tuple[int, int]:
    """Height and width that an image processor makes of any image; LLaVA needs it to be fixed."""
    from PIL import Image

    shapes = {tuple(images(Image.new("RGB", size), return_tensors="pt")["pixel_values"].shape[-2:])
              for size in ((57, 35), (40, 80))}
    if len(shapes) > 1:
        raise TaidError(f"tower = '{name}': its image processor makes images of different sizes "
                        f"({', '.join(map(str, sorted(shapes)))}); set a fixed size there.")
    return shapes.pop()


def _square(name: str, what: str, size: Sequence[int]) -> int:
    if len(set(size)) > 1:
        raise TaidError(f"tower = '{name}' has {what} of {tuple(size)} pixels; they must be "
                        "square.")
    return int(size[0])


# ----- timm ---------------------------------------------------------------------------------


def _timm_tower(
    name: str, architecture: str, weights: str | Path | None, random: bool, layer: Layer | None
) -> Tower:
    skeleton, features = _skeleton(name)
    data = _data_config(skeleton)
    kind = _kind(name, skeleton, features)
    why_not = obstacles(skeleton)
    chosen = architecture
    if architecture == "auto":
        chosen = "llava" if kind == "tokens" and not why_not else _WRAPPED[kind]
    if chosen == "llava" and (kind != "tokens" or why_not):
        raise TaidError(f"architecture = 'llava', but timm's '{name}' is no plain ViT: "
                        f"{'; '.join(why_not)}. Choose '{_WRAPPED[kind]}'.")
    if chosen != "llava" and chosen != _WRAPPED[kind]:
        raise TaidError(f"architecture = '{chosen}' does not go with timm's '{name}', which gives "
                        f"{_GIVES[kind]}; choose '{_WRAPPED[kind]}'.")
    source = _Source(name, _weights(weights, random))
    if chosen == "llava":
        return _converted(source, skeleton, data, NATIVE["vit"][1] if layer is None else layer)
    if layer is not None:
        raise TaidError(f"vision_feature_layer is LLaVA's; '{chosen}' takes the last layer.")
    wrap = _for_perception_lm if chosen == "perception_lm" else _for_fast_vlm
    return wrap(source, skeleton, features, data)


Kind = Literal["tokens", "map"]
_WRAPPED: dict[Kind, Architecture] = {"tokens": "perception_lm", "map": "fast_vlm"}
_GIVES: dict[Kind, str] = {"tokens": "a sequence of tokens", "map": "a feature map"}
_PREFIX = "num_prefix_tokens"  # timm's ViTs have it; models without class tokens may not


@dataclass(frozen=True)
class _Source:
    """A timm model's name and where its weights come from."""

    name: str
    weights: Weights

    def model(self, **arguments: Any) -> nn.Module:
        import timm

        model = timm.create_model(self.name, num_classes=0, **arguments).eval()
        if isinstance(self.weights, Path):
            _load_timm(model, self.name, self.weights)
        elif self.weights == "pretrained":
            _load_timm(model, self.name, _hub_file(self.name, model))
        return model


def _skeleton(name: str) -> tuple[Any, Tensor]:
    """A timm model on the meta device, and the features it gives for one image."""
    import timm

    if not timm.is_model(name):
        raise TaidError(f"tower = 'timm:{name}': timm has no such model."
                        f"{nearest(name.split('.')[0], timm.list_models())}")
    architecture, _, tag = name.partition(".")
    tags = [one.partition(".")[2] for one in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise TaidError(f"tower = 'timm:{name}': '{architecture}' has no weights '{tag}'."
                        f"{nearest(tag, tags)}")
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(name, num_classes=0).eval()
            images = torch.empty(1, *_data_config(model)["input_size"])
            return model, model.forward_features(images)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError, ImportError) as error:
        raise TaidError(f"tower = 'timm:{name}' cannot be built or gives no features: "
                        f"{str(error).splitlines()[0]}; choose another model.") from error


def _data_config(model: Any) -> dict[str, Any]:
    """timm's own idea of how images enter the model: size, mean, std, interpolation."""
    from timm.data import resolve_model_data_config

    return resolve_model_data_config(model)


def _kind(name: str, model: Any, features: Any) -> Kind:
    """Tokens or a feature map; anything else fits none of the architectures."""
    shape = tuple(features.shape) if isinstance(features, Tensor) else ()
    if len(shape) == 3:
        prefix = getattr(model, _PREFIX, 0)
        if prefix > 1:
            raise TaidError(f"tower = 'timm:{name}' puts {prefix} tokens before the patches (class "
                            "and register tokens); no architecture takes more than one away. "
                            "Choose a model without registers.")
        return "tokens"
    if len(shape) == 4 and getattr(model, "output_fmt", "NCHW") == "NCHW" \
            and shape[1] == model.num_features:
        return "map"
    raise TaidError(f"tower = 'timm:{name}' gives features of shape {shape}, neither tokens nor "
                    "a map with channels first; choose a ViT or a CNN.")


def _image_processor(data: dict[str, Any]) -> ViTImageProcessor:
    """timm's mean, std, interpolation and size.

    The whole image is squeezed into the square, where timm would crop its margin away: a question
    may be about the margin.
    """
    _, height, width = data["input_size"]
    return ViTImageProcessor(
        size={"height": height, "width": width}, resample=_resample(data["interpolation"]),
        image_mean=list(data["mean"]), image_std=list(data["std"]), do_convert_rgb=True,
    )


def _resample(interpolation: str) -> int:
    from PIL.Image import Resampling

    return int(getattr(Resampling, interpolation.upper(), Resampling.BICUBIC))


# ----- weights of timm towers ---------------------------------------------------------------


def _weights(weights: str | Path | None, random: bool) -> Weights:
    if random or weights is None:
        return "random" if random else "pretrained"
    path = Path(weights).expanduser()
    if not path.is_file():
        raise TaidError(f"tower_weights = '{weights}' is no file.")
    if path.suffix != ".safetensors":
        raise TaidError(f"tower_weights = '{weights}' is no safetensors file; other formats can "
                        "run code when they are loaded.")
    return path


def _hub_file(name: str, model: Any) -> Path:
    """The pretrained weights' safetensors file, from the hub or its local cache."""
    from huggingface_hub import hf_hub_download

    entry = (model.pretrained_cfg or {}).get("hf_hub_id")
    if not entry:
        raise TaidError(f"tower = 'timm:{name}': timm names no weights on the hub; give "
                        "tower_weights (a file) or random_tower.")
    repository, _, revision = entry.partition("@")
    file = model.pretrained_cfg.get("hf_hub_filename") or "model.safetensors"
    file = file if file.endswith(".safetensors") else "model.safetensors"
    path = guarded(ROLE, f"{entry}/{file}", hf_hub_download, repository, file,
                   revision=revision or None)
    return Path(path)


def _load_timm(model: Any, name: str, file: Path) -> None:
    """Load a timm state dict; only the classifier may be left over, and nothing may lack."""
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise TaidError(f"tower_weights = '{file}' cannot be read: {error}") from error
    expected = model.state_dict()
    classifier = (model.pretrained_cfg or {}).get("classifier") or "head"
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    missing = [key for key in expected if key not in state]
    surplus = [key for key in state if key not in expected
               and not key.startswith(tuple(f"{head}." for head in heads))]
    if missing or surplus:
        lacks = f"lacks {_some(missing)}" if missing else f"has more: {_some(surplus)}"
        raise TaidError(f"'{file}' holds other weights than timm's '{name}': it {lacks}.")
    wrong = [key for key in expected if state[key].shape != expected[key].shape]
    if wrong:
        raise TaidError(f"'{file}' holds another size of timm's '{name}': {wrong[0]} has shape "
                        f"{tuple(state[wrong[0]].shape)}, not {tuple(expected[wrong[0]].shape)}.")
    model.load_state_dict({key: state[key] for key in expected})


def _some(names: Sequence[str], number: int = 3) -> str:
    more = f" and {len(names) - number} more" if len(names) > number else ""
    return ", ".join(names[:number]) + more


# ----- a plain timm ViT as a ViTModel -------------------------------------------------------


def _converted(source: _Source, skeleton: Any, data: dict[str, Any], layer: Layer) -> Tower:
    config = vit_config(skeleton)

    def load(dtype: torch.dtype) -> nn.Module:
        original = source.model()
        module = ViTModel(config).eval()  # with the pooler that LLaVA's tower has and never uses
        state = vit_state(original)
        state |= {key: tensor for key, tensor in module.state_dict().items()
                  if key.startswith("pooler.")}
        module.load_state_dict(state)
        _check_conversion(source.name, original, module, data["input_size"])
        return module.to(dtype)

    name = TIMM + source.name
    return _for_llava(name, config, _image_processor(data), 1, layer, load)


@torch.no_grad()
def _check_conversion(name: str, original: Any, module: nn.Module, size: Sequence[int]) -> None:
    """Both models see one image; what rounding can explain is 1e-4 of the features' scale."""
    image = torch.linspace(-2, 2, size[0] * size[1] * size[2]).view(1, *size)
    expected, converted = original.forward_features(image), module(image).last_hidden_state
    error = float((expected - converted).abs().max() / expected.abs().max())
    if not error < 1e-4:
        raise TaidError(f"tower = 'timm:{name}': as a ViTModel it gives other features (relative "
                        f"difference {error:.1e}); choose architecture 'perception_lm'.")


# ----- timm models inside a wrapper ---------------------------------------------------------


def _for_perception_lm(
    source: _Source, skeleton: Any, features: Tensor, data: dict[str, Any]
) -> Tower:
    """One tile of the tower's own size per image, whatever the image's shape."""
    name, (_, height, width) = TIMM + source.name, data["input_size"]
    side, prefix = _square(name, "images", (height, width)), getattr(skeleton, _PREFIX, 0)
    patches = features.shape[1] - prefix
    grid = math.isqrt(patches)
    if grid * grid != patches or side // (side // grid) != grid:
        raise TaidError(f"tower = '{name}' gives {patches} patches, no square grid; choose another "
                        "model.")
    # PerceptionLM's projector reads its width off timm's arguments
    arguments: dict[str, Any] = {"embed_dim": int(features.shape[2])}
    if not _same_shape(source.name, features, arguments):
        raise TaidError(f"tower = '{name}' is not as wide as its embed_dim, by which PerceptionLM "
                        "sizes its projector; choose another ViT.")
    config = TimmWrapperConfig(architecture=source.name, do_pooling=False, model_args=arguments)
    images = PerceptionLMImageProcessor(
        vision_input_type="vanilla", tile_size=side, max_num_tiles=1,
        size={"height": side, "width": side}, resample=_resample(data["interpolation"]),
        image_mean=list(data["mean"]), image_std=list(data["std"]), do_convert_rgb=True,
    )
    return Tower(name, "perception_lm", config, images, (side, side), side // grid, prefix, None,
                 _wrapped(source, config))


def _same_shape(name: str, features: Tensor, arguments: dict[str, Any]) -> bool:
    """Whether timm makes the same model when it is told its width."""
    import timm

    try:
        with torch.device("meta"):
            model: Any = timm.create_model(name, num_classes=0, **arguments).eval()
            images = torch.empty(1, *_data_config(model)["input_size"])
            return model.forward_features(images).shape == features.shape
    except (TypeError, RuntimeError, AssertionError, ValueError):
        return False


def _for_fast_vlm(
    source: _Source, skeleton: Any, features: Tensor, data: dict[str, Any]
) -> Tower:
    name, (_, height, width) = TIMM + source.name, data["input_size"]
    rows, columns = features.shape[2:]
    stride = height // rows
    if (height // stride, width // stride) != (rows, columns):
        raise TaidError(f"tower = '{name}' gives {rows} x {columns} features for {height} x "
                        f"{width} pixels, which no one stride explains; choose another model.")
    config = TimmWrapperConfig(architecture=source.name, do_pooling=False, model_args={},
                               hidden_size=int(features.shape[1]))
    return Tower(name, "fast_vlm", config, _image_processor(data), (height, width), stride, 0,
                 None, _wrapped(source, config))


def _wrapped(
    source: _Source, config: TimmWrapperConfig
) -> Callable[[torch.dtype], nn.Module]:
    def load(dtype: torch.dtype) -> nn.Module:
        wrapper = AutoModel.from_config(config)
        wrapper.timm_model = source.model(**(config.model_args or {}))
        return wrapper.to(dtype)

    return load
