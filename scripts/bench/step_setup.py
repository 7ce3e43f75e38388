"""What every trainer is given: a pair of models with their tokenizers or processors, and rows.

Built-in pairs are made from the families' own config classes, with random weights whose logits are
about as peaked as a language model's, and with the demo's tokenizer made as long as a real one.
Their heads are not tied to the embeddings: with random weights a tied head repeats its input, and
any two models agree.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from bench.problem import LOGIT_SPREAD
from bench.step_rows import make_rows, tokenizer_of
from taid_vlm.config.model import ModelSpec
from taid_vlm.demo.demo import data_folder
from taid_vlm.models.loading import load_model, load_processor

KINDS, ROLES = ("text", "vlm"), ("student", "teacher")
DTYPES = ("float32", "bfloat16", "mixed")
SEEDS = {"student": 0, "teacher": 1}


@dataclass(frozen=True)
class Size:
    """A decoder, and the tower in front of it where there are images."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    tower_hidden: int = 64
    tower_layers: int = 2


@dataclass(frozen=True)
class Scale:
    """A built-in pair.

    image_side, patch: pixels; an image has (image_side / patch) ** 2 tokens.
    """

    vocab: int
    student: Size
    teacher: Size
    sequence_length: int
    image_side: int = 64
    patch: int = 8


SCALES = {
    "tiny": Scale(1024, Size(32, 2, 4, 2, 64), Size(48, 2, 4, 2, 96), 96),
    "small": Scale(151_936, Size(256, 4, 4, 2, 1024), Size(512, 6, 8, 2, 2048), 256),
    "short": Scale(32_000, Size(256, 4, 4, 2, 1024), Size(512, 6, 8, 2, 2048), 256, 224, 14),
    # the shapes of Qwen2.5 0.5B and 1.5B, towers of SigLIP base and large
    "medium": Scale(151_936, Size(896, 24, 14, 2, 4864, 768, 12),
                    Size(1536, 28, 12, 2, 8960, 1024, 24), 1024, 336, 14),
    # the shapes of Qwen2.5 0.5B and 7B
    "gpu": Scale(151_936, Size(896, 24, 14, 2, 4864, 768, 12),
                 Size(3584, 28, 28, 4, 18944, 1024, 24), 1024, 336, 14),
}


@dataclass(frozen=True)
class Setup:
    """One problem; everything in it can be sent to another process.

    student, teacher: folders or names to load, both or none; None is the pair of `scale`.
    layers: at most so many in a built-in decoder; vocab: its rows, in place of its scale's.
    images: in every row of a VLM's.
    lora: rank of an adapter of all linear layers, which is trained in place of the student.
    dtype: of both models; "mixed" is a float32 student and a bfloat16 teacher under autocast.
    batch_size: rows of a micro-batch, `accumulation` of which make an optimizer step.
    sequence_length: tokens of the longest row, about; answer_fraction: of its tokens.
    """

    kind: str = "text"
    scale: str = "tiny"
    student: str | None = None
    teacher: str | None = None
    layers: int | None = None
    vocab: int | None = None
    images: int = 1
    objective: str = "forward_kl"
    dtype: str = "float32"
    device: str = "cpu"
    batch_size: int = 4
    accumulation: int = 1
    sequence_length: int = 96
    answer_fraction: float = 0.25
    learning_rate: float = 1e-5
    threads: int | None = None
    lora: int | None = None

    @property
    def rows(self) -> int:
        """Of an optimizer step."""
        return self.batch_size * self.accumulation

    @property
    def size(self) -> Scale:
        """Of the built-in pair."""
        scale = SCALES[self.scale]
        return scale if self.vocab is None else replace(scale, vocab=self.vocab)

    def weights_dtype(self, role: str) -> torch.dtype:
        half = self.dtype == "bfloat16" or (self.dtype == "mixed" and role == "teacher")
        return torch.bfloat16 if half else torch.float32

    def described(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Pair:
    """Models and processors by role, and the rows of one optimizer step."""

    models: dict[str, PreTrainedModel]
    processors: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def weights_bytes(self) -> int:
        return sum(p.nbytes for model in self.models.values() for p in model.parameters())


def make_pair(setup: Setup, roles: tuple[str, ...] = ROLES) -> Pair:
    """Models, processors and rows; the same numbers in every process."""
    if setup.student is None:
        processors = dict.fromkeys(ROLES, make_processor(setup))
    else:
        processors = {role: load_processor(_spec(setup, role), role) for role in ROLES}
    images = setup.images if setup.kind == "vlm" else 0
    rows = make_rows(processors["student"], setup.rows, setup.sequence_length,
                     setup.answer_fraction, images * (SCALES[setup.scale].image_side,))
    return Pair({role: _model(setup, role, processors[role]) for role in roles},
                {role: deepcopy(processors[role]) for role in ROLES}, rows)


# ----- models -------------------------------------------------------------------------------


def _spec(setup: Setup, role: str) -> ModelSpec:
    return ModelSpec(model_name_or_path=getattr(setup, role))


def _model(setup: Setup, role: str, processor: Any) -> PreTrainedModel:
    if setup.student is not None:
        model = load_model(_spec(setup, role), role)
    else:
        model = _built_in(setup, role, processor)
    model = model.to(setup.weights_dtype(role))
    return _with_lora(model, setup.lora) if setup.lora and role == "student" else model


def _built_in(setup: Setup, role: str, processor: Any) -> PreTrainedModel:
    """Made where it is used: a large one's random numbers take a CPU minutes."""
    torch.manual_seed(SEEDS[role])
    scale = setup.size
    size = getattr(scale, role)
    text = _text_config(setup, scale, size, tokenizer_of(processor))
    with torch.device(setup.device):
        if setup.kind == "text":
            model = Qwen2ForCausalLM(text)
        else:
            model = LlavaForConditionalGeneration(_llava_config(scale, size, text, processor))
        head = model.get_output_embeddings().weight
        nn.init.normal_(head, std=LOGIT_SPREAD / size.hidden**0.5)
    return model


def _with_lora(model: PreTrainedModel, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))


def _text_config(setup: Setup, scale: Scale, size: Size, tokenizer: Any) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=scale.vocab, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=min(size.layers, setup.layers or size.layers),
        num_attention_heads=size.heads, num_key_value_heads=size.key_value_heads,
        max_position_embeddings=32_768, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def _llava_config(scale: Scale, size: Size, text: Qwen2Config, processor: Any) -> LlavaConfig:
    tower = SiglipVisionConfig(
        hidden_size=size.tower_hidden, intermediate_size=4 * size.tower_hidden,
        num_hidden_layers=size.tower_layers, num_attention_heads=max(1, size.tower_hidden // 64),
        image_size=scale.image_side, patch_size=scale.patch, vision_use_head=False)
    return LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=processor.image_token_id,
        image_seq_length=(scale.image_side // scale.patch) ** 2,
        vision_feature_select_strategy="full", vision_feature_layer=-1,
        tie_word_embeddings=False)


# ----- tokenizers ---------------------------------------------------------------------------


def make_processor(setup: Setup) -> Any:
    """The demo's own, with as many tokens as the head has rows, so that all of them are shared."""
    scale, models = setup.size, data_folder() / "models"
    if setup.kind == "text":
        return lengthened(AutoTokenizer.from_pretrained(models / "words-teacher"), scale.vocab)
    own = AutoProcessor.from_pretrained(models / "scenes-teacher")
    side = {"height": scale.image_side, "width": scale.image_side}
    pixels = SiglipImageProcessor(size=side, image_mean=own.image_processor.image_mean,
                                  image_std=own.image_processor.image_std)
    return LlavaProcessor(
        pixels, lengthened(own.tokenizer, scale.vocab), patch_size=scale.patch,
        vision_feature_select_strategy="full", chat_template=own.chat_template)


def lengthened(tokenizer: Any, rows: int) -> PreTrainedTokenizerFast:
    """The same tokenizer with further tokens that no text gives, `rows` in all."""
    plain = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = plain["model"]["vocab"]
    first = len(tokenizer)
    vocabulary |= {f"~{index}~": index for index in range(first, rows)}
    image = {name: getattr(tokenizer, name) for name in ("image_token",)
             if hasattr(tokenizer, name)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)), eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token, chat_template=tokenizer.chat_template,
        extra_special_tokens=image)
