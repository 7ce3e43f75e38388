"""Pictures that say themselves how large they are shown, as Qwen-VL's records do."""

from __future__ import annotations

import sys
from typing import Any

from PIL import Image

from taid_vlm.errors import SampleDropped
from taid_vlm.records.images import SIZES

NO_SIZES = "pixel limits of one picture"


def takes_sizes(processor: Any) -> bool:
    """Whether a family has pixel limits per picture: those with Qwen2-VL's image processor."""
    return type(getattr(processor, "image_processor", None)).__name__.startswith("Qwen2VLImage")


def sized(image: Image.Image, processor: Any) -> Image.Image:
    """The picture as large as it asks for, in whole tokens, as qwen_vl_utils' `fetch_image` makes
    it.

    Raises:
        SampleDropped: outside of the processor's own limits, which it would be resized to again.
    """
    wanted = image.info.get(SIZES)
    if not wanted:
        return image
    part = processor.image_processor
    resize = sys.modules[type(part).__module__].smart_resize
    limits = {"min_pixels": part.size["shortest_edge"], "max_pixels": part.size["longest_edge"]}
    width, height = (wanted.get(f"resized_{side}", of_image)
                     for side, of_image in zip(("width", "height"), image.size, strict=True))
    height, width = resize(height, width, factor=part.patch_size * part.merge_size,
                           **{key: wanted.get(key, value) for key, value in limits.items()})
    least, most = limits.values()
    if not least <= width * height <= most:
        raise SampleDropped(NO_SIZES, f"{wanted} asks for {width} x {height} pixels, but the "
                                      f"processor shows from {least:,} to {most:,}")
    return image.resize((width, height), Image.Resampling.BICUBIC)
