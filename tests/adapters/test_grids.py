"""Where an image's tokens lie in the image: a painted corner must change its own cell most."""

from __future__ import annotations

import pickle
import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from torch import Tensor
from zoo import VLM_FAMILIES, Built, build
from zoo.images import image

from taid_vlm.adapters import EncodedBatch, GlobalViews, View, grids, make_adapter
from taid_vlm.errors import TaidError
from taid_vlm.models.forward import forward_names
from taid_vlm.objectives import pool
from taid_vlm.records import parse_record

torch.set_num_threads(1)

SIZES = ((64, 64), (96, 48), (40, 80), (200, 120))
GREY, WHITE = (128, 128, 128), (255, 255, 255)
# what brings the result of attention back into the stream, by the names that towers have for it
MIXING = re.compile(r"(vision|visual).*att.*(out_proj|o_proj|\.proj|projection_layer)\b")


@cache
def built(family: str) -> Built:
    """A family whose tower mixes no patches, so that a cell shows its own place only."""
    made = _finer_idefics3() if family == "idefics3" else build(family)
    with torch.no_grad():
        for name, p in made.model.named_parameters():
            if MIXING.search(name):
                p.zero_()
    return made


def _finer_idefics3() -> Any:
    """The zoo's has one token per view, which has no corners."""
    small = build("idefics3")
    config = small.model.config
    config.vision_config.image_size = 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = type(small.model)(config).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, 1.0 if p.ndim < 2 else 0.0, 0.1 if p.ndim < 2 else 0.2)
    processor = hf.Idefics3Processor(
        hf.Idefics3ImageProcessor(size={"longest_edge": 128}, max_image_size={"longest_edge": 64}),
        small.tokenizer, image_seq_len=4, chat_template=small.tokenizer.chat_template)
    return SimpleNamespace(model=model, processor=processor)


@cache
def finder(family: str) -> GlobalViews:
    return GlobalViews(make_adapter(built(family).processor, "student"), built(family).model.config)


def encode(family: str, rows: list[list[Image.Image]], side: Any = "left") -> EncodedBatch:
    adapter = make_adapter(built(family).processor, "student")
    records = [parse_record({"prompt": "<image>" * len(row) + "What?", "completion": "yes",
                             **({"images": row} if row else {})}, "x") for row in rows]
    return adapter.encode([adapter.render(record) for record in records], rows, side)


@torch.no_grad()
def features(family: str, batch: EncodedBatch) -> list[tuple[Tensor, tuple[int, int]]]:
    """What enters the language model at every image's global view, and its shape."""
    model, seen = built(family).model, {}
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    names = forward_names(type(model))
    model(**{key: value for key, value in batch.inputs.items() if key in names})
    hook.remove()
    return [(seen["inputs_embeds"][view.row, list(view.positions)], view.shape)
            for view in finder(family)(batch)]


def painted(size: tuple[int, int], corner: int | None) -> Image.Image:
    picture, (width, height) = Image.new("RGB", size, GREY), size
    if corner is not None:
        row, column = divmod(corner, 2)
        picture.paste(WHITE, (column * width // 2, row * height // 2,
                              (column + 1) * width // 2, (row + 1) * height // 2))
    return picture


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_a_painted_corner_changes_its_own_cell_most(family: str) -> None:
    """Also tells rows from columns, and the whole image from its tiles."""
    for size in SIZES:
        (plain, shape), = features(family, encode(family, [[painted(size, None)]]))
        assert len(plain) == shape[0] * shape[1] >= 4
        for corner in range(4):
            (found, again), = features(family, encode(family, [[painted(size, corner)]]))
            assert again == shape
            change = (pool(found, shape, 2) - pool(plain, shape, 2)).norm(dim=-1)
            assert int(change.argmax()) == corner, (size, change)
            assert change[corner] > 1.5 * change.sort().values[-2], (size, change)


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_every_image_of_a_mixed_batch_is_found(family: str) -> None:
    """Rows with two images, none and one, padded on either side, as if each stood alone."""
    rows = [[image("wide", 1), image("tall", 2)], [], [image("square", 3)]]
    if family == "paligemma":
        rows = [rows[0][:1], [], rows[2]]
    for side in ("left", "right"):
        batch = encode(family, rows, side)
        views = finder(family)(batch)
        assert [view.row for view in views] == [i for i, row in enumerate(rows) for _ in row]
        taken = [(view.row, position) for view in views for position in view.positions]
        assert len(set(taken)) == len(taken)
        ids = batch.inputs["input_ids"]
        assert {int(ids[place]) for place in taken} == {finder(family).token}
    together = features(family, batch)
    last, shape = features(family, encode(family, [rows[2]]))[0]
    assert together[-1][1] == shape
    torch.testing.assert_close(together[-1][0], last, rtol=1e-4, atol=1e-4)


def test_the_view_is_the_whole_image_and_no_tile() -> None:
    batch = encode("internvl", [[image("wide")]])
    (view,) = finder("internvl")(batch)
    tokens = (batch.inputs["input_ids"][0] == finder("internvl").token).nonzero()[:, 0].tolist()
    assert len(tokens) == 12
    assert view == View(0, tuple(tokens[-4:]), (2, 2))


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_it_travels_to_the_workers(family: str) -> None:
    again, batch = pickle.loads(pickle.dumps(finder(family))), encode(family, [[image("odd")]])
    assert again(batch) == finder(family)(batch)


@pytest.mark.parametrize("family", ["internvl", "llava_next", "idefics3", "ovis2", "gemma4",
                                    "mistral3", "perception_lm", "llava_onevision"])
def test_an_unknown_layout_is_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its entry no family of tiles passes for a square by chance."""
    monkeypatch.delitem(grids.LAYOUTS, family)
    with pytest.raises(TaidError, match=r"how .*visual features cannot be compared"):
        finder.__wrapped__(family)


def test_a_text_model_is_refused() -> None:
    text = build("qwen2")
    with pytest.raises(TaidError, match="student: qwen2 takes no images"):
        GlobalViews(make_adapter(text.processor, "student"), text.model.config)


def test_lfm2_without_thumbnails_is_refused() -> None:
    other = build("lfm2_vl")
    other.processor.image_processor.use_thumbnail = False
    with pytest.raises(TaidError, match="never sees an image as a whole"):
        GlobalViews(make_adapter(other.processor, "student"), other.model.config)
