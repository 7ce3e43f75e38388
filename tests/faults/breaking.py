"""How things break: one place of a tree, some bytes of a file, a picture."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

VALUES: tuple[Any, ...] = (
    None, "", "x", "../..", "\x00", "é" * 300, -1, 0, 1e400, 3.5, True, [], {}, [[]],
    {"a": {"b": []}}, "taid", ["taid", 3], "1e-3", 2**70)


def paths_of(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) \
        if isinstance(tree, list) else ()
    for key, value in items:
        yield from paths_of(value, (*path, key))


def changed(rng: random.Random, tree: Any) -> Any:
    """One place of a tree with another value, without its key, or with a key too many."""
    tree = copy.deepcopy(tree)
    *parents, last = rng.choice([path for path in paths_of(tree) if path] or [()]) or [None]
    if last is None:
        return rng.choice(VALUES)
    place = tree
    for key in parents:
        place = place[key]
    what = rng.randrange(3)
    if what == 0:
        place[last] = rng.choice(VALUES)
    elif what == 1:
        del place[last]
    elif isinstance(place, dict):
        place[rng.choice(("extra", "path", "name", "role", str(last) + "s"))] = rng.choice(VALUES)
    return tree


def flipped(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed, cut off, or put in."""
    array = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(array)) if array else 0
        what = rng.randrange(3)
        if what == 0 and array:
            array[at] = rng.randrange(256)
        elif what == 1:
            del array[at:]
        else:
            array[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
    return bytes(array)


def noise(rng: random.Random, folder: Path) -> Path:
    """A picture of some format with some of its bytes broken."""
    picture = folder / f"odd.{rng.choice(('png', 'jpg', 'gif', 'bmp', 'webp', 'tiff'))}"
    buffer = io.BytesIO()
    shape = "JPEG" if picture.suffix == ".jpg" else picture.suffix[1:].upper()
    Image.effect_noise((24, 24), 60).convert("RGB").save(buffer, shape)
    picture.write_bytes(flipped(rng, buffer.getvalue()))
    return picture
