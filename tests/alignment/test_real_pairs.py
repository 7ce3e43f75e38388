"""Real tokenizers in pairs, where TAID_VLM_REAL names a folder of `scripts/fetch_real.py`.

    TAID_VLM_REAL=DIR pytest tests/alignment/test_real_pairs.py -s

Prints what it counted. A pair takes about 20 s of processor time, most of it for its map.
"""

from __future__ import annotations

import os
from functools import cache
from itertools import permutations
from pathlib import Path

import pytest
from alignment.texts import TEXTS, counted
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from taid_vlm.adapters import ModelAdapter, make_adapter
from taid_vlm.adapters.tokens import tile
from taid_vlm.alignment import pair_models

FOLDER = Path(os.environ.get("TAID_VLM_REAL", "/nonexistent"))
NAMES = ("qwen3", "llama3_1", "gemma3", "deepseek_v3", "gpt4o", "gptoss", "smollm2", "tekken")

pytestmark = [pytest.mark.skipif(not FOLDER.exists(), reason="TAID_VLM_REAL names no folder"),
              pytest.mark.filterwarnings("ignore")]


@cache
def adapter(name: str, role: str) -> ModelAdapter:
    return make_adapter(PreTrainedTokenizerFast.from_pretrained(FOLDER / name), role)


@pytest.mark.parametrize("loader", [PreTrainedTokenizerFast, AutoTokenizer])
@pytest.mark.parametrize("name", NAMES)
def test_texts_are_tiled(name: str, loader: type) -> None:
    model = make_adapter(loader.from_pretrained(FOLDER / name), "student")
    for text in TEXTS.values():
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        spans = tile(model.table, ids, text)
        assert spans[-1][1] == len(text.encode())
        for index, (a, b) in zip(ids, spans, strict=True):
            assert model.table.text[index] == text.encode()[a:b]


@pytest.mark.parametrize(("teacher", "student"), permutations(NAMES, 2))
def test_everything_is_aligned(teacher: str, student: str) -> None:
    pair = adapter(teacher, "teacher"), adapter(student, "student")
    pairing = pair_models(*pair, *(len(model.table) for model in pair), list(TEXTS.values()))
    found = {kind: counted(*pair, pairing, text) for kind, text in TEXTS.items()}
    shown = ", ".join(f"{kind} {aligned}/{supervised} ({chunks} in chunks)"
                      for kind, (supervised, aligned, chunks) in found.items())
    print(f"\n{teacher} -> {student}, case {pairing.case}: {shown}")
    assert {kind: aligned for kind, (_, aligned, _) in found.items()} == {
        kind: supervised for kind, (supervised, _, _) in found.items()}
