"""`data:` of a recipe."""

from __future__ import annotations

from typing import ClassVar

from taid_vlm.config.kinds import Positive
from taid_vlm.config.section import Section

JSON_LINES = (".jsonl", ".ndjson")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
FILE_TYPES = (*JSON_LINES, ".json", ".parquet", *DELIMITERS)


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


class DataSpec(Section):
    """Records to train on, and held-out records for the figures.

    Args:
        train: Records to train on.
        eval: Held-out records; without them nothing is measured.
    """

    blank_is_absent: ClassVar[bool] = True

    train: DataSource
    eval: DataSource | None = None


class StageData(Section):
    """What a stage has in place of the recipe's data.

    Args:
        train: As data.train.
        eval: As data.eval.
    """

    train: DataSource | None = None
    eval: DataSource | None = None
