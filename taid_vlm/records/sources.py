"""Where records come from: JSONL, Parquet, CSV and image folders on disk, and `datasets` names."""

from __future__ import annotations

import contextlib
import csv
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.utils.data

from taid_vlm.config.data import DELIMITERS, FILE_TYPES, JSON_LINES, DataSource
from taid_vlm.errors import RecordError, SampleDropped, TaidError, nearest, nearest_sibling
from taid_vlm.io.jsonl import JsonLines, parse_json
from taid_vlm.records.images import MAX_PIXELS, ImageRef
from taid_vlm.records.record import Malformed, Record, attempt, first_rows, parse_record

# what is checked before training: rows of a table, rows that need not be alike, and images
PROBED_ROWS, PROBED_LINES, PROBED_IMAGES = 256, 512, 8
LONGEST_CELL = 2**28  # characters of CSV and TSV


class Records(torch.utils.data.Dataset[Record]):
    """Rows of one source, parsed when they are read."""

    def __init__(self, rows: Any, source: DataSource, label: str, root: Path | None) -> None:
        self.rows, self.label, self.root = rows, label, root
        self.columns, self.max_pixels = dict(source.columns), _max_pixels(source)
        self.video = source.video
        limit = source.max_records
        self._length = len(rows) if limit is None else min(limit, len(rows))
        self.has_images = False  # known once the rows have been checked

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]  # IndexError past max_records ends iteration
        return parse_record(self.columns_of(index), self.where(index), self.root, self.max_pixels,
                            self.video)

    def columns_of(self, index: int) -> dict[str, Any]:
        """A row as it came, but for columns that the source renames."""
        return _renamed(self.rows[index], self.columns)

    def __getitems__(self, indices: Sequence[int]) -> list[Record | Malformed]:
        """What a DataLoader asks for: a malformed row must not end a run, but be counted."""
        return [attempt(self.__getitem__, index) for index in indices]

    def where(self, index: int) -> str:
        """What messages call a row: file and line where there are lines."""
        line = getattr(self.rows, "line", None)
        return f"{self.label}:{line(index)}" if line else f"{self.label}[{index}]"


class StreamedRecords(torch.utils.data.IterableDataset[Record | Malformed]):
    """Records of a streamed dataset, split among processes and workers."""

    def __init__(self, rows: Any, source: DataSource, label: str, root: Path | None) -> None:
        self.rows = rows if source.max_records is None else rows.take(source.max_records)
        self.label, self.root = label, root
        self.columns, self.max_pixels = dict(source.columns), _max_pixels(source)
        self.video = source.video
        self.has_images = False  # known once the first rows have been checked

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Record | Malformed]:
        following = functools.partial(_guarded, self.label, next, iter(self.rows), None)
        for index, row in enumerate(iter(following, None)):
            where = f"{self.label}[streamed {index}]"
            yield attempt(parse_record, _renamed(row, self.columns), where, self.root,
                          self.max_pixels, self.video)


def _max_pixels(source: DataSource) -> int:
    return source.max_pixels or MAX_PIXELS


def open_records(source: DataSource | str, base: Path | None = None) -> Records | StreamedRecords:
    """Open a source and check it.

    Args:
        source: a DataSource, or just its path.
        base: folder that a relative path starts from (default: the working directory).

    Raises:
        TaidError: nothing there, or nothing that could be read.
        RecordError: a malformed record, with file and line.
    """
    source = DataSource(path=source) if isinstance(source, str) else source
    _refuse_without_effect(source, Path(base or "."))
    records = _open(source, base)
    _check(records, source)
    return records


def _refuse_without_effect(source: DataSource, base: Path) -> None:
    """A file has no splits and no configurations, and only Parquet is read in a stream."""
    path = base / Path(source.path).expanduser()
    wrong: dict[str, Any] = {}
    if not path.exists():
        wrong = {"image_root": source.image_root}
    elif path.is_file() or (path / "metadata.jsonl").exists():
        streamed = path.is_file() and path.suffix.lower() == ".parquet"
        wrong = {"split": None if source.split == "train" else source.split, "name": source.name,
                 "streaming": (source.streaming and not streamed) or None}
    else:  # a saved dataset, or a folder of data files
        saved = (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()
        wrong = {"name": source.name, "streaming": source.streaming or None} if saved else {}
    for key, value in wrong.items():
        if value is not None:
            what = "a dataset of the hub" if not path.exists() else "what it names"
            raise TaidError(f"data: '{source.path}': {key} = {value!r} has no effect on {what}; "
                            "take it out.")


def open_rows(source: DataSource, base: Path | None = None) -> Records:
    """Open a source whose rows have columns of their own: `columns_of(i)` gives them.

    Raises:
        TaidError: nothing there, or a streamed source.
    """
    if source.streaming:
        raise TaidError(f"data: '{source.path}' cannot be streamed here; leave streaming out.")
    records = _open(source, base)
    assert isinstance(records, Records)
    return records


def _open(source: DataSource, base: Path | None) -> Records | StreamedRecords:
    base = Path(base or ".")
    path = base / Path(source.path).expanduser()
    if not path.exists():
        return _open_hub(path, source)
    if not path.is_dir() and not path.is_file():  # a pipe would be waited for for ever
        raise TaidError(f"data: '{source.path}' is no regular file; save the rows as one.")
    try:
        return _open_path(path, source, base)
    except UnicodeDecodeError as error:
        raise RecordError(f"{path.name}: not UTF-8 at byte {error.start}; save it as UTF-8."
                          ) from None
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise TaidError(f"data: '{source.path}' cannot be read: {reason}.") from error


def _open_path(path: Path, source: DataSource, base: Path) -> Records | StreamedRecords:
    root = path if path.is_dir() else path.parent
    if source.image_root is not None:
        root = base / Path(source.image_root).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir():
        return _open_folder(path, source, root)
    if suffix in JSON_LINES:
        return Records(JsonLines(path), source, path.name, root)
    if suffix == ".json":
        return Records(_json_rows(path), source, path.name, root)
    if suffix in DELIMITERS:
        return Records(_delimited(path, DELIMITERS[suffix]), source, path.name, root)
    if suffix == ".parquet":
        return _open_table(path, source, root)
    raise TaidError(f"{path}: file type '{path.suffix}' is not supported."
                    f"{nearest(path.suffix, FILE_TYPES)}")


def _open_table(path: Path, source: DataSource, root: Path) -> Records | StreamedRecords:
    import datasets

    rows = _guarded(path.name, datasets.load_dataset, "parquet", data_files=str(path),
                    split="train", streaming=source.streaming)
    return _wrap(rows, source, path.name, root)


def _delimited(path: Path, delimiter: str) -> list[dict[str, Any]]:
    """CSV or TSV with a header; every cell stays text ("2" and "None" are answers too)."""
    csv.field_size_limit(LONGEST_CELL)  # a cell may hold an image in base64
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file, delimiter=delimiter))
    return [{key: value or None for key, value in row.items()} for row in rows]


def _json_rows(path: Path) -> list[dict[str, Any]] | JsonLines:
    try:
        rows = parse_json(path.read_bytes(), path.name)
    except RecordError:
        with contextlib.suppress(RecordError, IndexError):  # JSON lines under another name
            lines = JsonLines(path)
            _ = lines[0]
            return lines
        raise
    if isinstance(rows, dict) and rows and all(isinstance(row, dict) for row in rows.values()):
        rows = list(rows.values())  # {id: row}, as some benchmarks are written
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecordError(f"{path.name}: must hold a list of objects [{{...}}, ...].")
    return rows


def _open_folder(path: Path, source: DataSource, root: Path) -> Records | StreamedRecords:
    """An image folder (metadata.jsonl with `file_name`), a saved dataset, or data files."""
    import datasets

    metadata = path / "metadata.jsonl"
    if metadata.is_file():
        records = Records(JsonLines(metadata), source, f"{path.name}/metadata.jsonl", root)
        records.columns = {"image": "file_name", **records.columns}
        return records
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        rows = _guarded(path.name, datasets.load_from_disk, str(path))
        rows = _split(rows, source) if isinstance(rows, Mapping) else rows
    elif _holds_data(path):
        rows = _guarded(path.name, datasets.load_dataset, str(path), source.name,
                        split=source.split, streaming=source.streaming)
    else:
        raise TaidError(f"{path}: a folder needs metadata.jsonl (one line per image, with "
                        "'file_name'), or Parquet, JSONL or CSV files, or a saved dataset.")
    return _wrap(rows, source, path.name, root)


def _holds_data(path: Path) -> bool:
    """Whether data files lie in a folder, or in folders inside it as on the hub (data/, x/train/).

    The working directory, and what holds it, has to have some of its own: `datasets` would read
    everything below it.
    """
    around = Path.cwd().is_relative_to(path.resolve())
    return any(file.suffix in (".parquet", ".jsonl", ".csv")
               for pattern in (("*",) if around else ("*", "*/*", "*/*/*"))
               for file in path.glob(pattern))


def _split(parts: Mapping[str, Any], source: DataSource) -> Any:
    if source.split not in parts:
        raise TaidError(f"data: '{source.path}' has no split '{source.split}'."
                        f"{nearest(source.split, parts)}")
    return parts[source.split]


def _open_hub(path: Path, source: DataSource) -> Records | StreamedRecords:
    if path.suffix in FILE_TYPES or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path):
        hint = nearest_sibling(path) or f" No folder {path.parent}."
        raise TaidError(f"data: '{source.path}' does not exist.{hint}")
    import datasets

    rows = _guarded(source.path, datasets.load_dataset, source.path, source.name,
                    split=source.split, streaming=source.streaming)
    return _wrap(rows, source, source.path, None)


def _wrap(rows: Any, source: DataSource, label: str, root: Path | None) -> Any:
    rows = _without_decoding(rows)
    kind = StreamedRecords if source.streaming else Records
    return kind(rows, source, label, root)


def _without_decoding(rows: Any) -> Any:
    """Leave images as bytes: a broken one must cost one record, not the run."""
    if rows.features is None:
        return rows
    import datasets

    def undecoded(feature: Any) -> Any:
        if isinstance(feature, (datasets.Image, datasets.Video)):
            return type(feature)(decode=False)
        if isinstance(feature, datasets.List):
            return datasets.List(undecoded(feature.feature))
        if isinstance(feature, dict):
            return {key: undecoded(value) for key, value in feature.items()}
        return feature

    for column, feature in rows.features.items():
        if (plain := undecoded(feature)) != feature:
            rows = rows.cast_column(column, plain)
    return rows


def _guarded(label: str, load: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a loader of `datasets`; its many exceptions become one message."""
    try:
        return load(*args, **kwargs)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TaidError(f"data: '{label}' cannot be loaded: {reason[0]}") from error


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    taken = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in taken}
    return {**kept, **{ours: row.get(theirs) for ours, theirs in columns.items()}}


def _check(records: Records | StreamedRecords, source: DataSource) -> None:
    """Fail before training, not in the middle of it, where the first rows show what is wrong.

    How many these are does not grow with the data: later ones are checked when they are read.
    """
    number = PROBED_IMAGES
    if isinstance(records, Records):
        number = PROBED_LINES if isinstance(records.rows, (JsonLines, list)) else PROBED_ROWS
    row, images, problems = None, list[ImageRef](), list[SampleDropped]()
    for row in first_rows(records, number):
        if isinstance(row, Malformed):
            raise RecordError(row.problem)
        images += row.images[:1] if len(images) < PROBED_IMAGES else ()
    if row is None:
        raise TaidError(f"data: '{source.path}' holds no records.")
    records.has_images = bool(images)
    for image in images:  # one that is broken is skipped and counted, but all: the paths are wrong
        try:
            image.load()
            return
        except SampleDropped as problem:
            problems.append(problem)
    if problems:
        raise TaidError(
            f"data: no image of '{source.path}' can be read; the first: {problems[0]}.",
            mend="Relative paths start at the data file's folder; set data.<side>.image_root for "
                 "another.", code="no_images"
        )
