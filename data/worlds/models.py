"""The four small models of the demo, built from configs, with their families' own processors.

Teacher and student of a world share the merges of one byte-level BPE but nothing else: special
tokens, token ids, the number of padded rows, chat templates and model families all differ, as
they do between the models people distil.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from worlds import scenes, words

Processor: TypeAlias = ProcessorMixin | PreTrainedTokenizerFast

MAX_VOCABULARY = 512  # the worlds' words run out a little earlier: each of them is one token
IMAGE_SIZE = {"height": scenes.SIDE, "width": scenes.SIDE}
SHUFFLED_TOKENS = (scenes.SIDE // scenes.PATCH // 2) ** 2
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
# The usual 0.02 stalls models this small: from scratch they start to learn only at these. Towers
# whose position embeddings start at the families' 0 or 0.1 see what is there, but never where.
DECODER_STD, EMBEDDING_STD = 0.08, 0.5


# ---------------------------------------------------------------- tokenizers


@dataclass(frozen=True)
class Dialect:
    """A family's special tokens, where they sit among the ids, and how a turn is written."""

    pad: str
    user: str
    assistant: str
    end: str  # closes an answer; the tokenizer's eos_token
    first: bool  # special tokens before the ordinary ones, or after them
    rows: int  # embedding rows are padded to a multiple of this (1: not padded)
    image: str = ""  # what the template prints for an image
    markup: dict[str, str] = field(default_factory=dict)  # tokenizer attribute -> special token

    @property
    def specials(self) -> list[str]:
        """Every special token, in id order."""
        return [self.pad, self.user, self.assistant, self.end, *self.markup.values()]

    @property
    def template(self) -> str:
        """The chat template: any number of turns, content as a string or as typed parts."""
        return (
            "{%- macro text(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
            "{%- for part in content -%}{%- if part['type'] == 'image' -%}"
            f"{{{{ '{self.image}' }}}}"
            "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
            "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
            "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
            f"{{{{ '{self.user}' + text(message['content']) }}}}"
            "{%- elif message['role'] == 'assistant' -%}"
            f"{{{{ '{self.assistant}' + text(message['content']) + '{self.end}' }}}}"
            "{%- endif -%}{%- endfor -%}"
            f"{{%- if add_generation_prompt -%}}{{{{ '{self.assistant}' }}}}{{%- endif -%}}"
        )


_TEACHER = ("<pad>", "<user>", "<bot>", "</s>", True, 64)
_STUDENT = ("[PAD]", "[Q]", "[A]", "[END]", False, 1)
DIALECTS = {
    "scenes-teacher": Dialect(*_TEACHER, "<image>", {"image_token": "<image>"}),
    "scenes-student": Dialect(
        *_STUDENT,
        "<IMG_CONTEXT>",
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "words-teacher": Dialect(*_TEACHER),
    "words-student": Dialect(*_STUDENT),
}
NAMES = tuple(DIALECTS)


def _corpus(scenes_per_world: int = 3000) -> Iterator[str]:
    """Texts as they are tokenized in use: questions and answers apart, never joined."""
    rng = random.Random(0)
    for _ in range(scenes_per_world):
        shown, (telling, told) = scenes.sample(rng), words.tell(rng)
        for turn in scenes.turns(shown, rng) + words.turns(telling, told, rng):
            yield turn.question
            yield turn.answer


@lru_cache
def merges() -> tuple[list[str], list[tuple[str, str]]]:
    """The shared byte-level BPE: its tokens in id order, and its merges. Trained on both worlds."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(_corpus(), trainer)
    model = json.loads(bpe.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [tuple(pair) for pair in model["merges"]]


def build_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of one of `NAMES`: shared merges, the dialect's own ids and template."""
    dialect, (tokens, pairs) = DIALECTS[name], merges()
    order = [*dialect.specials, *tokens] if dialect.first else [*tokens, *dialect.specials]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(order)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(dialect.specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=dialect.end,
        pad_token=dialect.pad,
        extra_special_tokens=dict(dialect.markup),
        additional_special_tokens=[dialect.user, dialect.assistant],
        chat_template=dialect.template,
    )


# ---------------------------------------------------------------- models


def build(name: str, seed: int = 0) -> tuple[Processor, PreTrainedModel]:
    """The processor (in the world of words: the tokenizer) and the untrained model of `NAMES`."""
    builders = {
        "scenes-teacher": _llava,
        "scenes-student": _internvl,
        "words-teacher": _qwen3,
        "words-student": _llama,
    }
    if name not in builders:
        raise ValueError(f"no demo model is called {name!r}; there are {', '.join(NAMES)}")
    tokenizer = build_tokenizer(name)
    torch.manual_seed(seed)
    processor, model = builders[name](tokenizer, _shared(tokenizer, DIALECTS[name].rows))
    for key, weight in model.named_parameters():
        if "position_embedding" in key or weight is model.get_input_embeddings().weight:
            nn.init.normal_(weight, std=EMBEDDING_STD)
    return processor, model


def _shared(tokenizer: PreTrainedTokenizerFast, multiple: int) -> dict:
    """What every decoder's config says."""
    return {
        "vocab_size": -(-len(tokenizer) // multiple) * multiple,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "max_position_embeddings": 512,
        "initializer_range": DECODER_STD,
        "tie_word_embeddings": False,
        "num_attention_heads": 4,
    }


def _llava(tokenizer: PreTrainedTokenizerFast, shared: dict) -> tuple[Processor, PreTrainedModel]:
    """1.1 M parameters; the picture becomes 8 x 8 = 64 tokens."""
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=scenes.SIDE,
            patch_size=scenes.PATCH,
            vision_use_head=False,
        ),
        text_config=LlamaConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_key_value_heads=4,
            **shared,
        ),
        image_token_index=tokenizer.image_token_id,
        image_seq_length=(scenes.SIDE // scenes.PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return _llava_processor(tokenizer), LlavaForConditionalGeneration(config)


def _llava_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    return LlavaProcessor(
        SiglipImageProcessor(size=IMAGE_SIZE, **HALF),
        tokenizer,
        patch_size=scenes.PATCH,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )


def _internvl(
    tokenizer: PreTrainedTokenizerFast, shared: dict
) -> tuple[Processor, PreTrainedModel]:
    """0.25 M parameters; pixel shuffle turns the 8 x 8 patches into 16 tokens."""
    config = InternVLConfig(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [scenes.SIDE] * 2,
            "patch_size": [scenes.PATCH] * 2,
            "initializer_range": DECODER_STD,
            "layer_scale_init_value": 1.0,
        },
        text_config=LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_key_value_heads=2,
            **shared,
        ).to_dict(),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=SHUFFLED_TOKENS,
        tie_word_embeddings=False,
    )
    return _internvl_processor(tokenizer), InternVLForConditionalGeneration(config)


def _internvl_processor(tokenizer: PreTrainedTokenizerFast) -> InternVLProcessor:
    """One tile per image; the class insists on a video processor, which nothing here uses."""
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=IMAGE_SIZE, crop_to_patches=False, **HALF),
        tokenizer,
        InternVLVideoProcessor(size=IMAGE_SIZE, **HALF),
        image_seq_length=SHUFFLED_TOKENS,
        chat_template=tokenizer.chat_template,
    )


def _qwen3(tokenizer: PreTrainedTokenizerFast, shared: dict) -> tuple[Processor, PreTrainedModel]:
    """0.55 M parameters."""
    config = Qwen3Config(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_key_value_heads=4,
        head_dim=24,
        **shared,
    )
    return tokenizer, Qwen3ForCausalLM(config)


def _llama(tokenizer: PreTrainedTokenizerFast, shared: dict) -> tuple[Processor, PreTrainedModel]:
    """0.1 M parameters."""
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_key_value_heads=2,
        **shared,
    )
    return tokenizer, LlamaForCausalLM(config)


# ---------------------------------------------------------------- storage


def save(folder: Path, processor: Processor, model: PreTrainedModel) -> None:
    """Write a standard checkpoint: weights stored in float16, to be loaded as float32."""
    half = {key: value.half() for key, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=half)
    processor.save_pretrained(folder)
