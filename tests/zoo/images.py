"""Deterministic little test images; no files, no network."""

from __future__ import annotations

import numpy as np
from PIL import Image

# (width, height): squares, wide, tall and one that no patch size divides.
SIZES: dict[str, tuple[int, int]] = {
    "tiny": (32, 32),
    "square": (64, 64),
    "wide": (96, 48),
    "tall": (40, 80),
    "odd": (57, 35),
}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Random RGB pixels: the image that tells every pixel from its neighbour."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def shape(width: int, height: int, seed: int = 0) -> Image.Image:
    """A coloured rectangle on a coloured gradient: smooth, so that resizing keeps it."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0.0, 1.0, width)[None, :, None] * np.ones((height, 1, 1))
    pixels = ramp * rng.uniform(80, 255, 3)
    top, left = int(rng.integers(0, height // 2)), int(rng.integers(0, width // 2))
    pixels[top : top + height // 2, left : left + width // 2] = rng.uniform(0, 255, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def image(name: str = "square", seed: int = 0) -> Image.Image:
    """One image of a named size; other seeds give other pixels."""
    return shape(*SIZES[name], seed=seed)


def images(count: int, seed: int = 0) -> list[Image.Image]:
    """`count` different images that walk through the sizes."""
    names = list(SIZES)
    return [image(names[i % len(names)], seed=seed + i) for i in range(count)]
