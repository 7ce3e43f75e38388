"""`data:` of a recipe."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import model_validator

from taid_vlm.config.kinds import Positive, Rate
from taid_vlm.config.section import Section

JSON_LINES = (".jsonl", ".ndjson")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
FRAMES, MAX_FRAMES = 8, 64  # of a video
FILE_TYPES = (*JSON_LINES, ".json", ".parquet", *DELIMITERS)


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
    """Records of one side: JSONL, JSON, Parquet, CSV, TSV, a folder, or a dataset of the hub.

    Args:
        path: A file, a folder or a hub name. A relative path starts from the working directory or,
            if nothing is there, from the recipe's folder.
        split: Split of a dataset.
        name: Configuration of a dataset (`name` of load_dataset).
        streaming: Read without downloading; training then needs train.max_steps.
        columns: Our columns and what the data call them: {prompt: question, completion: answer}.
        image_root: Folder that relative image paths start from, if not the data file's own.
        max_records (records): Only the first so many.
        max_pixels (pixels): An image of more, as its header says, is not decoded (67,108,864 unless
            said); its record is left out and counted.
        video: Which frames of its videos are shown, if not those that data.video says.
    """

    bare: ClassVar[str] = "path"

    path: str
    split: str = "train"
    name: str | None = None
    streaming: bool = False
    columns: dict[str, str] = {}
    image_root: str | None = None
    max_records: Positive | None = None
    max_pixels: Positive | None = None
    video: VideoSpec | None = None


class DataSpec(Section):
    """Records to train on, and held-out records for the figures.

    Args:
        train: Records to train on.
        eval: Held-out records; without them nothing is measured.
        video: Which frames of videos are shown.
    """

    blank_is_absent: ClassVar[bool] = True

    train: DataSource
    eval: DataSource | None = None
    video: VideoSpec | None = None

    @property
    def sources(self) -> dict[str, DataSource]:
        """By side, "train" and "eval" where there is one."""
        sides = {"train": self.train, "eval": self.eval}
        return {side: source for side, source in sides.items() if source is not None}


class StageData(Section):
    """What a stage has in place of the recipe's data.

    Args:
        train: As data.train.
        eval: As data.eval.
    """

    train: DataSource | None = None
    eval: DataSource | None = None
