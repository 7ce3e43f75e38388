"""`data:` of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from taid_vlm.config.kinds import Positive, Rate, wanted
from taid_vlm.config.section import Section

JSON_LINES = (".jsonl", ".ndjson")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
FRAMES, MAX_FRAMES = 8, 64  # of a video
TAR = ".tar"
COMPRESSED = (".gz", ".zst")  # behind JSON_LINES and DELIMITERS
FILE_TYPES = (*JSON_LINES, ".json", ".parquet", *DELIMITERS, TAR)


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _sources(value: Any) -> Any:
    if not value:
        raise ValueError(" = [], but it must name at least one source.")
    return tuple(value)


Paths = Annotated[str | Annotated[tuple[str, ...], Field(min_length=1)], BeforeValidator(_listed),
                  wanted("text, or a list of texts")]


Mixture = Annotated[dict[str, Rate], Field(min_length=1), wanted(
    "{NAME: weight, ...} of teachers, with weights above 0")]


class VideoSpec(Section):
    """Which frames of a video are shown, the same ones to both models: spread over all of it, the
    first and the last among them.

    Args:
        frames: So many of every video (8 unless said); one with fewer shows some of them twice.
        fps: So many a second instead.
        max_frames: With fps: never more than that (64 unless said).
    """

    frames: Positive | None = None
    fps: Rate | None = None
    max_frames: Positive | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.fps is not None and self.frames is not None:
            raise ValueError("frames and fps cannot both be set; take one of them out.")
        if self.fps is None and self.max_frames is not None:
            raise ValueError("max_frames goes with fps; frames alone says how many are shown.")
        return self

    def number(self, seconds: float, total: int) -> int:
        """How many frames are shown of a video of `total` frames."""
        if self.fps is None:
            return self.frames or FRAMES
        return max(1, min(round(seconds * self.fps), total, self.max_frames or MAX_FRAMES))


class DataSource(Section):
    """One source of records: JSONL, JSON, Parquet, CSV, TSV, tar, a folder or a dataset of the hub.

    Args:
        path: A file, a pattern (shards/*.jsonl), a list of both, a folder or a hub name. JSONL, CSV
            and TSV may end in .gz or .zst. A relative path starts from the working directory or, if
            nothing is there, from the recipe's folder.
        weight: In a list of sources, how often each row is seen in an epoch: 2 is twice, 0.5 a
            half of the rows, drawn once by the seed. Where a source of the list is streamed, its
            share of the rows, in proportion to the others' weights.
        split: Split of a dataset; of any data that are not streamed also a part, train[:10%].
        name: Configuration of a dataset (`name` of load_dataset).
        revision: Commit, tag or branch of a dataset of the hub.
        data_files: Which files of a folder or of a dataset of the hub.
        streaming: Read in order and without downloading; training then needs train.max_steps.
        columns: Our columns and what the data call them: {prompt: question, completion: answer}.
        image_root: Folder that relative image paths start from, if not the data file's own.
        max_records (records): Only the first so many.
        max_pixels (pixels): An image of more, as its header says, is not decoded (67,108,864 unless
            said); its record is left out and counted.
        video: Which frames of its videos are shown, if not those that data.video says.
        teacher: Of several teachers, the name of the one that teaches its rows, or a mixture:
            {NAME: weight, NAME: weight}. A row's own column `teacher` goes before it.
    """

    bare: ClassVar[str] = "path"

    path: Paths
    weight: Rate | None = None
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    data_files: Paths | None = None
    streaming: bool = False
    columns: dict[str, str] = {}
    image_root: str | None = None
    max_records: Positive | None = None
    max_pixels: Positive | None = None
    video: VideoSpec | None = None
    teacher: Annotated[str | Mixture, wanted(
        "a teacher's name, or {NAME: weight, ...} with weights above 0")] | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def files(self) -> tuple[str, ...]:
        return (self.data_files,) if isinstance(self.data_files, str) else self.data_files or ()

    @property
    def shown(self) -> str:
        """The path as messages and results have it."""
        return ", ".join(self.paths)


Sources = Annotated[
    Annotated[DataSource, Tag("@one")] | Annotated[
        tuple[DataSource, ...], BeforeValidator(_sources), Tag("@list")],
    Discriminator(lambda value: "@list" if isinstance(value, (list, tuple)) else "@one")]


def matches(path: Path) -> list[Path]:
    """The path, or what lies at it as a pattern, in the order of the names."""
    if path.exists() or not any(sign in str(path) for sign in "*?["):
        return [path]
    return [Path(name) for name in sorted(glob(str(path), recursive=True))]


def exists(path: Path) -> bool:
    return any(match.exists() for match in matches(path))


def listed(side: DataSource | tuple[DataSource, ...] | None) -> tuple[DataSource, ...]:
    """The sources of one side of `data`."""
    return (side,) if isinstance(side, DataSource) else side or ()


def replaced(side: Any, change: Callable[[DataSource], DataSource]) -> Any:
    """The side with every source changed."""
    return tuple(map(change, side)) if isinstance(side, tuple) else side and change(side)


class DataSpec(Section):
    """Records to train on, and held-out records for the figures.

    Args:
        train: Records to train on; several sources are a list, each with its weight.
        eval: Held-out records; without them nothing is measured. Of a list, all records are.
        video: Which frames of videos are shown.
    """

    blank_is_absent: ClassVar[bool] = True

    train: Sources
    eval: Sources | None = None
    video: VideoSpec | None = None

    @property
    def sides(self) -> dict[str, DataSource | tuple[DataSource, ...] | None]:
        """By name, "train" and "eval"."""
        return {"train": self.train, "eval": self.eval}

    def sources(self, side: str) -> tuple[DataSource, ...]:
        """Those of a side, each with what holds for all of them."""
        return tuple(
            source if source.video or self.video is None else
            source.model_copy(update={"video": self.video}) for source in listed(self.sides[side]))


class StageData(Section):
    """What a stage has in place of the recipe's data.

    Args:
        train: As data.train.
        eval: As data.eval.
    """

    train: Sources | None = None
    eval: Sources | None = None
