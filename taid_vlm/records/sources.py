"""Where records come from: files, folders and `datasets` names; map-style or streamed."""

from __future__ import annotations

import csv
import functools
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch.utils.data

from taid_vlm.config.data import COMPRESSED, FILE_TYPES, DataSource, exists, matches
from taid_vlm.errors import RecordError, SampleDropped, TaidError, nearest, nearest_sibling
from taid_vlm.io.jsonl import JsonLines
from taid_vlm.records.columns import absent_column, as_prompt
from taid_vlm.records.files import Joined, Located, Part, Stream, file_rows, kind_of
from taid_vlm.records.images import MAX_PIXELS, ImageRef
from taid_vlm.records.record import Malformed, Record, attempt, first_rows, parse_record

logger = logging.getLogger(__name__)

# what is checked before training: rows of a table, rows that need not be alike, and images
PROBED_ROWS, PROBED_LINES, PROBED_IMAGES = 256, 512, 8
T = TypeVar("T")


class _Source:
    """How the rows of one source become records.

    has_images: known once the first rows have been checked. unread: how many of the `probed` first
    rows have a column that nothing reads. origin: its name among several sources. prompts: whether
    rows may lack their answers.
    """

    prompts = False

    def __init__(self, rows: Any, source: DataSource, label: str, root: Path | None) -> None:
        self.rows, self.label, self.root = rows, label, root
        self.columns, self.max_pixels = dict(source.columns), source.max_pixels or MAX_PIXELS
        self.video, self.teacher = source.video, source.teacher
        self._named, self._absent = dict(source.columns), set(source.columns.values())
        self.has_images, self.origin = False, ""
        self.unread, self.probed = Counter[str](), 0

    def parse(self, row: Any, where: str, root: Path | None) -> Record:
        """A row as a record; raises RecordError."""
        if not isinstance(row, Mapping):
            raise RecordError(f"{where}: a row must be an object {{...}}.")
        if self._absent:
            self._absent -= row.keys()
        try:
            columns = _with_columns(row, self.columns)
            record = parse_record(as_prompt(columns) if self.prompts else columns, where, root,
                                  self.max_pixels, self.video)
        except RecordError:
            absent = absent_column(row, self._named, where)
            if absent:
                raise RecordError(absent) from None
            raise
        teacher = self.teacher if record.teacher is None else record.teacher
        if self.origin or teacher is not None:
            return replace(record, origin=self.origin, teacher=teacher)
        return record


class Records(_Source, torch.utils.data.Dataset[Record]):
    """Rows of one source, parsed when they are read."""

    def __init__(self, rows: Any, source: DataSource, label: str, root: Path | None) -> None:
        super().__init__(rows, source, label, root)
        limit = source.max_records
        self._length = len(rows) if limit is None else min(limit, len(rows))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]  # IndexError past max_records ends iteration
        root = self.rows.root(index) if isinstance(self.rows, Joined) else self.root
        return self.parse(self.rows[index], self.where(index), root)

    def columns_of(self, index: int) -> dict[str, Any]:
        """A row as it came, but for columns that the source renames."""
        return _with_columns(self.rows[index], self.columns)

    def __getitems__(self, indices: Sequence[int]) -> list[Record | Malformed]:
        """What a DataLoader asks for: a malformed row must not end a run, but be counted."""
        rows = (attempt(self.__getitem__, index) for index in indices)
        return [_of(self.origin, row) for row in rows]

    def where(self, index: int) -> str:
        """What messages call a row: file and line where there are lines."""
        return Part(self.rows, self.label, self.root, range(0)).where(index)


class StreamedRecords(_Source, torch.utils.data.IterableDataset[Record | Malformed]):
    """Records of a stream, split among processes and workers.

    block: rows of a batch over all processes. Of files, a data-loader worker yields whole batches
    in turn, so that batches are the same with any number of workers; `datasets` gives each worker
    shards of its own.
    """

    def __init__(self, rows: Any, source: DataSource, label: str, root: Path | None) -> None:
        super().__init__(rows, source, label, root)
        self.limit, self.block = source.max_records, 1
        if self.limit is not None and hasattr(rows, "take"):
            self.rows = rows.take(self.limit)

    @property
    def ends(self) -> bool:
        """Whether all of it can be read: files on this machine, or so many rows."""
        return self.limit is not None or isinstance(self.rows, Stream)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Record | Malformed]:
        rows = self.located()
        for one in share_of_worker(rows, self.block) if isinstance(self.rows, Stream) else rows:
            yield self.read(one)

    def read(self, located: Located) -> Record | Malformed:
        where, root, read = located
        return _of(self.origin, attempt(lambda: self.parse(read(), where, root)))

    def located(self, whole: bool = False) -> Iterator[Located]:
        """All rows, not parsed; whole: in a worker, too, where `datasets` would give a part."""
        if isinstance(self.rows, Stream):
            rows: Iterator[Located] = iter(self.rows)
        else:
            plain = _all_of(self.rows) if whole and hasattr(self.rows, "iter") else self.rows
            rows = ((f"{self.label}[streamed {index}]", self.root, functools.partial(dict, row))
                    for index, row in enumerate(plain))
        return _said(self.label, itertools.islice(rows, self.limit))


def _all_of(rows: Any) -> Iterator[dict[str, Any]]:
    for batch in rows.iter(1):
        yield {key: values[0] for key, values in batch.items()}


def share_of_worker(rows: Iterator[T], block: int) -> Iterator[T]:
    """Of a stream that every data-loader worker reads: this one's batches, of `block` rows."""
    worker = torch.utils.data.get_worker_info()
    for index, row in enumerate(rows):
        if worker is None or index // block % worker.num_workers == worker.id:
            yield row


def _of(origin: str, row: Record | Malformed) -> Record | Malformed:
    return replace(row, origin=origin) if origin and row.origin != origin else row


def open_records(source: DataSource | str, base: Path | None = None, prompts: bool = False
                 ) -> Records | StreamedRecords:
    """Open a source and check it.

    Args:
        source: a DataSource, or just its path.
        base: folder that a relative path starts from (default: the working directory).
        prompts: rows may lack their answers, which are to be written.

    Raises:
        TaidError: nothing there, or nothing that could be read.
        RecordError: a malformed record, with file and line.
    """
    source = DataSource(path=source) if isinstance(source, str) else source
    records = _open(source, base)
    records.prompts = prompts
    _check(records, source)
    return records


def open_rows(source: DataSource, base: Path | None = None) -> Records:
    """Open a source whose rows have columns of their own: `columns_of(i)` gives them.

    Raises:
        TaidError: nothing there, or a streamed source.
    """
    if source.streaming:
        raise TaidError(f"data: '{source.shown}' cannot be streamed here; leave streaming out.")
    records = _open(source, base)
    assert isinstance(records, Records)
    return records


def _open(source: DataSource, base: Path | None) -> Records | StreamedRecords:
    base = Path(base or ".")
    paths = [match for path in source.paths for match in matches(base / Path(path).expanduser())]
    if not paths:
        raise TaidError(f"data: '{source.shown}' matches no file.")
    _refuse_without_effect(source, paths)
    if len(paths) == 1 and not paths[0].exists():
        return _open_hub(paths[0], source)
    for path in paths:
        _refuse_odd(path, len(paths) > 1, source)
    try:
        if paths[0].is_dir():
            return _open_folder(paths[0], source, _root(source, base) or paths[0])
        return _open_files(paths, source, _root(source, base))
    except UnicodeDecodeError as error:
        raise RecordError(f"{source.shown}: not UTF-8 at byte {error.start}; save it as UTF-8."
                          ) from None
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise TaidError(f"data: '{source.shown}' cannot be read: {reason}.") from error


def _root(source: DataSource, base: Path) -> Path | None:
    return None if source.image_root is None else base / Path(source.image_root).expanduser()


def _refuse_odd(path: Path, several: bool, source: DataSource) -> None:
    if not path.exists():
        raise TaidError(f"data: '{path}' does not exist."
                        f"{nearest_sibling(path) or f' No folder {path.parent}.'}")
    if path.is_dir() and several:
        raise TaidError(f"data: '{path}' is a folder; of several paths, each must be a file. Name "
                        "it as a source of its own: data.train: [{path: ...}, ...].")
    if not path.is_dir() and not path.is_file():  # a pipe would be waited for for ever
        raise TaidError(f"data: '{source.shown}' is no regular file; save the rows as one.")


def _refuse_without_effect(source: DataSource, paths: Sequence[Path]) -> None:
    """A file has no configurations, no revision and no splits but parts of itself."""
    path = paths[0]
    alone = ("name", "revision", "data_files")
    if not path.exists():
        keys: tuple[str, ...] = ("image_root",)
    elif path.is_file() or (path / "metadata.jsonl").exists():
        keys = alone if path.is_file() and path.suffix.lower() != ".json" else (*alone, "streaming")
        keys = keys if re.match(r"train\b", source.split) else ("split", *keys)
    else:  # a saved dataset, or a folder of data files
        keys = alone if _is_saved(path) else ("revision",)
    for key in keys:
        if value := getattr(source, key):
            what = "a dataset of the hub" if not path.exists() else "what it names"
            raise TaidError(f"data: '{source.shown}': {key} = {value!r} has no effect on {what}; "
                            "take it out.")
    if source.streaming and "[" in source.split:
        raise TaidError(f"data: '{source.shown}': split = {source.split!r} takes a part, which a "
                        "stream does not have; use max_records, or leave streaming out.")


def _is_saved(path: Path) -> bool:
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


def _open_files(
    paths: Sequence[Path], source: DataSource, root: Path | None
) -> Records | StreamedRecords:
    kinds, label = {kind_of(path) for path in paths}, _label(paths)
    if ".parquet" in kinds and source.streaming:
        if len(kinds) > 1:
            raise TaidError(f"data: '{source.shown}': Parquet and other files are not streamed "
                            "together; name them as two sources.")
        return StreamedRecords(_table(paths, label, source), source, label, root or paths[0].parent)
    if source.streaming:
        return StreamedRecords(Stream(paths, root), source, label, root)
    if kinds == {".parquet"} and len({path.parent for path in paths}) == 1:
        parts = [_part(_table(paths, label, source), label, root or paths[0].parent)]
    else:
        names = [path.name for path in paths]
        parts = [_part(_table([path], path.name, source) if kind_of(path) == ".parquet" else
                       file_rows(path), _label([path], names.count(path.name) > 1),
                       root or path.parent) for path in paths]
    if len(parts) == 1 and "[" not in source.split:
        return Records(parts[0].rows, source, label, parts[0].root)
    rows = Joined(parts)
    return Records(_cut(rows, {"train": len(rows)}, source), source, label, parts[0].root)


def _part(rows: Any, label: str, root: Path | None) -> Part:
    return Part(rows, label, root, range(len(rows)))


def _label(paths: Sequence[Path], with_folder: bool = False) -> str:
    first = paths[0]
    with_folder |= first.name == "metadata.jsonl"
    name = f"{first.parent.name}/{first.name}" if with_folder else first.name
    return name if len(paths) == 1 else f"{name} and {len(paths) - 1} more"


def _cut(rows: Any, lengths: Mapping[str, int], source: DataSource) -> Any:
    """The part of the rows that `split` names, as `datasets` reads it."""
    import datasets

    if "[" not in source.split:
        return rows
    places = _guarded(source.shown, lambda: datasets.ReadInstruction.from_spec(
        source.split).to_absolute(lengths))
    return rows.cut([range(place.from_ or 0, lengths[place.splitname] if place.to is None
                           else place.to) for place in places])


def _table(paths: Sequence[Path], label: str, source: DataSource) -> Any:
    import datasets

    rows = _guarded(label, datasets.load_dataset, "parquet",
                    data_files=[str(path) for path in paths], split="train",
                    streaming=source.streaming)
    return _without_decoding(rows)


def _open_folder(path: Path, source: DataSource, root: Path) -> Records | StreamedRecords:
    """An image folder (metadata.jsonl with `file_name`), a saved dataset, or data files."""
    import datasets

    metadata = path / "metadata.jsonl"
    if metadata.is_file():
        records = _open_files([metadata], source, root)
        records.columns = {"image": "file_name", **records.columns}
        return records
    if _is_saved(path):
        rows = _split(_guarded(path.name, datasets.load_from_disk, str(path)), source)
        rows = rows.to_iterable_dataset() if source.streaming else rows
    elif source.data_files or _holds_data(path):
        for name in source.files:
            if not exists(path / name):
                raise TaidError(f"data: '{source.shown}' has no file '{name}' (data_files)."
                                f"{nearest_sibling(path / name)}")
        rows = _load(str(path), path.name, source)
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


def _split(rows: Any, source: DataSource) -> Any:
    """The split (or part of it) of a saved dataset, which may have none."""
    parts = rows if isinstance(rows, Mapping) else {"train": rows}
    name = re.split(r"[\[+]", source.split)[0]
    if name not in parts:
        raise TaidError(f"data: '{source.shown}' has no split '{name}'.{nearest(name, parts)}")
    if name == source.split:
        return parts[name]
    import datasets

    places = _guarded(source.shown, lambda: datasets.ReadInstruction.from_spec(
        source.split).to_absolute({key: len(part) for key, part in parts.items()}))
    return datasets.concatenate_datasets([
        parts[place.splitname].select(range(place.from_ or 0, len(parts[place.splitname])
                                            if place.to is None else place.to))
        for place in places])


def _open_hub(path: Path, source: DataSource) -> Records | StreamedRecords:
    (name,) = source.paths
    if path.suffix in (*FILE_TYPES, *COMPRESSED) or not re.fullmatch(
            r"[\w.-]+(/[\w.-]+)?", name):
        hint = nearest_sibling(path) or f" No folder {path.parent}."
        raise TaidError(f"data: '{name}' does not exist.{hint}")
    try:
        rows = _load(name, name, source)
    except TaidError as error:  # so that no network is blamed for a typing error
        reason = str(error).rstrip(".")
        raise TaidError(f"{reason}. There is no file or folder '{name}' here, so it was taken for "
                        f"a name on the hub.{nearest_sibling(path)}") from error
    return _wrap(rows, source, name, None)


def _load(name: str, label: str, source: DataSource) -> Any:
    import datasets

    return _guarded(label, datasets.load_dataset, name, source.name,
                    data_files=list(source.files) or None, revision=source.revision,
                    split=source.split, streaming=source.streaming)


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
        raise TaidError(f"data: '{label}' cannot be loaded: {reason[0]:.400}") from error


def _said(label: str, rows: Iterator[T]) -> Iterator[T]:
    """The same rows; what breaks the stream is one message."""
    try:
        yield from rows
    except TaidError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TaidError(f"data: '{label}' cannot be loaded: {reason[0]:.400}") from error


def _with_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    if not columns:
        return dict(row)
    taken = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in taken}
    return {**kept, **{ours: row.get(theirs) for ours, theirs in columns.items()}}


def _check(records: Records | StreamedRecords, source: DataSource) -> None:
    """Fail before training, not in the middle of it, where the first rows show what is wrong.

    How many these are does not grow with the data: later ones are checked when they are read.
    """
    number = PROBED_IMAGES
    if isinstance(records, Records):
        number = PROBED_LINES if isinstance(
            records.rows, (JsonLines, Joined, list)) else PROBED_ROWS
    row, images, problems = None, list[ImageRef](), list[SampleDropped]()
    for row in first_rows(records, number):
        if isinstance(row, Malformed):
            if row.reason == RecordError.reason:
                raise RecordError(row.problem)
            continue
        records.probed += 1
        records.unread.update(row.unread)
        images += row.images[:1] if len(images) < PROBED_IMAGES else ()
    if row is None:
        raise TaidError(f"data: '{source.shown}' holds no records.")
    for name in sorted(records._absent):
        logger.warning("data: '%s': columns names '%s', which none of the first %d rows has.",
                       source.shown, name, records.probed)
    records.has_images = bool(images)
    for image in images:  # one that is broken is skipped and counted, but all: the paths are wrong
        try:
            image.load()
            return
        except SampleDropped as problem:
            problems.append(problem)
    if problems:
        raise TaidError(
            f"data: no image of '{source.shown}' can be read; the first: {problems[0]}.",
            mend="Relative paths start at the data file's folder; set data.<side>.image_root for "
                 "another.", code="no_images"
        )
