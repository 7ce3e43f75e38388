"""Images as bytes: for pages, tables and servers."""

from __future__ import annotations

import io

from PIL import Image

SMALL = 160  # pixels; images no larger are drawings rather than photographs


def png(image: Image.Image, longest: int | None = 512) -> bytes:
    """A PNG of at most `longest` pixels in width and height; None leaves the size as it is."""
    fast = {"compress_level": 1} if longest is None else {}  # for a machine, not to be kept
    return _encoded(image, longest, "PNG", **fast)


def thumbnail(image: Image.Image, longest: int = 320) -> bytes:
    """For pages with many images: a PNG where the image is small anyway, otherwise a JPEG."""
    if max(image.size) <= SMALL:
        return png(image, None)
    return _encoded(image, longest, "JPEG", quality=80)


def _encoded(image: Image.Image, longest: int | None, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    if longest is not None and max(image.size) > longest:
        image = image.copy()
        image.thumbnail((longest, longest))
    image.save(buffer, kind, **options)
    return buffer.getvalue()
