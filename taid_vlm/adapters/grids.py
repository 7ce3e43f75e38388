"""An image's global view in a row of tokens: which positions it takes, and how they lie.

The global view is the whole image, not a tile of it: the thumbnail where a family cuts images into
tiles, otherwise all there is. Families that give every image one square block of tokens, or say
its size in `image_grid_thw`, need no entry; `LAYOUTS` has the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image
from torch import Tensor

from taid_vlm.adapters.adapter import EncodedBatch, EncodedRow, ModelAdapter
from taid_vlm.errors import TaidError
from taid_vlm.records import parse_record

# large and of two shapes, so that a family that cuts images into tiles does so here
PROBE_SIZES = ((600, 600), (1800, 600))


@dataclass(frozen=True)
class View:
    """One image's global view.

    row: of the batch. positions: of its tokens in the padded row, row by row of the image.
    shape: (rows, columns) of tokens.
    """

    row: int
    positions: tuple[int, ...]
    shape: tuple[int, int]


@dataclass(frozen=True)
class _Expansion:
    """An image's tokens: positions in runs between markers, and its place in the batch."""

    runs: list[list[int]]
    image: int
    last_tile: int  # the tensors of some families have one entry per run
    inputs: Mapping[str, Tensor]

    @property
    def tokens(self) -> list[int]:
        return [position for run in self.runs for position in run]


Placed = tuple[Sequence[int], tuple[int, int]]
Layout = Callable[[_Expansion], Placed]


class GlobalViews:
    """Finds the global view of every image of a batch; made once per model and run.

    Args:
        adapter: of a model with vision.
        config: the model's; it names the token that image features take the place of.

    Raises:
        TaidError: a family whose layout is not known.
    """

    def __init__(self, adapter: ModelAdapter, config: Any) -> None:
        self.role, self.family = adapter.role, config.model_type
        token = getattr(config, "image_token_id", None)
        if not adapter.sees_images or token is None:
            raise TaidError(f"{self.role}: {self.family} takes no images, so it has no visual "
                            "features; leave out the visual terms of the objective.")
        self.token: int = token
        make = LAYOUTS.get(self.family)
        self.layout: Layout = make(adapter.processor, config) if make else _generic(
            adapter.processor)
        self._check(adapter)

    def __call__(self, batch: EncodedBatch) -> list[View]:
        """Of all images, in order of rows and of images in a row."""
        views: list[View] = []
        tiles = 0
        for index, row in enumerate(batch.rows):
            for span in row.images:
                runs = self._runs(row, span)
                tiles += len(runs)
                expansion = _Expansion(runs, len(views), tiles - 1, batch.inputs)
                views.append(self._view(index, expansion))
        return views

    def _runs(self, row: EncodedRow, span: tuple[int, int]) -> list[list[int]]:
        runs: list[list[int]] = []
        for index, (start, end) in enumerate(row.byte_spans):
            if span[0] <= start and end <= span[1] and row.ids[index] == self.token:
                position = index + row.offset
                if runs and runs[-1][-1] == position - 1:
                    runs[-1].append(position)
                else:
                    runs.append([position])
        return runs

    def _view(self, row: int, expansion: _Expansion) -> View:
        positions, shape = self.layout(expansion) if expansion.runs else ((), (0, 0))
        if not positions or shape[0] * shape[1] != len(positions):
            raise TaidError(
                f"{self.role}: {len(expansion.tokens)} image tokens of {self.family} do not show "
                "how they lie in the image, so its visual features cannot be compared; leave out "
                "the visual terms of the objective.")
        return View(row, tuple(positions), shape)

    def _check(self, adapter: ModelAdapter) -> None:
        """Place an image of each size; a block that depends on the size is no fixed square."""
        views = []
        for size in PROBE_SIZES:
            record = parse_record({"prompt": "<image>What?", "completion": "yes",
                                   "images": [Image.new("RGB", size)]}, "probe")
            images = [image.load() for image in record.images]
            views += self(adapter.encode([adapter.render(record)], [images]))
        if self.layout is _square and len({view.shape for view in views}) > 1:
            raise TaidError(f"{self.role}: how {self.family} lays out the tokens of an image is "
                            "not known, so its visual features cannot be compared; leave out the "
                            "visual terms of the objective.")


# ----- layouts ------------------------------------------------------------------------------


def _generic(processor: Any) -> Layout:
    merge = getattr(getattr(processor, "image_processor", None), "merge_size", None)
    return _square if merge is None else partial(_grid_thw, merge)


def _sided(tokens: Sequence[int]) -> Placed:
    side = math.isqrt(len(tokens))
    return tokens, (side, side)


def _square(expansion: _Expansion) -> Placed:
    """One block of a fixed number of tokens."""
    return _sided(expansion.tokens) if len(expansion.runs) == 1 else ((), (0, 0))


def _grid_thw(merge: int, expansion: _Expansion) -> Placed:
    """Qwen-VL and those built like it: one block of any shape, in patches before the merger."""
    _, rows, columns = expansion.inputs["image_grid_thw"][expansion.image].tolist()
    return expansion.tokens, (rows // merge, columns // merge)


def _ended_rows(merge: int, expansion: _Expansion) -> Placed:
    """Hunyuan 4: as Qwen-VL, with one token more at the end of every row."""
    tokens, (rows, columns) = _grid_thw(merge, expansion)
    cells = [position for index, position in enumerate(tokens) if (index + 1) % (columns + 1)]
    return cells, (rows, columns)


def _run(index: int, expansion: _Expansion) -> Placed:
    """The whole image is a run of its own between markers, the first or the last one."""
    return _sided(expansion.runs[index])


def _part(part: slice, expansion: _Expansion) -> Placed:
    """The whole image before its tiles, or behind them, without markers."""
    return _sided(expansion.tokens[part])


def _broken_rows(expansion: _Expansion) -> Placed:
    """Pixtral: a marker after every row."""
    return expansion.tokens, (len(expansion.runs), len(expansion.runs[0]))


def _thumbnail(factor: int, expansion: _Expansion) -> Placed:
    """LFM2-VL: a run per tile, then one for the whole image; sizes in patches before pooling."""
    rows, columns = expansion.inputs["spatial_shapes"][expansion.last_tile].tolist()
    return expansion.runs[-1], (-(-rows // factor), -(-columns // factor))


def _patch_positions(kernel: int, expansion: _Expansion) -> Placed:
    """Gemma 4: (x, y) of every patch before pooling, -1 for padding."""
    columns, rows = expansion.inputs["image_position_ids"][expansion.image].amax(0).tolist()
    return expansion.tokens, ((rows + 1) // kernel, (columns + 1) // kernel)


def _of_llava_next(processor: Any, config: Any) -> Layout:
    tower = config.vision_config
    return partial(_part, slice((tower.image_size // tower.patch_size) ** 2))


def _of_perception_lm(processor: Any, config: Any) -> Layout:
    side = processor.image_processor.tile_size // processor.patch_size // processor.pooling_ratio
    return partial(_part, slice(side**2))


def _of_lfm2_vl(processor: Any, config: Any) -> Layout:
    if not processor.image_processor.use_thumbnail:
        raise TaidError("lfm2_vl without thumbnails (use_thumbnail: false) never sees an image as "
                        "a whole; leave out the visual terms of the objective.")
    return partial(_thumbnail, config.downsample_factor)


LAYOUTS: dict[str, Callable[[Any, Any], Layout]] = {
    "gemma4": lambda processor, config: partial(
        _patch_positions, config.vision_config.pooling_kernel_size),
    "hy_v4_vl": lambda processor, config: partial(
        _ended_rows, processor.image_processor.merge_size),
    "idefics3": lambda processor, config: partial(_run, -1),
    "internvl": lambda processor, config: partial(
        _part, slice(-processor.image_seq_length, None)),
    "lfm2_vl": _of_lfm2_vl,
    "llava_next": _of_llava_next,
    "llava_onevision": _of_llava_next,
    "mistral3": lambda processor, config: _broken_rows,
    "ovis2": lambda processor, config: partial(_run, 0),
    "perception_lm": _of_perception_lm,
    "smolvlm": lambda processor, config: partial(_run, -1),
}
