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
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from .specs import SPECS, Spec

VARIANTS: tuple[str, ...] = ("plain", "permuted", "other", "metaspace", "unigram")
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
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


def _sentencepiece_pipeline(tokenizer: Tokenizer, scheme: str) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )


@cache
def _metaspace_model() -> models.BPE:
    """Characters, not bytes, are merged, as in Llama 2; a newline has no piece but its byte."""
    tokenizer = Tokenizer(models.BPE())
    _sentencepiece_pipeline(tokenizer, "first")
    trainer = trainers.BpeTrainer(
        vocab_size=768, special_tokens=["<unk>", *BYTE_TOKENS], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    found = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in found["merges"]]
    return models.BPE(
        vocab=found["vocab"], merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )


@cache
def _unigram_model() -> models.Unigram:
    """The most probable pieces win, not merges; bytes are the last resort."""
    tokenizer = Tokenizer(models.Unigram())
    _sentencepiece_pipeline(tokenizer, "always")
    trainer = trainers.UnigramTrainer(
        vocab_size=512, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    unknown, *pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    # threads add the scores up in any order: rounded, and sorted by hand, they are always the same
    scored = sorted(((piece, round(score, 2)) for piece, score in pieces), key=_by_score)
    vocab = [tuple(unknown), *((name, -20.0) for name in BYTE_TOKENS), *scored]
    return models.Unigram(vocab, 0, byte_fallback=True)


def _by_score(scored: tuple[str, float]) -> tuple[float, str]:
    return -scored[1], scored[0]


def _core(variant: str) -> Tokenizer:
    """Model and pipeline of a variant, without the family's own tokens."""
    if variant == "metaspace":
        tokenizer = Tokenizer(_metaspace_model())
        _sentencepiece_pipeline(tokenizer, "first")
    elif variant == "unigram":
        tokenizer = Tokenizer(_unigram_model())
        _sentencepiece_pipeline(tokenizer, "always")
    else:
        vocab, merges = _vocab_and_merges(variant)
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        # `other` differs in everything that a reload respects: split and normalisation, too.
        (_gpt2_pipeline if variant == "other" else _qwen_pipeline)(tokenizer)
    return tokenizer


def _backend(spec: Spec, variant: str, added: list[AddedToken]) -> Tokenizer:
    tokenizer = _core(variant)
    tokenizer.add_tokens(added)
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
    classes, whose pipeline is code) the GPT-2 split without NFC. `metaspace`: characters merged as
    by Llama 2, and `unigram`: pieces chosen as by T5, both with "▁" for a space and bytes for what
    has no piece; Qwen's class cannot hold them, so they are generic fast tokenizers there, too.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown tokenizer variant {variant!r}; one of {VARIANTS}")
    spec, sentencepiece = SPECS[family], variant in ("metaspace", "unigram")
    names = (SPARE_TOKENS if variant == "permuted" else ()) + spec.special
    added = [
        AddedToken(name, normalized=False, special=True, rstrip=name in spec.rstrip)
        for name in names
    ]
    added += [AddedToken(name, normalized=False) for name in spec.added]
    kwargs = {
        "bos_token": spec.bos,
        "eos_token": spec.eos,
        "pad_token": spec.pad,
        "unk_token": "<unk>" if sentencepiece else None,
        "extra_special_tokens": dict(spec.named),
        "chat_template": spec.template,
        "model_max_length": 2048,
    }
    if spec.padding_side is not None:  # saying it here outranks the processor's own default
        kwargs["padding_side"] = spec.padding_side
    if sentencepiece or spec.qwen_class is None:
        return PreTrainedTokenizerFast(tokenizer_object=_backend(spec, variant, added), **kwargs)
    vocab, merges = _vocab_and_merges(variant)
    decoder = {len(vocab) + index: token for index, token in enumerate(added)}
    return spec.qwen_class(vocab=vocab, merges=merges, added_tokens_decoder=decoder, **kwargs)
