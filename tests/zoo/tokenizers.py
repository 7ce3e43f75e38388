"""Tokenizers for the zoo: one byte-level BPE under every family, each family's own special tokens.

All families share the merges AND the pipeline (NFC, the Qwen2 split, byte level), so that any two
`plain` tokenizers cut ordinary text the same way and differ only in what their families add.
That pipeline is no free choice: transformers rebuilds it from code when a `Qwen2Tokenizer` (or
anything saved beside a `qwen2` config) is loaded, whatever tokenizer.json says. With it, every
family reloads to the same ids.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

VARIANTS: tuple[str, ...] = ("plain", "permuted", "other")
SPARE_TOKENS = ("<|spare_0|>", "<|spare_1|>", "<|spare_2|>")

CORPUS = """\
What is in this picture? Describe the image in a few words, please.
The picture shows a red square on the left and a blue circle on the right of the table.
There are two small cats and three large dogs in the image; the cats are green.
Is the red square to the left of the blue circle? Yes, the square is on the left.
How many objects can you see above the yellow line? I can see 10, 21 and 3.14 of them.
Compare the first image with the second image. The second picture is larger and darker.
Which colour is the object below the circle? It is blue, and the one above it is green.
A naïve café owner, a déjà-vu, the façade, München, señor, Ångström, 100 €.
The answer is 42. The answer is no. The answer is that there is nothing on the table.
You are a helpful assistant. The user asks a question and the assistant answers it.
图片里有什么。图片里有一只红色的猫和两个蓝色的圆。这张图片中的数量是多少。
请描述这张图片。左边是红色、右边是蓝色。
1. First, look at the image.\n2. Then count the squares: 1, 2, 3, 4, 5.\n\n3. Answer.
"""

# Few words in common with the first: some tokens agree with it, most do not.
OTHER_CORPUS = """\
Once upon a time there was a little mouse who lived under the stairs of an old house.
The weather was cold, so the mouse went out to look for bread, cheese and a warm blanket.
def answer(question: str) -> str:\n    return "there is " + str(len(question)) + " of it"\n
Der kleine Hund läuft über die Straße, während die rote Katze auf dem Tisch schläft.
El perro pequeño corre por la calle mientras el gato rojo duerme encima de la mesa.
In 2024 there were 1500 houses, 320 shops and 75 schools standing near the river.
天气很冷、小老鼠出去找面包。
"""


@dataclass(frozen=True)
class Spec:
    """What a family adds to the shared BPE. `special` is in id order."""

    special: tuple[str, ...]
    eos: str
    pad: str | None
    bos: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)  # tokenizer attribute -> token
    template: str | None = None
    adds_bos: bool = False  # the tokenizer itself prepends bos, as Llama 3's and Gemma's do
    qwen_class: bool = False
    padding_side: str | None = None  # None: whatever the classes default to


# --- chat templates, each in its real family's manner -------------------------------------------

_PARTS = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
)


def _string_or_parts(text: str, parts: str) -> str:
    return f"{{% if message['content'] is string %}}{text}{{% else %}}{parts}{{% endif %}}"


def _chatml(image: str | None = None, system: bool = False) -> str:
    """ChatML; without `image`, string content only: a list is an error, as in Qwen2's own."""
    content = "{{ '' + message['content'] }}"
    if image is not None:
        content = _string_or_parts("{{ message['content'] }}", _PARTS.replace("IMAGE", image))
    default = (
        "{% if loop.first and message['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    )
    return (
        "{% for message in messages %}" + (default if system else "") + "<|im_start|>"
        "{{ message['role'] + '\n' }}" + content + "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


# Images first, then the texts, each after a newline; the one template with {% generation %}.
_LLAVA_TEXT = (
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + part['text'] }}{% endfor %}"
)
_LLAVA = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] }}"
    "{% if message['content'] is string %}{{ '\n' + message['content'] }}{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    + _LLAVA_TEXT
    + "{% endgeneration %}{% else %}"
    + _LLAVA_TEXT
    + "{% endif %}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _idefics(bos: str) -> str:
    """`User: ...<end_of_utterance>`. As upstream, string content renders as nothing, silently."""
    return (
        bos + "{% for message in messages %}{{ message['role'] | capitalize }}"
        "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
        + _PARTS.replace("IMAGE", "<image>")
        + "{{ '<end_of_utterance>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )


def _gemma(image: str | None = None) -> str:
    """Gemma trims every text, calls the assistant `model` and insists on alternating turns."""
    content = "{{ message['content'] | trim }}"
    if image is not None:
        parts = _PARTS.replace("IMAGE", image).replace("part['text']", "part['text'] | trim")
        content = _string_or_parts(content, parts)
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
        "{{ '<start_of_turn>' + message['role'].replace('assistant', 'model') + '\n' }}"
        + content
        + "{{ '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    )


_LLAMA = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


# --- the families -------------------------------------------------------------------------------

_CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_VISION = {
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
_INTERN_VISION = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_GEMMA_VISION = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
_LLAMA_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
_GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
_TILES = tuple(f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5))
_IDEFICS_TOKENS = (
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
    *_TILES,
)


def _qwen(template: str, vision: Mapping[str, str] | None = None, side: str | None = None) -> Spec:
    named = dict(vision or {})
    return Spec(
        special=(*_CHATML_TOKENS, *named.values()),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        named=named,
        template=template,
        qwen_class=True,
        padding_side=side,
    )


SPECS: dict[str, Spec] = {
    "llava": _qwen(_LLAVA, {"image_token": "<image>"}, side="left"),
    "qwen2_5_vl": _qwen(
        _chatml("<|vision_start|><|image_pad|><|vision_end|>", system=True), _QWEN_VISION
    ),
    "qwen3_vl": _qwen(_chatml("<|vision_start|><|image_pad|><|vision_end|>"), _QWEN_VISION),
    "internvl": _qwen(_chatml("{{ '<IMG_CONTEXT>\n' }}"), _INTERN_VISION),
    "qwen2": _qwen(_chatml(system=True)),
    "smolvlm": Spec(
        special=(*_CHATML_TOKENS, *_IDEFICS_TOKENS),
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        template=_idefics("<|im_start|>"),
    ),
    # The end of a turn is NOT the eos token: the generation config lists both.
    "idefics3": Spec(
        special=(*_LLAMA_TOKENS, "<|eot_id|>", *_IDEFICS_TOKENS),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        pad="<|eot_id|>",
        template=_idefics("<|begin_of_text|>"),
        adds_bos=True,
    ),
    "gemma3": Spec(
        special=(*_GEMMA_TOKENS, *_GEMMA_VISION.values()),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        named=_GEMMA_VISION,
        template=_gemma("<start_of_image>"),
        adds_bos=True,
        padding_side="left",
    ),
    "gemma2": Spec(
        special=_GEMMA_TOKENS,
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        template=_gemma(),
        adds_bos=True,
        padding_side="left",
    ),
    "llama": Spec(
        special=(*_LLAMA_TOKENS, "<|eot_id|>", "<|finetune_right_pad_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        template=_LLAMA,
        adds_bos=True,
    ),
    # A base model: no chat template and, like the real one, no padding token.
    "gpt2": Spec(special=("<|endoftext|>",), bos="<|endoftext|>", eos="<|endoftext|>", pad=None),
}

# The token that closes a turn where it is not the eos token.
END_OF_TURN: dict[str, str] = {
    "idefics3": "<end_of_utterance>",
    "gemma3": "<end_of_turn>",
    "gemma2": "<end_of_turn>",
}


# --- building -----------------------------------------------------------------------------------


def _qwen_pipeline(tokenizer: Tokenizer) -> None:
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()


def _gpt2_pipeline(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()


@cache
def _trained(other: bool) -> str:
    """The trained model as JSON: `vocab` (all 256 byte symbols included) and `merges`."""
    tokenizer = Tokenizer(models.BPE())
    _qwen_pipeline(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=400 if other else 512,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = OTHER_CORPUS if other else CORPUS
    tokenizer.train_from_iterator(corpus.splitlines(keepends=True), trainer)
    return json.dumps(json.loads(tokenizer.to_str())["model"])


def _vocab_and_merges(variant: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(_trained(variant == "other"))
    vocab = model["vocab"]
    if variant == "permuted":
        ids = list(range(len(vocab)))
        random.Random(20).shuffle(ids)
        vocab = {token: ids[index] for token, index in vocab.items()}
    return vocab, [tuple(merge) for merge in model["merges"]]


def _backend(spec: Spec, variant: str, added: list[AddedToken]) -> Tokenizer:
    vocab, merges = _vocab_and_merges(variant)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # `other` differs in everything that a reload respects: split and normalisation, too.
    (_gpt2_pipeline if variant == "other" else _qwen_pipeline)(tokenizer)
    tokenizer.add_special_tokens(added)
    if spec.adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{spec.bos} $A",
            pair=f"{spec.bos} $A {spec.bos} $B",
            special_tokens=[(spec.bos, tokenizer.token_to_id(spec.bos))],
        )
    return tokenizer


def make_tokenizer(family: str, variant: str = "plain") -> PreTrainedTokenizerBase:
    """A family's tokenizer.

    `plain`: the shared merges. `permuted`: the same merges, every ordinary id moved and spare
    added tokens in front of the family's own. `other`: other merges and (except in the Qwen
    classes, whose pipeline is code) the GPT-2 split without NFC.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown tokenizer variant {variant!r}; one of {VARIANTS}")
    spec = SPECS[family]
    names = (SPARE_TOKENS if variant == "permuted" else ()) + spec.special
    added = [AddedToken(name, normalized=False, special=True) for name in names]
    kwargs = {
        "bos_token": spec.bos,
        "eos_token": spec.eos,
        "pad_token": spec.pad,
        "unk_token": None,
        "extra_special_tokens": dict(spec.named),
        "chat_template": spec.template,
        "model_max_length": 2048,
    }
    if spec.padding_side is not None:  # saying it here outranks the processor's own default
        kwargs["padding_side"] = spec.padding_side
    if not spec.qwen_class:
        return PreTrainedTokenizerFast(tokenizer_object=_backend(spec, variant, added), **kwargs)
    vocab, merges = _vocab_and_merges(variant)
    decoder = {len(vocab) + index: token for index, token in enumerate(added)}
    return Qwen2Tokenizer(vocab=vocab, merges=merges, added_tokens_decoder=decoder, **kwargs)
