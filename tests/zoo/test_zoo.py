"""Smoke tests of the zoo itself: what every other test takes for granted about its models."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from . import (
    CORE_FAMILIES,
    TEXT_FAMILIES,
    VLM_FAMILIES,
    Built,
    build,
    make_tokenizer,
    save,
)
from .images import image
from .specs import SPECS
from .tokenizers import VARIANTS

FAMILIES = VLM_FAMILIES + TEXT_FAMILIES
# Not with their processors alone: PaliGemma's has no template and refuses texts without an image,
# PerceptionLM's cannot stack images of unequal numbers of tiles.
NEED_AN_ADAPTER = ("paligemma", "perception_lm")
BY_PROCESSOR = tuple(family for family in FAMILIES if family not in NEED_AN_ADAPTER)
# AutoTokenizer rebuilds the byte-level pipeline from code beside these models' configs, whatever
# tokenizer.json says: a sentencepiece tokenizer saved there comes back with other ids.
REBUILT = {(family, variant) for family in ("qwen2", "qwen3_5")
           for variant in ("metaspace", "unigram")}
# The generation prompt is no prefix of the whole: a space after the role, an empty thought.
OTHER_PROMPT = ("llava_onevision", "gemma4", "gemma4_text")
ANSWER = "A red square, 21 naïve cats 图片."
PROBES = (
    "What is in this picture? Describe it, please.",
    "naïve café 100 € 图片里有什么。 \t 3.14\n\n  two   spaces it's",
    "emoji 🐈 and an unseen word: xylophone\r\n",
)


@cache
def built(family: str) -> Built:
    torch.set_num_threads(1)
    return build(family)


def user(text: str, images: int = 0) -> dict[str, Any]:
    parts = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return {"role": "user", "content": parts}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


# One image; no image and two turns; two images.
CONVERSATIONS = (
    [user("What is in this picture?", images=1), assistant(ANSWER)],
    [user("And?"), assistant("It is blue."), user("Is it red?"), assistant("No.")],
    [user("Compare them.", images=2), assistant("The second is larger.")],
)


def flat(conversation: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The same conversation with string content, as text templates want it."""
    return [{"role": m["role"], "content": m["content"][-1]["text"]} for m in conversation]


def vlm_inputs(model: Built, seed: int = 0, **kwargs: Any) -> dict[str, Any]:
    text = [model.processor.apply_chat_template(c, tokenize=False) for c in CONVERSATIONS]
    pictures = [image(name, seed=seed) for name in ("square", "wide", "tall")]
    out = model.processor(
        text=text,
        images=[pictures[:1], [], pictures[1:]],
        padding=True,
        return_tensors="pt",
        return_mm_token_type_ids=True,
        add_special_tokens=False,  # the template has written bos already
        **kwargs,
    )
    return dict(out)


def text_inputs(model: Built, **kwargs: Any) -> dict[str, Any]:
    tokenizer = model.tokenizer
    text = list(PROBES)
    if tokenizer.chat_template is not None:
        text = [tokenizer.apply_chat_template(flat(c), tokenize=False) for c in CONVERSATIONS]
    if tokenizer.pad_token is None:  # GPT-2, as the real one
        return dict(tokenizer(text[:1], return_tensors="pt"))
    kwargs |= {"padding": True, "return_tensors": "pt", "add_special_tokens": False}
    return dict(tokenizer(text, **kwargs))


def inputs_of(model: Built, **kwargs: Any) -> dict[str, Any]:
    return (vlm_inputs if model.family in VLM_FAMILIES else text_inputs)(model, **kwargs)


@torch.no_grad()
def logits(model: Built, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    return model.model(**inputs, **kwargs).logits


@pytest.mark.parametrize("family", BY_PROCESSOR)
def test_forward_gives_spread_finite_logits(family: str) -> None:
    model = built(family)
    inputs = inputs_of(model)
    out = logits(model, inputs)
    assert out.shape[:2] == inputs["input_ids"].shape
    assert out.shape[-1] == model.model.config.get_text_config().vocab_size
    assert out.isfinite().all() and out.dtype == torch.float32
    assert 0.3 < out.std(-1).mean() < 10.0
    assert not model.model.training


@pytest.mark.parametrize("family", [f for f in VLM_FAMILIES if f in BY_PROCESSOR])
def test_logits_depend_on_the_image(family: str) -> None:
    model = built(family)
    one, two = vlm_inputs(model), vlm_inputs(model, seed=1)
    assert torch.equal(one["input_ids"], two["input_ids"])
    change = (logits(model, one) - logits(model, two)).abs().amax(-1)
    assert change[0, -4:].min() > 1e-2  # the answer of the image row
    assert change[1].max() < 1e-4  # the text-only row


@pytest.mark.parametrize("family", BY_PROCESSOR)
def test_padding_side_does_not_change_logits(family: str) -> None:
    model = built(family)
    rows = []
    for side in ("left", "right"):
        inputs = inputs_of(model, padding_side=side)
        out = logits(model, inputs)
        rows.append([o[m.bool()] for o, m in zip(out, inputs["attention_mask"], strict=True)])
    for left, right in zip(*rows, strict=True):
        # Qwen3.5's linear attention is in float32 over chunks that padding moves
        atol = 2e-3 if family == "qwen3_5" else 1e-4
        torch.testing.assert_close(left, right, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("family", BY_PROCESSOR)
def test_a_mask_selects_logits(family: str) -> None:
    model = built(family)
    inputs = inputs_of(model)
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[:, -3:], mask[0, -7] = True, True
    part = logits(model, inputs, logits_to_keep=mask)
    torch.testing.assert_close(part, logits(model, inputs)[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", BY_PROCESSOR)
def test_reload_gives_the_same_ids_and_logits(family: str, tmp_path: Path) -> None:
    model = built(family)
    folder = save(model, tmp_path)
    vlm = family in VLM_FAMILIES
    auto = AutoModelForImageTextToText if vlm else AutoModelForCausalLM
    loader = AutoProcessor if vlm else AutoTokenizer
    again = Built(family, loader.from_pretrained(folder), auto.from_pretrained(folder).eval())
    assert type(again.processor) is type(model.processor) and type(again.model) is type(model.model)
    # some processors keep the side that they were last asked for, in other tests of the process
    old, new = (inputs_of(one, padding_side="right") for one in (model, again))
    assert old.keys() == new.keys()
    for key, value in old.items():
        assert torch.equal(value, new[key]), key
    assert torch.equal(logits(model, old), logits(again, new))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_reloads_beside_its_config(family: str, variant: str, tmp_path: Path) -> None:
    built(family).model.config.save_pretrained(tmp_path)  # AutoTokenizer looks at model_type
    tokenizer = make_tokenizer(family, variant)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    if (family, variant) in REBUILT:
        assert all(again(probe).input_ids != tokenizer(probe).input_ids for probe in PROBES)
        return
    assert again.get_vocab() == tokenizer.get_vocab()
    assert set(again.all_special_tokens) == set(tokenizer.all_special_tokens)
    special = "".join(tokenizer.get_added_vocab())
    for probe in (*PROBES, special):
        assert again(probe).input_ids == tokenizer(probe).input_ids
        assert again.decode(again(probe).input_ids) == tokenizer.decode(tokenizer(probe).input_ids)


def pieces(family: str, variant: str) -> list[list[str]]:
    tokenizer = make_tokenizer(family, variant)
    ids = [tokenizer(probe, add_special_tokens=False).input_ids for probe in PROBES]
    return [tokenizer.convert_ids_to_tokens(row) for row in ids]


def test_plain_and_permuted_cut_alike_everywhere_and_other_does_not() -> None:
    reference = pieces("qwen3_vl", "plain")
    for family in FAMILIES:
        assert pieces(family, "plain") == reference
        assert pieces(family, "permuted") == reference
        assert pieces(family, "other") != reference


def test_permuted_moves_the_ids() -> None:
    plain, permuted = make_tokenizer("qwen2").get_vocab(), make_tokenizer("qwen2", "permuted")
    moved = [token for token, index in permuted.get_vocab().items() if plain.get(token) != index]
    assert len(moved) > 0.95 * len(plain) and len(permuted) > len(plain)


def test_image_token_counts_differ_between_families() -> None:
    counts = {}
    for family in CORE_FAMILIES:
        kinds = vlm_inputs(built(family))
        kinds = kinds.get("mm_token_type_ids", kinds.get("token_type_ids"))
        counts[family] = tuple((kinds != 0).sum(-1).tolist())
    assert len(set(counts.values())) == len(counts), counts
    assert all(row[1] == 0 and row[0] > 0 and row[2] > 0 for row in counts.values())


@pytest.mark.parametrize("family", [f for f in FAMILIES if SPECS[f].template is not None])
def test_template_keeps_the_answers_and_opens_a_turn(family: str) -> None:
    processor = built(family).processor
    for conversation in CONVERSATIONS:
        messages = conversation if family in VLM_FAMILIES else flat(conversation)
        full = processor.apply_chat_template(messages, tokenize=False)
        prompt = processor.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        assert full.count(conversation[-1]["content"][0]["text"]) == 1
        assert full.startswith(prompt) != (family in OTHER_PROMPT)


@pytest.mark.parametrize("family", [f for f in FAMILIES if SPECS[f].adds_bos])
def test_bos_comes_twice_unless_asked_not_to(family: str) -> None:
    tokenizer = built(family).tokenizer
    prompt = tokenizer.bos_token + "Hello"  # what their templates' output begins with
    twice, once = tokenizer(prompt), tokenizer(prompt, add_special_tokens=False)
    assert twice.input_ids.count(tokenizer.bos_token_id) == 2
    assert once.input_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_tied_and_padded_rows(family: str, tied: bool) -> None:
    model = build(family, padded_rows=5, tied=tied)
    head = model.model.get_output_embeddings().weight
    assert head.shape[0] == len(model.tokenizer) + 5
    assert (head is model.model.get_input_embeddings().weight) is tied


def test_the_seed_alone_decides() -> None:
    def weights(seed: int) -> torch.Tensor:
        return build("llama", seed=seed).model.get_output_embeddings().weight

    state = torch.get_rng_state()
    assert torch.equal(weights(3), weights(3)) and not torch.equal(weights(3), weights(4))
    assert torch.equal(state, torch.get_rng_state())


def test_thoughts_are_kept_in_the_last_answer_alone() -> None:
    tokenizer = built("qwen3").tokenizer
    said = ["<think>\nA hat?\n</think>\n\nNo.", "<think>\nTwo.\n</think>\n\nYes."]
    turns = [{"role": role, "content": text} for role, text in zip(
        ("user", "assistant") * 2, ("Is it?", said[0], "And now?", said[1]), strict=True)]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert "A hat?" not in text and "assistant\nNo." in text and text.count("<think>") == 1
    assert text.endswith("assistant\n" + said[1] + "<|im_end|>\n")
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("assistant\n")
    for family, asked in (("qwen3", False), ("qwen3_5", False), ("qwen3_5", None)):
        end = "<think>\n\n</think>\n\n" if asked is False else "<think>\n"
        options = {} if asked is None else {"enable_thinking": asked}
        prompt = built(family).processor.apply_chat_template(
            [{"role": "user", "content": "Is it?"}], tokenize=False, add_generation_prompt=True,
            **options)
        assert prompt.endswith("assistant\n" + end)


def test_phi3s_marks_swallow_the_newline_behind_them() -> None:
    tokenizer = built("phi3").tokenizer
    ids = tokenizer("<|assistant|>\nYes<|end|>\n", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "<|assistant|>Yes<|end|>"
