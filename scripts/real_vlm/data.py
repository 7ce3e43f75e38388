"""Pictures and conversations about them: drawn scenes, icons by name, statements about pictures."""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from taid_vlm.demo.demo import data_folder
from taid_vlm.errors import TaidError

sys.path.insert(0, str(data_folder()))

from worlds import scenes

SIDE = scenes.SIDE
ICON_QUESTION = "What is this icon called?"
STATEMENT_QUESTION = "True or false? {}"
BOXES = ((0, 100), (150, 250), (300, 400))  # columns of an NLVR picture, which is 400 x 100
SPLITS = {"train": 1, "distill": 2, "eval": 3}  # with the seed of what is drawn
HELD_OUT_SHARE = 0.25  # of the icons' names and of NLVR's sentences
LEAST_ICONS = 8
SHOWN_AGAIN = 12  # about so often the teacher is shown each icon
SHARES = {"scenes": 0.6, "icons": 0.25, "nlvr": 0.15}  # of the records
PART = pa.struct({"type": pa.string(), "text": pa.string()})
SCHEMA = pa.schema({
    "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.list_(PART)})),
    "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
    "categories": pa.list_(pa.string()),
    "caption_log_probability": pa.float64(),
})


@dataclass(frozen=True)
class Icon:
    """A picture with transparent ground, and its name."""

    name: str
    png: bytes

    @cached_property
    def picture(self) -> Image.Image:
        return Image.open(io.BytesIO(self.png)).convert("RGBA")

    def drawn(self, rng: random.Random) -> Image.Image:
        """On a ground of some colour, somewhere, larger or smaller."""
        ground = tuple(rng.randint(150, 255) for _ in range(3))
        side = rng.randint(44, SIDE)
        image = Image.new("RGB", (SIDE, SIDE), ground)
        icon = ImageOps.contain(self.picture, (side, side))
        image.paste(icon, (rng.randint(0, SIDE - icon.width), rng.randint(0, SIDE - icon.height)),
                    icon)
        return image


@dataclass(frozen=True)
class Statement:
    """A sentence about a picture of three boxes, and whether it is true of it."""

    text: str
    true: bool
    png: bytes
    sentence: str

    @cached_property
    def boxes(self) -> list[Image.Image]:
        picture = Image.open(io.BytesIO(self.png)).convert("RGB")
        return [picture.crop((left, 0, right, picture.height)) for left, right in BOXES]


@dataclass(frozen=True)
class Sources:
    """What there is beside drawn scenes; every name and sentence is learned or held out.

    icons, new_icons: learned, and never shown in training. statements, new_statements: the same.
    """

    icons: Sequence[Icon] = ()
    new_icons: Sequence[Icon] = ()
    statements: Sequence[Statement] = ()
    new_statements: Sequence[Statement] = ()

    @property
    def names(self) -> list[str]:
        return ["scenes", *(["icons"] if self.icons else []), *(["nlvr"] if self.statements
                                                                else [])]


# ----- what files hold ----------------------------------------------------------------------


def read_sources(icons: Path | None, nlvr: Path | None, number: int) -> Sources:
    """Icons with short names, and statements.

    Args:
        icons: parquet with columns image and caption. nlvr: with image, statement, label and
            identifier.
        number: of icons that are learned.
    """
    rng, parts = random.Random(0), {}
    if icons is not None:
        rows = _rows(icons, "--icons", ("image", "caption"))
        named = [Icon(row["caption"], row["image"]["bytes"]) for row in rows
                 if len(row["caption"].split()) == 1]
        rng.shuffle(named)
        new = max(2, round(number * HELD_OUT_SHARE))
        if len(named) < new + 2:
            raise TaidError(f"--icons '{icons}' holds {len(named)} icons with a name of one word; "
                            f"{new + 2} are needed.")
        parts |= {"new_icons": named[:new], "icons": named[new:new + number]}
    if nlvr is not None:
        rows = _rows(nlvr, "--nlvr", ("image", "statement", "label", "identifier"))
        told = [Statement(row["statement"], row["label"] in ("yes", "true"), row["image"]["bytes"],
                          row["identifier"].partition("-")[0]) for row in rows]
        sentences = sorted({one.sentence for one in told})
        rng.shuffle(sentences)
        held_out = set(sentences[:round(len(sentences) * HELD_OUT_SHARE)])
        parts |= {"new_statements": [one for one in told if one.sentence in held_out],
                  "statements": [one for one in told if one.sentence not in held_out]}
    return Sources(**parts)


def _rows(path: Path, flag: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise TaidError(f"{flag} '{path}' cannot be read as parquet: {error}") from error
    if lacking := [name for name in columns if name not in table.column_names]:
        raise TaidError(f"{flag} '{path}' lacks the column '{lacking[0]}'; it has "
                        f"{', '.join(table.column_names)}.")
    return table.select(list(columns)).to_pylist()


# ----- records ------------------------------------------------------------------------------


def write_records(folder: Path, sources: Sources, sizes: Mapping[str, int]) -> None:
    """A parquet file for each split and source, with so many records of each split together."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = sum(SHARES[name] for name in sources.names)
    makers = {"scenes": _scenes, "icons": _icons, "nlvr": _statements}
    for split, seed in SPLITS.items():
        for name in sources.names:
            number = max(2, round(sizes[split] * SHARES[name] / whole))
            rows = list(makers[name](sources, split, number, random.Random(seed)))
            pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file_of(folder, split, name))


def file_of(folder: Path, split: str, source: str) -> Path:
    return folder / f"{split}-{source}.parquet"


def _scenes(
    sources: Sources, split: str, number: int, rng: random.Random
) -> Iterator[dict[str, Any]]:
    for _ in range(number):
        image, scene = scenes.draw(rng)
        turns = scenes.turns(scene, rng, 3 if split == "eval" else 5)
        said = next(turn.answer for turn in turns if turn.category == "caption")
        yield _row([image], turns, scenes.caption_log_probability(scene, said))


def _icons(
    sources: Sources, split: str, number: int, rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Held out are learned icons, drawn anew, and new ones, in turn."""
    order = list(sources.icons)
    for index in range(number):
        if index % len(order) == 0:
            rng.shuffle(order)
        icon, kind = order[index % len(order)], "icon, seen"
        if split == "eval" and index % 2:
            icon, kind = sources.new_icons[index // 2 % len(sources.new_icons)], "icon, new"
        yield _row([icon.drawn(rng)], [scenes.Turn(kind, ICON_QUESTION, icon.name)])


def _statements(
    sources: Sources, split: str, number: int, rng: random.Random
) -> Iterator[dict[str, Any]]:
    order = list(sources.new_statements if split == "eval" else sources.statements)
    rng.shuffle(order)
    for index in range(min(number, len(order)) if split == "eval" else number):
        one = order[index % len(order)]
        question = STATEMENT_QUESTION.format(one.text)
        yield _row(one.boxes, [scenes.Turn("statement", question, str(one.true).lower())])


def _row(
    images: Sequence[Image.Image], turns: Sequence[scenes.Turn],
    log_probability: float | None = None,
) -> dict[str, Any]:
    messages = scenes.messages(turns)
    messages[0]["content"][:1] = [{"type": "image"}] * len(images)
    return {"messages": messages, "images": [{"bytes": _png(image)} for image in images],
            "categories": [turn.category for turn in turns],
            "caption_log_probability": log_probability}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
