"""What one model of a recipe is, as far as it can be told without its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from taid_vlm.adapters import EncodedRow, ModelAdapter, Processor, probe_image
from taid_vlm.config.model import ModelSpec
from taid_vlm.doctor.conversation import TemplateFacts, template_facts
from taid_vlm.models.experts import chosen_experts, parameters_per_token
from taid_vlm.models.forward import head_rows
from taid_vlm.models.head import logit_settings
from taid_vlm.models.parts import count_parameters, is_tied

SIZES = ((224, 224), (336, 336), (448, 448), (640, 480), (1024, 768), (1000, 250))
TYPICAL = "640x480"  # the size that stands for a picture of a data set


@dataclass(frozen=True)
class ModelFacts:
    """architecture: the class that would be loaded; parameters: by part, "" if none is known."""

    model_type: str
    architecture: str
    parameters: dict[str, int]
    positions: int | None  # that the model was built for
    experts: str | None = None  # how many a token is sent to, of how many
    per_token: int | None = None  # parameters that a token passes, of a mixture of experts


@dataclass(frozen=True)
class HeadFacts:
    """softcap, scale: {name in the configuration: value} of what is done to its logits."""

    rows: int
    tied: bool
    bias: bool
    softcap: dict[str, float]
    scale: dict[str, float]


@dataclass(frozen=True)
class TokenizerFacts:
    """kind: how it splits text. The special tokens are their texts."""

    name: str
    kind: str
    tokens: int
    special: int  # how many of the tokens are special
    normalizer: str
    bos: str | None
    eos: str | None
    pad: str | None
    adds: str  # what it puts around a text by itself
    padding_side: str


@dataclass(frozen=True)
class ImageFacts:
    """tokens: image size -> tokens of one such image after expansion, None where it is refused."""

    processor: str
    image_processor: str
    token: str
    tokens: dict[str, int | None]


@dataclass(frozen=True)
class Facts:
    """All that was found about one side; what could not be found is None.

    max_length: tokens a record may have on this side, None without a limit.
    end_of_turn: the special token an answer ends with.
    one_end: whether that token ends a document, too.
    """

    role: str
    name: str
    model: ModelFacts | None = None
    head: HeadFacts | None = None
    tokenizer: TokenizerFacts | None = None
    template: TemplateFacts | None = None
    images: ImageFacts | None = None
    end_of_turn: str | None = None
    one_end: bool | None = None
    max_length: int | None = None


def collect_facts(
    role: str, spec: ModelSpec, config: PretrainedConfig | None, model: PreTrainedModel | None,
    processor: Processor | None, adapter: ModelAdapter | None,
) -> Facts:
    """Put together what is known of one side.

    Args:
        config, model, processor, adapter: None where they cannot be had; the model may be on the
            meta device.
    """
    facts: dict[str, Any] = {"role": role, "name": spec.model_name_or_path}
    if config is not None:
        facts["model"] = _model_facts(config, model)
    if model is not None and model.get_output_embeddings() is not None:
        facts["head"] = _head_facts(model)
    if processor is not None:
        facts["tokenizer"] = _tokenizer_facts(getattr(processor, "tokenizer", processor))
        facts["template"] = template_facts(spec, processor, adapter)
        facts["images"] = _image_facts(processor, adapter)
    if adapter is not None:
        facts["max_length"], end = adapter.max_length, adapter.end_of_turn_id
        if end is not None:
            facts["end_of_turn"] = adapter.table.strings[end]
            facts["one_end"] = end == adapter.tokenizer.eos_token_id
    return Facts(**facts)


def _model_facts(config: PretrainedConfig, model: PreTrainedModel | None) -> ModelFacts:
    name, counts = (getattr(config, "architectures", None) or [""])[0], {}
    experts, per_token = chosen_experts(config), None
    if model is not None:
        name, parts = type(model).__name__, count_parameters(model)
        counts = {part: numbers["parameters"] for part, numbers in parts.items()}
        per_token = parameters_per_token(model) if experts else None
    return ModelFacts(config.model_type, name, counts,
                      getattr(config.get_text_config(), "max_position_embeddings", None),
                      None if experts is None else "{} of {} per token".format(*experts), per_token)


def _head_facts(model: PreTrainedModel) -> HeadFacts:
    scales, softcaps = logit_settings(model.config.get_text_config())
    bias = getattr(model.get_output_embeddings(), "bias", None)
    return HeadFacts(head_rows(model), is_tied(model), bias is not None, softcaps, scales)


# ----- the tokenizer ------------------------------------------------------------------------


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> TokenizerFacts:
    added = tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
    return TokenizerFacts(
        type(tokenizer).__name__, tokenizer_kind(tokenizer), len(tokenizer.get_vocab()),
        len(special), _normalizer(tokenizer), tokenizer.bos_token, tokenizer.eos_token,
        tokenizer.pad_token, _adds(tokenizer), tokenizer.padding_side)


def tokenizer_kind(tokenizer: PreTrainedTokenizerBase) -> str:
    """How a tokenizer splits text, in words."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return "not backed by the tokenizers library"
    model, steps = type(backend.model).__name__, f"{backend.pre_tokenizer} {backend.decoder}"
    if "ByteLevel" in steps:
        return f"byte-level {model}"
    names = {"Unigram": "unigram", "WordLevel": "word-level", "WordPiece": "word pieces"}
    metaspace = "Metaspace" in steps or "▁" in f"{backend.normalizer} {backend.decoder}"
    features = ["metaspace"] * metaspace + ["byte fallback"] * bool(
        getattr(backend.model, "byte_fallback", False))
    return names.get(model, model) + (f" with {' and '.join(features)}" if features else "")


def _normalizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """What is done to a text before it is split; "none" keeps every byte."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is None:
        return "none"
    state = json.loads(backend.normalizer.__getstate__())
    steps = state["normalizers"] if state["type"] == "Sequence" else [state]
    return ", ".join(map(_step, steps)) or "none"


def _step(step: dict[str, Any]) -> str:
    if step["type"] == "Replace":
        return f"{next(iter(step['pattern'].values()))!r} becomes {step['content']!r}"
    return f"{step['prepend']!r} in front" if step["type"] == "Prepend" else step["type"]


def _adds(tokenizer: PreTrainedTokenizerBase) -> str:
    """Special tokens that the tokenizer puts around a text of its own accord."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(ids)) if ids[i : i + len(bare)] == bare), 0)
    around = {"in front": ids[:start], "behind": ids[start + len(bare):]}
    return ", ".join(f"{' '.join(tokenizer.convert_ids_to_tokens(extra))} {where}"
                     for where, extra in around.items() if extra) or "nothing"


# ----- images -------------------------------------------------------------------------------


def _image_facts(processor: Processor, adapter: ModelAdapter | None) -> ImageFacts | None:
    if not hasattr(processor, "image_processor"):
        return None
    token = getattr(processor, "image_token", None)
    counts = {f"{width}x{height}": None if adapter is None else count_image_tokens(
        adapter, width, height) for width, height in SIZES}
    return ImageFacts(type(processor).__name__, type(processor.image_processor).__name__,
                      str(token or ""), counts)


def count_image_tokens(adapter: ModelAdapter, width: int, height: int) -> int | None:
    """Tokens that a blank image of this size (in pixels) becomes; None where it is refused."""
    row = probe_image(adapter, width, height)
    return None if row is None else image_tokens(row)


def image_tokens(row: EncodedRow) -> int:
    """Tokens of all images of a row."""
    return sum(start <= a < end for start, end in row.images for a, _ in row.byte_spans)
