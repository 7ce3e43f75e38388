"""Rows whose pictures a processor need not see again, held against what it makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from adapters.samples import TURNS, adapter
from PIL import Image
from zoo import VLM_FAMILIES
from zoo.images import noise

from taid_vlm.adapters import ImageTextAdapter, SeenSizes
from taid_vlm.adapters.families import PrefixAdapter
from taid_vlm.records import Record, parse_record

SIZES = ((96, 48), (57, 35))


def talk(pictures: Sequence[Image.Image], question: str) -> Record:
    content = [*({"type": "image", "image": picture} for picture in pictures),
               {"type": "text", "text": question}]
    return parse_record({"messages": [{"role": "user", "content": content},
                                      {"role": "assistant", "content": "a red 图片"}]}, "x")


def rows(seed: int) -> list[Record]:
    """With one picture, with the other, with both, with none."""
    pictures = [noise(*size, seed=seed + i) for i, size in enumerate(SIZES)]
    question = "".join(TURNS["image"][0][1][1:])  # type: ignore[arg-type]
    return [talk(pictures[:1], question), talk(pictures[1:], f"{question} {seed}"),
            talk(pictures, "which ?"), talk((), "how many ?")]


class Shown:
    """How many rows a processor has been shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[ImageTextAdapter]) -> None:
        self.rows, process = 0, kind._process

        def count(model: Any, rendered: Any, *rest: Any) -> Any:
            self.rows += len(rendered)
            return process(model, rendered, *rest)

        monkeypatch.setattr(kind, "_process", count)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_other_pictures_of_the_same_sizes_become_the_same(
    family: str, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = adapter(family), SeenSizes()
    kinds = [rows(seed) for seed in (0, 5)]
    first, second = ([model.render(record) for record in part] for part in kinds)
    images = [[[picture.load() for picture in record.images] for record in part]
              for part in kinds]
    expected = model.encode(second, images[1], side)
    held = [row.ids for row in (*model.encode(first, images[0], side).rows, *expected.rows)]

    def holds(ids: Sequence[int], _: Any) -> bool:
        return list(ids) in held

    assert seen.encode(model, first, images[0], side, holds) is not None
    shown = Shown(monkeypatch, PrefixAdapter if family == "paligemma" else ImageTextAdapter)
    again = seen.encode(model, second, images[1], side, holds)
    assert again is not None and shown.rows == 0
    assert again.rows == expected.rows
    assert sorted(again.inputs) == ["attention_mask", "input_ids"]
    for name, value in again.inputs.items():
        assert value.equal(expected.inputs[name])


def test_rows_that_nobody_knows_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = adapter("llava"), SeenSizes()
    rendered = [model.render(record) for record in rows(0)]
    images = [[picture.load() for picture in record.images] for record in rows(0)]
    shown = Shown(monkeypatch, ImageTextAdapter)
    encoded = seen.encode(model, rendered, images, "right", lambda ids, images: False)
    assert shown.rows == 8, "each once for its sizes, once as it is not known"
    assert encoded is not None


def test_a_processor_that_looks_at_what_is_shown_is_shown_it() -> None:
    """None exists; one of whose pictures dark ones become fewer tokens."""
    model, seen = adapter("llava"), SeenSizes()

    class Looks(type(model)):  # type: ignore[misc]
        def encode(self, rendered: Any, images: Any, *rest: Any, **options: Any) -> Any:
            dark = any(isinstance(p, Image.Image) and p.getpixel((0, 0)) == (0, 0, 0)
                       for row in images for p in row)
            encoded = super().encode(rendered, images, *rest, **options)
            if dark:
                encoded.rows[0].ids.pop(3)
            return encoded

    looking = Looks(model.processor, "teacher")
    rendered = [looking.render(rows(0)[0])]

    def kept(picture: Image.Image) -> Any:
        own = looking.encode(rendered, [[picture]]).rows[0].ids
        return seen.encode(looking, rendered, [[picture]], "right",
                           lambda ids, _: list(ids) == own)

    assert kept(noise(96, 48)) is not None
    assert kept(Image.new("RGB", (96, 48))) is None
