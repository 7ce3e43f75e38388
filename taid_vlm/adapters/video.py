"""Families that do not take videos in transformers' usual way: SmolVLM, and Gemma 3 by frames."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from taid_vlm.adapters.adapter import ImageTextAdapter
from taid_vlm.adapters.encoded import Side
from taid_vlm.adapters.pictures import video_arguments
from taid_vlm.adapters.template import Rendered, Supervise
from taid_vlm.errors import TaidError
from taid_vlm.records import ImageRef, Record
from taid_vlm.records.videos import Clip, Picture


class TilesAdapter(ImageTextAdapter):
    """SmolVLM: tiles of images and frames of videos go into one tensor, which its processor fills
    with the videos alone."""

    def _process(  # type: ignore[no-untyped-def]
        self, rendered: Sequence[Rendered], images: Sequence[Sequence[Picture]],
        padding_side: Side, add_special: bool,
    ):
        inputs, expansions = super()._process(rendered, images, padding_side, add_special)
        if any(isinstance(picture, Clip) for row in images for picture in row):
            inputs |= self._tiles([list(self._in_order(item.text, row))
                                   for item, row in zip(rendered, images, strict=True)])
        return inputs, expansions

    def _in_order(self, text: str, row: Sequence[Picture]) -> Iterator[Picture]:
        """As the text shows them; templates may put images before videos."""
        tokens = (self.processor.image_token, self.processor.video_token)
        kinds = [[picture for picture in row if isinstance(picture, Clip) is clips]
                 for clips in (False, True)]
        waiting = [iter(kind) for kind in kinds]
        for mark in re.finditer("|".join(map(re.escape, tokens)), text):
            yield next(waiting[tokens.index(mark.group())])

    def _tiles(self, rows: list[list[Picture]]) -> dict[str, Tensor]:
        """pixel_values [B, N, 3, H, W] and their mask [B, N, H, W]; zeros where a row has fewer."""
        tiles = [[self._tiles_of(picture) for picture in row] for row in rows]
        shapes = {tuple(each.shape[1:]) for row in tiles for each in row}
        if len(shapes) > 1:
            raise TaidError(f"{self.role}: its processor makes tiles of images and frames of "
                            f"videos of different sizes ({shapes}); set processor_kwargs to make "
                            "them alike.")
        most = max(sum(map(len, row)) for row in tiles)
        values = torch.zeros(len(rows), most, *shapes.pop())
        mask = torch.zeros(len(rows), most, *values.shape[-2:], dtype=torch.long)
        for index, row in enumerate(tiles):
            if row:
                number = sum(map(len, row))
                values[index, :number], mask[index, :number] = torch.cat(row), 1
        return {"pixel_values": values, "pixel_attention_mask": mask}

    def _tiles_of(self, picture: Picture) -> Tensor:
        if isinstance(picture, Clip):
            options = video_arguments([picture])
            tiles = self.processor.video_processor(
                [picture.array()], return_tensors="pt", **options)
        else:
            tiles = self.processor.image_processor([[picture]], return_tensors="pt")
        pixels: Tensor = tiles["pixel_values"][0]
        return pixels


class FramesAdapter(ImageTextAdapter):
    """Gemma 3: its cards show a video as its frames, one image after the other."""

    takes_videos = True

    def render(self, record: Record, supervise: Supervise = "answers") -> Rendered:
        return super().render(_as_images(record), supervise)

    def prompt(self, record: Record, turn: int) -> Rendered:
        return super().prompt(_as_images(record), turn)

    def _process(  # type: ignore[no-untyped-def]
        self, rendered: Sequence[Rendered], images: Sequence[Sequence[Picture]],
        padding_side: Side, add_special: bool,
    ):
        if not any(isinstance(picture, Clip) for row in images for picture in row):
            return super()._process(rendered, images, padding_side, add_special)
        frames = [[_frames(picture) for picture in row] for row in images]
        token = self.processor.boi_token
        wide = [replace(item, text=_repeated(item.text, token, [len(each) for each in row]))
                for item, row in zip(rendered, frames, strict=True)]
        inputs, expansions = super()._process(
            wide, [[frame for each in row for frame in each] for row in frames], padding_side,
            add_special)
        return inputs, [
            _joined(item.text, token, [len(each) for each in row], found)
            for item, row, found in zip(rendered, frames, expansions, strict=True)]


def _as_images(record: Record) -> Record:
    return replace(record, images=tuple(
        ImageRef(image.value, image.source, sizes=image.sizes) for image in record.images))


def _frames(picture: Picture) -> list[Image.Image]:
    return list(picture.frames) if isinstance(picture, Clip) else [picture]


def _repeated(text: str, token: str, numbers: Sequence[int]) -> str:
    """As many placeholders in the place of each as it has frames."""
    pieces = text.split(token)
    return pieces[0] + "".join(
        token * number + piece for number, piece in zip(numbers, pieces[1:], strict=True))


def _joined(
    text: str, token: str, numbers: Sequence[int], expansions: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The expansions of a video's frames as one, of the placeholder that stood in the text."""
    joined, rest = [], iter(expansions)
    for mark, number in zip(re.finditer(re.escape(token), text), numbers, strict=True):
        parts = [next(rest) for _ in range(number)]
        joined.append({"span": mark.span(),
                       "new_span": (parts[0]["new_span"][0], parts[-1]["new_span"][1]),
                       "replacement": "".join(part["replacement"] for part in parts)})
    return joined
