"""Small trained tokenizers with the pipelines and the quirks of real ones.

Splits, normalisers, decoders and kinds of added tokens are those of the tokenizer.json files that
the models come with; vocabularies are trained on the zoo's two texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from .tokenizers import BYTE_TOKENS, CORPUS, OTHER_CORPUS

CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_WORD = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s")
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = _WORD % (_ENDING, _ENDING) + r"|\p{N}{1,3}" + _REST
TEKKEN = _WORD % ("", "") + r"|\p{N}" + _REST
DEEPSEEK = (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
RUNS = tuple("▁" * length for length in range(2, 17))
TRAINING = [line for text in (CORPUS, OTHER_CORPUS) for line in text.splitlines(keepends=True)]


def _split(pattern: str, removed: bool = False) -> Any:
    return pre_tokenizers.Split(
        Regex(pattern), behavior="removed" if removed else "isolated", invert=removed)


def _byte_level(
    splits: Sequence[Any], size: int, use_regex: bool = False, prefix: bool = False,
    ignore_merges: bool = False, normalizer: Any = None,
) -> Tokenizer:
    pipeline = pre_tokenizers.Sequence([
        *splits, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=use_regex)])
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pipeline
    trained.train_from_iterator(TRAINING, BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL), show_progress=False))
    vocab, merges = _model(trained)
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pipeline, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def _model(trained: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _sentencepiece(prepend: bool) -> Tokenizer:
    """Gemma, or with a "▁" in front of every text Llama 2: characters are merged, bytes are the
    last resort, and runs of "▁" are tokens."""
    parts = [normalizers.Prepend("▁")] if prepend else []
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(TRAINING, BpeTrainer(
        vocab_size=700, special_tokens=[*SPECIAL, *BYTE_TOKENS], show_progress=False))
    vocab, merges = _model(trained)
    runs = [("▁" * left, "▁" * (len(run) - left)) for run in RUNS for left in range(1, len(run))]
    for name in ("\n", "▁", *RUNS):
        vocab.setdefault(name, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, [*merges, *(run for run in runs if run not in merges)],
                                     unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if not prepend:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


def _plain(*names: str, **flags: bool) -> list[AddedToken]:
    return [AddedToken(name, **{"normalized": False, **flags}) for name in names]


@cache
def _built(name: str) -> Tokenizer:
    if name == "gemma":
        tokenizer = _sentencepiece(prepend=False)
        tokenizer.add_tokens(_plain(*RUNS, "\n", "\n\n", "\n\n\n", "<html>", "<unused0>"))
    elif name == "llama2":
        tokenizer = _sentencepiece(prepend=True)
        tokenizer.add_tokens(_plain("<html>", "price", normalized=True))
    elif name == "qwen":
        tokenizer = _byte_level([_split(PRETOKENIZE_REGEX)], 600, normalizer=normalizers.NFC())
        tokenizer.add_tokens(_plain("<think>", "</think>", "<tool_call>"))
    elif name == "llama3":
        tokenizer = _byte_level([_split(CL100K)], 700, ignore_merges=True)
    elif name == "gpt-4o":
        tokenizer = _byte_level([_split(O200K, removed=True)], 650)
    elif name == "gpt-oss":
        tokenizer = _byte_level([_split(O200K)], 800, ignore_merges=True)
    elif name == "tekken":
        tokenizer = _byte_level([_split(TEKKEN)], 750, ignore_merges=True)
    elif name == "deepseek":
        tokenizer = _byte_level(list(map(_split, DEEPSEEK)), 550,
                                normalizer=normalizers.Sequence([]))
        tokenizer.add_tokens(_plain("<｜User｜>", "<｜tool▁call▁end｜>", normalized=True))
    elif name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer = _byte_level([digits], 500, use_regex=True)
    elif name == "prefix":
        tokenizer = _byte_level([], 620, use_regex=True, prefix=True)
        tokenizer.add_tokens(_plain("  ", "    ", "        ", normalized=True))
    else:
        tokenizer = _byte_level([_split(CL100K)], 580)
        tokenizer.add_tokens([
            *_plain("Ġthe", "é", "print"), *_plain("is", "def", single_word=True),
            *_plain("over", "name", lstrip=True), *_plain("<html>", "price", rstrip=True),
            *_plain("dogs", "in", lstrip=True, rstrip=True, single_word=True),
            *_plain("return", "猫", normalized=True)])
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


LOOKALIKES = ("gemma", "llama2", "qwen", "llama3", "gpt-4o", "gpt-oss", "tekken", "deepseek",
              "smollm", "prefix", "flags")


def lookalike(name: str) -> PreTrainedTokenizerBase:
    """A small tokenizer that does what the named one does; without a template.

    `prefix`: GPT-2's split with a space put before every text (`add_prefix_space`), and runs of
    spaces added, as in code models. `flags`: added tokens of every kind, special ones aside.
    """
    if name not in LOOKALIKES:
        raise ValueError(f"unknown look-alike {name!r}; one of {LOOKALIKES}")
    copy = Tokenizer.from_str(_built(name).to_str())
    return PreTrainedTokenizerFast(tokenizer_object=copy, bos_token="<s>", eos_token="</s>",
                                   pad_token="<pad>", unk_token="<unk>")
