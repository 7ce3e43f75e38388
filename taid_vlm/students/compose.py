"""A vision tower, a fresh projector and a language model, composed into one student.

The result is a checkpoint of a stock architecture: it loads with AutoModelForImageTextToText and
AutoProcessor, without this package and without code of its own.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PerceptionLMProcessor,
    PerceptionLMVideoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.activations import ACT2FN

from taid_vlm.adapters import make_adapter
from taid_vlm.config.model import DTYPES
from taid_vlm.errors import TaidError, nearest
from taid_vlm.io.folders import new_folder, whole_or_absent
from taid_vlm.io.terminal import table
from taid_vlm.models.forward import forward_names
from taid_vlm.models.loading import read_template
from taid_vlm.models.published import save_weights
from taid_vlm.students.language import (
    Language,
    check_tokenizer,
    find_language,
    load_language,
    probe_logits,
)
from taid_vlm.students.template import simple_template, wrap
from taid_vlm.students.towers import Architecture, Layer, Tower, find_tower

ROLE = "compose"
MODELS: dict[Architecture, type[PreTrainedModel]] = {
    "llava": LlavaForConditionalGeneration,
    "perception_lm": PerceptionLMForConditionalGeneration,
    "fast_vlm": FastVlmForConditionalGeneration,
}


@dataclass(frozen=True)
class Composed:
    """What was composed.

    image_tokens: tokens that one image takes in the language model.
    parameters: by part, tied weights once; the language model's with its new rows.
    rows: rows of the embedding before and after.
    checks: what was found true of the checkpoint as it was loaded again.
    """

    output_dir: Path
    architecture: Architecture
    tower: str
    language_model: str
    dtype: str
    image_size: tuple[int, int]
    patch_size: int
    image_tokens: int
    vision_feature_layer: Layer | None
    needs_timm: bool
    parameters: Mapping[str, int]
    tied: tuple[bool, bool]
    image_token: str
    image_token_id: int
    rows: tuple[int, int]
    checks: tuple[str, ...]

    def table(self) -> str:
        """The same for people, one line per fact."""
        counts = {part: f"{number:,}" for part, number in self.parameters.items()}
        height, width = self.image_size
        layer = "" if self.vision_feature_layer is None \
            else f", hidden state {self.vision_feature_layer}"
        untied = "; head untied, it can only be tied to embed_tokens" \
            if self.tied == (True, False) else ""
        lines = {
            "architecture": self.architecture + (", needs timm to load" * self.needs_timm),
            "tower": f"{self.tower}, {counts['tower']} parameters{layer}",
            "image": f"{height} x {width} pixels, patches of {self.patch_size}, "
                     f"{self.image_tokens} tokens",
            "projector": f"{counts['projector']} parameters, fresh",
            "language model": f"{self.language_model}, {counts['language_model']} parameters"
                              f"{untied}",
            "total": f"{counts['total']} parameters, {self.dtype}",
            "image token": f"{self.image_token}, id {self.image_token_id}",
            "vocabulary rows": f"{self.rows[0]:,} -> {self.rows[1]:,}",
            "loaded again": "; ".join(self.checks),
            "written to": str(self.output_dir),
        }
        return table([*lines.items()])


def compose(
    tower: str,
    language_model: str,
    output_dir: str | Path,
    *,
    architecture: str = "auto",
    tower_weights: str | Path | None = None,
    random_tower: bool = False,
    vision_feature_layer: Layer | None = None,
    projector_activation: str | None = None,
    pooling_ratio: int | None = None,
    chat_template: str | None = None,
    dtype: str = "auto",
    seed: int = 0,
) -> Composed:
    """Compose a student and check it as it is loaded again.

    Args:
        tower: `timm:NAME`, or a folder or hub name of transformers.
        language_model: folder or hub name of a causal language model.
        output_dir: a new or empty folder.
        architecture: "auto", "llava", "perception_lm" or "fast_vlm".
        tower_weights: safetensors file for a timm tower (default: its weights on the hub).
        random_tower: a tower without pretrained weights.
        vision_feature_layer: the hidden state that LLaVA projects, or several (default: -2 for
            CLIP, ViT and BEiT, whose last layer is trained for the class token, otherwise -1).
        projector_activation: of LLaVA's and FastVLM's projector (default "gelu").
        pooling_ratio: PerceptionLM's; 2 leaves a quarter of the image tokens (default 1).
        chat_template: jinja file or text in place of the language model's own; one that does not
            place the image token itself gets images the way the language model's own does.
        dtype: of all parts; "auto" is the language model's.
        seed: for the projector, and for a random tower.

    Raises:
        TaidError: anything a user can mend; before weights are loaded where that is possible, and
            with nothing left in `output_dir`.
    """
    output = new_folder(output_dir)
    _check_names(architecture, dtype, projector_activation)
    vision = find_tower(tower, architecture, weights=tower_weights, random=random_tower,
                        layer=vision_feature_layer)
    options = _projector_options(vision, projector_activation, pooling_ratio)
    kinds = ("image", "video") if vision.architecture == "perception_lm" else ("image",)
    language = find_language(language_model, dtype, kinds)
    processor = _processor(vision, language, options, chat_template)
    config = _config(vision, language, options)
    model, text_logits = _assemble(vision, language, config, seed)
    _check_text(model, language, text_logits)
    parameters = _parameters(model)
    checks = _write(model, processor, output, language, _image_tokens(vision, options))
    return Composed(
        output, vision.architecture, tower, language_model, str(language.dtype)[6:],
        vision.image_size, vision.patch_size, _image_tokens(vision, options), vision.layer,
        vision.architecture != "llava", parameters, language.tied, language.tokens["image"],
        language.token_id("image"), language.rows, checks,
    )


# ----- before weights are loaded ------------------------------------------------------------


def _check_names(architecture: str, dtype: str, activation: str | None) -> None:
    choices: list[tuple[str, Any, list[str]]] = [
        ("architecture", architecture, ["auto", *get_args(Architecture)]),
        ("dtype", dtype, list(DTYPES)),
    ]
    if activation is not None:
        choices.append(("projector_activation", activation, list(ACT2FN)))
    for key, value, valid in choices:
        if value not in valid:
            raise TaidError(f"{key} = '{value}' is unknown.{nearest(value, valid)}")


def _projector_options(
    tower: Tower, activation: str | None, pooling: int | None
) -> dict[str, Any]:
    """What this architecture's projector can be told; the rest is refused."""
    if tower.architecture != "perception_lm":
        if pooling is not None:
            raise TaidError(f"pooling_ratio is PerceptionLM's; '{tower.architecture}' has none.")
        return {"projector_hidden_act": activation or "gelu"}
    if activation is not None:
        raise TaidError("projector_activation: PerceptionLM's projector is always 'gelu'.")
    grid = tower.image_size[0] // tower.patch_size
    ratio = 1 if pooling is None else pooling
    if not 1 <= ratio <= grid:
        raise TaidError(f"pooling_ratio = {ratio}, but the tower has {grid} x {grid} patches.")
    return {"projector_pooling_ratio": ratio}


def _image_tokens(tower: Tower, options: Mapping[str, Any]) -> int:
    height, width = tower.image_size
    ratio = options.get("projector_pooling_ratio", 1)
    return (height // tower.patch_size // ratio) * (width // tower.patch_size // ratio)


def _processor(
    tower: Tower, language: Language, options: Mapping[str, Any], chat_template: str | None
) -> ProcessorMixin:
    """The architecture's processor; its template must print typed parts faithfully."""
    own = chat_template is None and language.original.chat_template is not None
    if chat_template is None:
        template = language.original.chat_template or simple_template(language.original)
    else:
        template = read_template(chat_template, ROLE)
    if own or language.tokens["image"] not in template:
        template = wrap(template, language.tokens)
    language.tokenizer.chat_template = template
    arguments = {"image_processor": tower.image_processor, "tokenizer": language.tokenizer,
                 "patch_size": tower.patch_size, "chat_template": template}
    if tower.architecture == "perception_lm":
        images = tower.image_processor
        videos = PerceptionLMVideoProcessor(
            size=dict(images.size), resample=images.resample, image_mean=images.image_mean,
            image_std=images.image_std)
        processor = PerceptionLMProcessor(
            video_processor=videos, pooling_ratio=options["projector_pooling_ratio"], **arguments)
    else:
        processor = LlavaProcessor(
            vision_feature_select_strategy=_strategy(tower),
            num_additional_image_tokens=tower.prefix_tokens, **arguments)
    make_adapter(copy.deepcopy(processor), ROLE)  # a copy: adapters give tokenizers a pad token
    if own:
        _check_rendering(language, processor)
    return processor


def _strategy(tower: Tower) -> str:
    return "default" if tower.prefix_tokens else "full"


def _check_rendering(language: Language, processor: ProcessorMixin) -> None:
    """Conversations of texts read as they do in the language model, whatever their form."""
    texts = [("user", "What is it?"), ("assistant", "It is red."), ("user", "Are you sure?")]
    strings = [{"role": role, "content": text} for role, text in texts]
    parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts]
    for last, prompt in ((2, False), (3, True)):
        expected = language.original.apply_chat_template(
            strings[:last], tokenize=False, add_generation_prompt=prompt)
        for form in (strings, parts):
            printed = processor.apply_chat_template(form[:last], add_generation_prompt=prompt)
            if printed != expected:
                raise TaidError(
                    f"language_model = '{language.name}': its chat template does not read "
                    f"conversations as before once images are put in ({printed!r} instead of "
                    f"{expected!r}); give chat_template."
                )


def _config(tower: Tower, language: Language, options: Mapping[str, Any]) -> PretrainedConfig:
    text = copy.deepcopy(language.config)
    text.vocab_size, text.tie_word_embeddings = language.rows[1], language.tied[1]
    both = {"vision_config": tower.config, "text_config": text,
            "tie_word_embeddings": language.tied[1], **options}
    image = language.token_id("image")
    if tower.architecture == "perception_lm":
        config = PerceptionLMConfig(
            image_token_id=image, video_token_id=language.token_id("video"),
            vision_use_cls_token=bool(tower.prefix_tokens), **both)
    elif tower.architecture == "fast_vlm":
        config = FastVlmConfig(
            image_token_index=image, image_seq_length=tower.image_tokens, **both)
    else:
        config = LlavaConfig(
            image_token_index=image, image_seq_length=tower.image_tokens,
            vision_feature_select_strategy=_strategy(tower), vision_feature_layer=tower.layer,
            **both)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = language.dtype
        if Path(part.name_or_path).exists():
            part.name_or_path = ""  # a path of this machine is nobody else's business
    return config


# ----- putting together ---------------------------------------------------------------------


def _assemble(
    tower: Tower, language: Language, config: PretrainedConfig, seed: int
) -> tuple[PreTrainedModel, Tensor]:
    """The model out of its parts, without a second copy of any; and the text logits to keep."""
    with torch.device("meta"):
        model = MODELS[tower.architecture](config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vision = tower.load(language.dtype)
        torch.manual_seed(seed)  # the projector does not depend on what the tower drew
        projector: nn.Module = type(model.model.multi_modal_projector)(config)
        projector.apply(model._init_weights)
    source, logits = load_language(language)
    model.model.vision_tower = vision
    model.model.multi_modal_projector = projector.to(language.dtype)
    model.model.language_model = source.base_model
    model.lm_head = source.get_output_embeddings()
    model.generation_config = source.generation_config
    return model.eval(), logits


def _parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters by part, those that are shared counted once."""
    inner = model.model
    parts = {"tower": [inner.vision_tower], "projector": [inner.multi_modal_projector],
             "language_model": [inner.language_model, model.lm_head]}
    counts = {
        name: sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())
        for name, modules in parts.items()
    }
    return {**counts, "total": sum(counts.values())}


# ----- checks -------------------------------------------------------------------------------


def _check_text(model: PreTrainedModel, language: Language, expected: Tensor) -> None:
    """On text the composed model runs the language model's own tensors; not a bit may differ."""
    if not torch.equal(probe_logits(model, language), expected):
        raise TaidError(
            f"language_model = '{language.name}' ({language.config.model_type}): on text alone the "
            "composed model does not give its logits, so this architecture cannot carry it; choose "
            "another language model."
        )


@dataclass(frozen=True)
class _Snapshot:
    """What a model holds and says, small enough to outlive it.

    logits: of a text, and of two images with a question.
    """

    weights: Mapping[str, bytes]
    logits: tuple[Tensor, Tensor, Tensor]


def _snapshot(model: PreTrainedModel, processor: ProcessorMixin, language: Language) -> _Snapshot:
    weights = {key: hashlib.blake2b(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
               .digest() for key, tensor in model.state_dict().items()}
    first, second = (_logits(model, processor, image) for image in _probe_images())
    return _Snapshot(weights, (probe_logits(model, language), first, second))


def _write(
    model: PreTrainedModel, processor: ProcessorMixin, output: Path, language: Language,
    image_tokens: int,
) -> tuple[str, ...]:
    """Write beside the place, load and check what was written, and only then put it in place."""
    message = "the composed model could not be written to '{}' and loaded again"
    with whole_or_absent(output, message) as partial:
        before = _snapshot(model, processor, language)
        save_weights(model, partial)
        processor.save_pretrained(partial)
        del model
        return _check(partial, language, before, image_tokens)


def _check(
    folder: Path, language: Language, before: _Snapshot, image_tokens: int
) -> tuple[str, ...]:
    """Load as any user would, and compare with what was written."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype="auto", output_loading_info=True)
    processor = AutoProcessor.from_pretrained(folder)
    check_tokenizer(language.original, processor.tokenizer, language.tokens,
                    f"language_model = '{language.name}': transformers, loading its tokenizer "
                    "beside the composed model,")
    make_adapter(copy.deepcopy(processor), ROLE)
    for image in _probe_images():
        if _inputs(model, processor, image)[1] != image_tokens:
            raise TaidError(f"the processor does not make {image_tokens} image tokens.")
    again = _snapshot(model.eval(), processor, language)
    _check_same(before, again, [*info["missing_keys"], *info["unexpected_keys"]])
    if torch.equal(*before.logits[1:]):
        raise TaidError("two different images give the same logits, so the tower is blind; choose "
                        "another one, or another vision_feature_layer.")
    return ("tokenizer as before", "text logits equal bit for bit", "weights as written",
            "images change the logits")


def _check_same(before: _Snapshot, again: _Snapshot, odd: list[str]) -> None:
    """The same weights bit for bit; the same logits but for rounding.

    Convolutions round differently with the place of their weights in memory. What is no rounding
    comes from tables that a tower keeps outside its state dict.
    """
    odd += [key for key in before.weights if before.weights[key] != again.weights.get(key)]
    if odd:
        raise TaidError(f"the composed model's {min(odd)} is not the same after saving and "
                        "loading.")
    for old, new in zip(before.logits, again.logits, strict=True):
        share = max(1e-5, 16 * torch.finfo(old.dtype).eps)
        if not (old - new).abs().max() <= share * old.abs().max():
            raise TaidError("the composed model gives other logits after it was loaded again; its "
                            "tower does not survive saving. Choose another tower.")


def _probe_images() -> list[Image.Image]:
    """A wide image in colour, and a tall grey one with other content."""
    rows, columns = np.mgrid[0:48, 0:96]
    colour = np.stack([rows * 5, columns * 2, (rows + columns) % 64 * 4], axis=-1)
    grey = (rows.T // 8 + columns.T // 8) % 2 * 255
    return [Image.fromarray(colour.astype(np.uint8)), Image.fromarray(grey.astype(np.uint8))]


@torch.no_grad()
def _logits(model: PreTrainedModel, processor: ProcessorMixin, image: Image.Image) -> Tensor:
    return model(**_inputs(model, processor, image)[0]).logits


def _inputs(
    model: PreTrainedModel, processor: Any, image: Image.Image
) -> tuple[dict[str, Any], int]:
    """What the model takes of an image and a question, and how many image tokens are in it."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(text=[text], images=[[image]], return_tensors="pt")
    names = forward_names(type(model))
    count = int((inputs["input_ids"] == model.config.image_token_id).sum())
    return {key: value for key, value in inputs.items() if key in names}, count
