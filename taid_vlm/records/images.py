"""An image: what a row says of it, and how it is decoded, for training and for benchmarks."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import numpy as np
from PIL import ExifTags, Image, ImageOps

from taid_vlm.errors import SampleDropped
from taid_vlm.io.images import png

MAX_PIXELS = 2**26  # Pillow itself stops at 179 million
FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
SENT = ("JPEG", "PNG", "WEBP")  # as they are to servers and tables
UNREADABLE, TOO_LARGE = "unreadable image", "image larger than max_pixels"
LONGEST_NAME = 1024  # characters of a path
SHORTEST_BASE64 = 64  # characters; a shorter text is a path, or names another row
GREY = (128, 128, 128)  # says nothing: about 0 once a processor has normalised it
SIZES = "sizes"  # in `Image.info`: how large a picture asks to be shown
SIZE_KEYS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_URL_SAFE = str.maketrans("-_", "+/", "\r\n")


@dataclass(frozen=True)
class ImageRef:
    """An image that is not decoded yet.

    value: path, bytes, PIL image or a URL, or what gives one of them when it is called.
    max_pixels: an image of more, as its header says, is not decoded.
    sizes: how large it asks to be shown, by SIZE_KEYS; for families that have limits per picture.
    """

    value: Any
    source: str
    max_pixels: int = MAX_PIXELS
    sizes: tuple[tuple[str, int], ...] = ()

    kind: ClassVar[str] = "image"  # as typed parts call it

    def stored(self) -> Any:
        """The path, bytes, PIL image or URL."""
        return self.value() if callable(self.value) else self.value

    def load(self) -> Image.Image:
        """Decode to RGB, upright, what is transparent on white.

        Raises:
            SampleDropped: "unreadable image", or "image larger than max_pixels".
        """
        try:
            image = _opened(self.stored())
            if image.width * image.height > self.max_pixels:
                raise Image.DecompressionBombError(
                    f"{image.width:,} x {image.height:,} pixels; at most {self.max_pixels:,} are "
                    "decoded")
            image = _in_rgb(ImageOps.exif_transpose(image))
            image.info[SIZES] = dict(self.sizes)
            return image
        except Exception as error:  # decoders raise anything
            large = isinstance(error, Image.DecompressionBombError)
            message = str(error) if large else f"{type(error).__name__}: {error}"
            if isinstance(self.value, (str, Path)):
                message = f"{self.value!s:.200}: {message}"
            elif isinstance(error, Image.UnidentifiedImageError):
                message = "its bytes are no image"
            raise SampleDropped(TOO_LARGE if large else UNREADABLE,
                                f"{self.source}: {message:.400}") from None

    def as_file(self) -> tuple[str, bytes]:
        """MIME type and bytes of a file in which a decoder finds what `load` gives: its own file
        where that is so, otherwise (transparency, 16 bits, EXIF's directions ...) a PNG; raises as
        `load`."""
        shown, stored = self.load(), self.stored()
        data = Path(stored).read_bytes() if isinstance(stored, (str, Path)) else stored
        kind = _read_alike(data) if isinstance(data, bytes) else None
        return (kind, data) if kind else ("image/png", png(shown, longest=None))

    def still(self) -> Image.Image:
        """What a page shows of it; raises as `load`."""
        return self.load()


def stored_image(value: Any, root: Path | None) -> Any:
    """What a column or a part says of an image, as `ImageRef.value`; other types as they came.

    Args:
        value: path, `file://`, data URI, base64, URL, bytes, {"bytes", "path"} or PIL image.
        root: folder that relative paths start from.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        value = _from_text(value, root)
    if isinstance(value, (str, Path)) and not is_url(value):
        value = Path(value) if root is None else root / value
    return value


def no_image(value: Any) -> bool:
    """What tables write where a row has no image: nothing, blank text, NaN."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _from_text(text: str, root: Path | None) -> bytes | str:
    if text.startswith("data:"):
        head, _, data = text.partition(",")
        return (_from_base64(data) if head.endswith(";base64") else None) or b""
    if text.startswith("file://"):
        return unquote(text.removeprefix("file://").removeprefix("localhost"))
    decoded = _from_base64(text) if len(text) >= SHORTEST_BASE64 else None
    if decoded is None or (len(text) <= LONGEST_NAME and _is_file(text, root)):
        return text  # a file named after its hash looks like base64, too
    return decoded


def _is_file(text: str, root: Path | None) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return (Path(text) if root is None else root / text).is_file()
    return False


def _from_base64(text: str) -> bytes | None:
    """Also wrapped, URL-safe or unpadded."""
    text = text.strip().translate(_URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        return None


def _opened(value: Any) -> Image.Image:
    """Header read, pixels not; pipes, devices and folders are not opened."""
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, bytes):
        return Image.open(io.BytesIO(value), formats=_formats())
    if is_url(value):
        raise ValueError("an image is not fetched from a URL; save it as a file")
    if not Path(value).is_file():
        raise FileNotFoundError("there is no such file")
    return Image.open(value, formats=_formats())


def _read_alike(data: bytes) -> str | None:
    """The MIME type of a file that every decoder reads as this package does."""
    image = Image.open(io.BytesIO(data), formats=_formats())
    alike = (image.format in SENT and image.mode in ("RGB", "L")
             and not image.has_transparency_data and getattr(image, "n_frames", 1) == 1
             and image.getexif().get(ExifTags.Base.Orientation, 1) == 1)
    return Image.MIME[str(image.format)] if alike else None


def is_url(value: Any) -> bool:
    """Also of a kind that nobody fetches."""
    return isinstance(value, str) and "://" in value[:16]


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow has; others may start programs (EPS: Ghostscript)."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey by value / 257; other whole numbers, and floats, by their own range."""
    values = np.asarray(image, np.float32)
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(high - low):
        raise ValueError("its grey values are not finite")
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    grey = np.rint((values - low) * (255 / ((high - low) or 1.0)))
    clear = values == image.info.get("transparency", math.nan)
    return Image.fromarray(np.where(clear, 255, grey).astype(np.uint8))
