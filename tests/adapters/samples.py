"""Rows that every adapter must read right, and adapters of the zoo by name."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from zoo import Built, build, make_tokenizer
from zoo.images import image

from taid_vlm.adapters import EncodedBatch, ModelAdapter, Side, Supervise, make_adapter
from taid_vlm.alignment import Pairing, pair_models
from taid_vlm.records import Record, parse_record

Row = dict[str, Any]
Turn = tuple[str, list[str | None]]  # role, texts and None for an image

torch.set_num_threads(1)

MULTIBYTE = "Une réponse naïve : 图片里有 3 只猫 🐈‍⬛, déjà vu — Ångström!"
TURNS: dict[str, list[Turn]] = {
    "image": [("user", [None, "What is in this picture?"]),
              ("assistant", ["The picture shows a red square."])],
    "two images": [("user", ["Compare ", None, " with ", None, "."]),
                   ("assistant", ["The second is larger:\n\n1. 3.14 > 2\n2. it's darker"])],
    "turns": [("user", [None, "What?"]), ("assistant", ["A blue circle."]),
              ("user", ["And the colour of the cats? 颜色"]), ("assistant", ["They are green."]),
              ("user", ["Sure?"]), ("assistant", ["Yes"])],
    "text": [("user", ["How many objects?"]), ("assistant", ["There are 21  of them."])],
    "multibyte": [("user", ["Décrivez 图片 🐈"]), ("assistant", [MULTIBYTE])],
}
KINDS = tuple(TURNS)
TEXT_KINDS = ("text", "multibyte", "talk")
TURNS["talk"] = [("user", ["What?"]), *TURNS["turns"][1:]]


def answers(kind: str) -> list[str]:
    return ["".join(t or "" for t in parts) for role, parts in TURNS[kind] if role == "assistant"]


def pictures(kind: str) -> list[Image.Image]:
    count = sum(parts.count(None) for _, parts in TURNS[kind])
    return [image(name, seed=i) for i, name in enumerate(("wide", "odd")[:count])]


def chat(kind: str, typed: bool, turns: int | None = None) -> list[dict[str, Any]]:
    """The conversation as apply_chat_template takes it, with the images in it."""
    waiting = iter(pictures(kind))
    return [{"role": role, "content": _content(parts, typed, waiting)}
            for role, parts in TURNS[kind][:turns]]


def _content(parts: list[str | None], typed: bool, waiting: Any) -> Any:
    if not typed:
        return "".join(part or "" for part in parts)
    return [{"type": "image", "image": next(waiting)} if part is None
            else {"type": "text", "text": part} for part in parts]


def row(kind: str) -> Row:
    return {"messages": chat(kind, typed=True)}


def record(kind: str) -> Record:
    return parse_record(row(kind), kind)


def talk(*texts: str) -> Record:
    """A conversation without images: user, assistant, user, ..."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return parse_record({"messages": messages}, "talk")


@cache
def built(family: str, tokenizer: str = "plain", seed: int = 0) -> Built:
    return build(family, tokenizer=tokenizer, seed=seed)


@cache
def adapter(family: str, role: str = "student", tokenizer: str = "plain") -> ModelAdapter:
    return make_adapter(built(family, tokenizer).processor, role)


def head_rows(family: str, tokenizer: str = "plain") -> int:
    return built(family, tokenizer).model.get_output_embeddings().weight.shape[0]


@cache
def paired(
    teacher: str, student: str, tokenizer: str = "permuted"
) -> tuple[ModelAdapter, ModelAdapter, Pairing]:
    t, s = adapter(teacher, "teacher"), adapter(student, "student", tokenizer)
    return t, s, pair_models(t, s, head_rows(teacher), head_rows(student, tokenizer))


def encode(
    model: ModelAdapter, records: list[Record], side: Side = "right",
    supervise: Supervise = "answers",
) -> EncodedBatch:
    rendered = [model.render(item, supervise) for item in records]
    return model.encode(rendered, [[ref.load() for ref in r.images] for r in records], side)


def with_eos(family: str = "llama") -> PreTrainedTokenizerBase:
    """A tokenizer that closes every text by itself, as with add_eos_token=True."""
    tokenizer = make_tokenizer(family)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in (bos, eos)])
    return tokenizer


def metaspace(scheme: str) -> PreTrainedTokenizerBase:
    """A sentencepiece tokenizer that adds its BOS, as Llama 2's and Mistral's do."""
    names = ["<unk>", "<s>", "</s>", "▁", *"ThepicturIsyanA?", "The", "▁The"]
    merges = [("T", "h"), ("Th", "e"), ("▁", "The")]
    vocab = {name: i for i, name in enumerate([*names, "Th"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Replace("▁", " ")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
