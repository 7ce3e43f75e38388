"""Small tokenizers that do what real ones do: every text is tiled, and all of it is aligned."""

from __future__ import annotations

from functools import cache

import pytest
from alignment.texts import TEXTS, counted
from zoo.lookalikes import LOOKALIKES, RUNS, lookalike

from taid_vlm.adapters import ModelAdapter, make_adapter
from taid_vlm.adapters.tokens import tile
from taid_vlm.alignment import pair_models

KINDS = pytest.mark.parametrize("name", LOOKALIKES)


@cache
def adapter(name: str, role: str) -> ModelAdapter:
    return make_adapter(lookalike(name), role)


@KINDS
def test_texts_are_tiled(name: str) -> None:
    model = adapter(name, "student")
    for text in TEXTS.values():
        data, cursor = text.encode(), 0
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        for index, (a, b) in zip(ids, tile(model.table, ids, text), strict=True):
            assert not data[cursor:a].strip()  # swallowed by an added token
            assert name == "flags" or a == cursor
            spelled = model.table.text[index]
            assert spelled is not None
            assert data[a:b] in (spelled, spelled[1:], model.table.also.get(index))
            cursor = b
        assert cursor == len(data)


@KINDS
def test_what_a_token_spells_is_what_the_library_decodes(name: str) -> None:
    """After another token, for a decoder may strip what stands first."""
    model = adapter(name, "student")
    first = model.tokenizer.convert_tokens_to_ids("e")
    backend = model.tokenizer.backend_tokenizer
    for index, spelled in enumerate(model.table.text):
        if spelled is None or index in model.table.added:
            continue
        decoded = backend.decode([first, index], skip_special_tokens=False)
        if "\ufffd" not in decoded:
            assert decoded.removeprefix("e").encode() == spelled


def test_their_quirks_are_there() -> None:
    table = adapter("gemma", "student").table
    runs = [index for index in table.added if table.strings[index] in RUNS]
    assert len(runs) == len(RUNS) and all(not table.text[i].strip() for i in runs)
    seen = {name: lookalike(name).tokenize("12345 don't A  b") for name in LOOKALIKES}
    assert [len([t for t in seen[name] if t.strip("ĠĊ▁")[:1].isdigit()])
            for name in ("qwen", "smollm", "tekken")] == [5, 5, 5]
    assert seen["prefix"][0].startswith("Ġ") and seen["llama2"][0].startswith("▁")
    splits = {tuple(tile(adapter(name, "student").table, ids, text)) for name in LOOKALIKES
              for text in ["".join(TEXTS.values())]
              for ids in [lookalike(name)(text, add_special_tokens=False)["input_ids"]]}
    assert len(splits) == len(LOOKALIKES)
    flags = lookalike("flags").tokenize("see over the  dogs  in price  now, isnt")
    assert {" over", "  dogs  ", "in ", "price  "} <= set(flags) and "is" not in flags


@pytest.mark.parametrize("teacher", LOOKALIKES)
def test_all_pairs_align_all(teacher: str) -> None:
    for student in LOOKALIKES:
        if student == teacher:
            continue
        pair = adapter(teacher, "teacher"), adapter(student, "student")
        pairing = pair_models(*pair, *(len(model.table) for model in pair), list(TEXTS.values()))
        assert pairing.case == "c"
        found = {kind: counted(*pair, pairing, text)[:2] for kind, text in TEXTS.items()}
        assert all(a == b > 5 for a, b in found.values()), (student, found)
