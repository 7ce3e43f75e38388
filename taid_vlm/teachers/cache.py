"""A teacher that was asked once: its hidden states on disk, the head in memory.

    DIR/taid_vlm.json       the manifest, written last: what the cache holds, and every file's hash
    DIR/identity.json       whose hidden states these are, and how they were computed
    DIR/head.safetensors    weight [V, H] and, where there is one, bias [V]
    DIR/teacher/            config, processor and chat template, as a model's folder has them
    DIR/shards/*.safetensors, see `shards.py`
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import get_worker_info
from transformers import AutoConfig, PretrainedConfig

from taid_vlm.batch.collator import TeacherRow
from taid_vlm.batch.forward import Batch
from taid_vlm.batch.sparse import Draws, EntrySignal
from taid_vlm.config.model import DESCRIPTION, TeacherSpec
from taid_vlm.errors import TaidError
from taid_vlm.fused.heads import Head
from taid_vlm.io.files import read_json
from taid_vlm.io.hashing import file_sha256
from taid_vlm.io.manifest import read_manifest
from taid_vlm.models.forward import Autocast
from taid_vlm.models.head import LogitTransform, keeps_type
from taid_vlm.records.videos import Picture
from taid_vlm.teachers.shards import (
    AGAIN,
    HIDDEN,
    SIGNALS,
    SPARSE,
    Key,
    checksum,
    key_of,
    opened,
    pixels_hash,
    read_index,
    source_hash,
)
from taid_vlm.teachers.signal import HiddenSignal, SparseSignal, most_likely
from taid_vlm.teachers.sparse import Signal

logger = logging.getLogger(__name__)

KIND = "teacher_cache"
SHARDS, HEAD, IDENTITY = "shards", "head.safetensors", "identity.json"
DTYPES = {str(x).removeprefix("torch."): x
          for x in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}



class TeacherCache:
    """A finished cache, read through memory maps; picklable, for data-loader workers.

    A DistillationCollator takes it as `stored`: it puts `teacher_hidden` [N_teacher, H] into a
    batch and leaves of the teacher's inputs only what the batch's masks belong to.

    Args:
        folder: that `taid-vlm cache` wrote.

    Raises:
        TaidError: no cache, one that is not finished, or a file that is not as it was written.
    """

    def __init__(self, folder: str | Path, trust_remote_code: bool = False) -> None:
        self.folder, self.trust_remote_code = Path(folder).expanduser(), trust_remote_code
        self._files: dict[int, Any] = {}
        self._hashed: dict[int, tuple[Sequence[Picture], bytes]] = {}  # of one batch's images
        try:
            self.facts = _manifest(self.folder)
            self.identity: dict[str, Any] = read_json(self.folder / IDENTITY, "a cache's identity")
            self.names = sorted(self.facts["shards"])
            self.dtype = DTYPES[self.identity["computed"]["hidden"]]
            self._take(read_index(self.folder / SHARDS / name, self.facts["identity"])
                       for name in self.names)
        except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
            if isinstance(error, TaidError):
                raise
            raise TaidError(f"teacher.cache: '{self.folder}' is not as it was written "
                            f"({error!r:.80}).", mend=AGAIN) from error

    def _take(self, indices: Iterable[Mapping[str, np.ndarray[Any, Any]]]) -> None:
        """Of all shards, one behind the other."""
        parts = list(indices)
        self._index = {name: np.concatenate([part[name] for part in parts])
                       for name in ("ids", "images", "sources", "sums", "kind")}
        self._spans = np.concatenate([np.stack([part["starts"][:-1], part["starts"][1:]], 1)
                                      for part in parts])
        self._shard = np.repeat(np.arange(len(parts)), [len(part["ids"]) for part in parts])
        self._by_ids = _Lookup(self._index["ids"])
        self._by_source = _Lookup(self._index["sources"])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": {}, "_hashed": {}}

    @property
    def records(self) -> int:
        """How many it holds."""
        return len(self._shard)

    @functools.cached_property
    def config(self) -> PretrainedConfig:
        """The teacher's."""
        config: PretrainedConfig = AutoConfig.from_pretrained(
            self.folder / DESCRIPTION, trust_remote_code=self.trust_remote_code)
        return config

    @property
    def rows(self) -> int:
        """Of the teacher's head."""
        return int(self.identity["head"]["rows"])

    @property
    def bytes_per_token(self) -> float:
        """On disk, for the hidden state and all that is kept beside it."""
        return self.bytes / max(int(self.facts["tokens"]), 1)

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return int(sum(self.facts["shards"].values()))

    def head(self, device: torch.device | str = "cpu") -> Head:
        """The teacher's head, with what stands behind it."""
        tensors = {name: x.to(device) for name, x in load_file(self.folder / HEAD).items()}
        behind = self.identity["head"]
        return Head(tensors["weight"], tensors.get("bias"),
                    LogitTransform(behind["scale"], behind["softcap"]))

    @property
    def signal(self) -> Signal:
        """What is kept of the records to train on; of held-out ones hidden states are."""
        return Signal(**self.identity["signal"])

    # ----- a batch --------------------------------------------------------------------------

    def __call__(self, rows: Sequence[TeacherRow], batch: Mapping[str, Any]) -> dict[str, Any]:
        changed = {"teacher_inputs": {
            key: batch["teacher_inputs"][key] for key in ("input_ids", "attention_mask")}}
        try:
            return changed | self._signals([row for row in rows if row.positions])
        except TaidError as error:
            if get_worker_info() is None:
                raise
            # a worker's error would reach the user inside its traceback: the main process raises
            return {**changed, "teacher_problem": str(error)}
        finally:
            self._hashed.clear()

    def _signals(self, rows: Sequence[TeacherRow]) -> dict[str, Tensor]:
        """`teacher_NAME` of every kind that is kept of all rows."""
        kept = [self.places(row) for row in rows]
        found: dict[str, Tensor] = {}
        for kind in (HIDDEN, SPARSE) if self.signal.is_sparse else (HIDDEN,):
            if all(kind in places for places in kept):
                parts = [self._read(*places[kind], row)
                         for places, row in zip(kept, rows, strict=True)]
                found |= {f"teacher_{name}": torch.cat([
                    empty, *(part[name].to(empty.dtype) for part in parts)])
                    for name, empty in self._empty(kind).items()}
        if not found:
            raise TaidError(f"'{self.folder}' holds hidden states of some of "
                            f"{', '.join(row.source for row in rows)} only.", mend=AGAIN)
        return found

    def _empty(self, kind: str) -> dict[str, Tensor]:
        """Of no token: what a record's tensors look like."""
        if kind == HIDDEN:
            return {"hidden": torch.zeros(0, self.identity["head"]["width"], dtype=self.dtype)}
        k = self.signal.k
        return {"entries": torch.zeros(0, k, dtype=torch.long), "log_probs": torch.zeros(0, k),
                "log_rest": torch.zeros(0)}

    def holds(self, ids: Sequence[int], images: Sequence[Picture]) -> bool:
        """Whether a record of these tokens and images is kept."""
        key = self._key(ids, images)
        return any(self._index["images"][place].tobytes() == key.images
                   for place in self._by_ids.places(key.ids))

    def _key(self, ids: Sequence[int], images: Sequence[Picture]) -> Key:
        """Its pixels are hashed once, when they are asked for first."""
        if id(images) not in self._hashed:
            self._hashed[id(images)] = images, pixels_hash(images)
        return key_of(ids, self._hashed[id(images)][1])

    def places(self, row: TeacherRow) -> dict[str, tuple[int, Tensor]]:
        """By kind where a record's signal is, and which of its tokens are asked for; raises
        TaidError where there is none."""
        key, known, found = self._key(row.ids, row.images), False, dict[str, tuple[int, Tensor]]()
        for place in self._by_ids.places(key.ids):
            if self._index["images"][place].tobytes() == key.images:
                known, at = True, self._positions(place, row.positions)
                if at is not None:
                    found.setdefault(str(self._index["kind"][place]), (place, at))
        if known and not found:
            raise TaidError(
                f"'{self.folder}' holds {row.source}, but not at all of its answer tokens that "
                "this pair compares: it was built for another student, alignment or supervision.",
                mend=AGAIN)
        if not found:
            raise self._missing(row, key)
        return found

    def _positions(self, place: int, wanted: Sequence[int]) -> Tensor | None:
        """Where the wanted positions stand among a record's, None if one is not there."""
        stored = self._slice(place, "positions").long()
        at = torch.searchsorted(stored, torch.tensor(wanted, dtype=torch.long))
        if len(stored) == 0 or bool((at >= len(stored)).any()) or \
                stored[at].tolist() != list(wanted):
            return None
        return at

    def _read(self, place: int, at: Tensor, row: TeacherRow) -> dict[str, Tensor]:
        """What is stored of some of a record's tokens."""
        names = SIGNALS[str(self._index["kind"][place])]
        signal = {name: self._slice(place, name) for name in names}
        if checksum(signal, self._slice(place, "positions").tolist()) != int(
                self._index["sums"][place]):
            name = self.names[self._shard[place]]
            raise TaidError(f"'{self.folder / SHARDS / name}' is not as it was written: what it "
                            f"holds of {row.source} has another checksum.", mend=AGAIN)
        return {name: values[at] for name, values in signal.items()}

    def _slice(self, place: int, name: str) -> Tensor:
        start, end = self._spans[place]
        values: Tensor = self._open(place).get_slice(name)[int(start):int(end)]
        return values

    def _open(self, place: int) -> Any:
        number = int(self._shard[place])
        if number not in self._files:
            path = self.folder / SHARDS / self.names[number]
            self._files[number] = opened(path)
        return self._files[number]

    def _missing(self, row: TeacherRow, key: Key) -> TaidError:
        """What is known of a record that has no entry: what differs, or that nothing is there."""
        same_ids = self._by_ids.places(key.ids)
        same_name = self._by_source.places(source_hash(row.source))
        if len(same_ids):
            what = "with the same tokens, but other images"
        elif any(self._index["images"][i].tobytes() == key.images for i in same_name):
            what = ("with the same images, but other tokens: its text has changed since" if
                    row.images else "with other tokens: its text has changed since")
        elif len(same_name):
            what = "with other tokens and other images"
        else:
            return TaidError(f"'{self.folder}' does not hold {row.source}; it holds "
                             f"{self.records:,} records of {self._sides()}.", mend=AGAIN)
        return TaidError(f"'{self.folder}' holds {row.source} {what}.", mend=AGAIN)

    def _sides(self) -> str:
        paths = (source["path"] for side in self.identity["data"] for source in side["sources"])
        return ", ".join(dict.fromkeys(f"'{path}'" for path in paths))


class _Lookup:
    """Which rows of hashes [R, 16] are a given one."""

    def __init__(self, hashes: np.ndarray[Any, Any]) -> None:
        self.hashes = hashes
        first = np.ascontiguousarray(hashes[:, :8]).view(np.uint64)[:, 0]
        self.order = np.argsort(first, kind="stable")
        self.first = first[self.order]

    def places(self, wanted: bytes) -> list[int]:
        first = np.frombuffer(wanted[:8], np.uint64)[0]
        start, end = (int(np.searchsorted(self.first, first, side)) for side in ("left", "right"))
        return [int(i) for i in self.order[start:end] if self.hashes[i].tobytes() == wanted]


# ----- files --------------------------------------------------------------------------------


def _manifest(folder: Path) -> dict[str, Any]:
    """Of a cache whose files are as they were written, but for the insides of shards: those are
    checked record by record, when they are read."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("kind") != KIND:
        state = "is no folder" if not folder.is_dir() else \
            "holds a cache that is not finished" if (folder / IDENTITY).is_file() else \
            "holds no cache"
        mend = "`taid-vlm cache RECIPE.yaml --output DIR` builds one, and goes on with one that " \
               "was interrupted."
        raise TaidError(f"teacher.cache: '{folder}' {state}.", mend=mend)
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise TaidError(f"teacher.cache: '{path}' is missing.", mend=AGAIN)
        size = manifest["shards"].get(path.name) if path.parent.name == SHARDS else None
        whole = file_sha256(path).hex() == digest if size is None else path.stat().st_size == size
        if not whole:
            raise TaidError(f"teacher.cache: '{path}' is not as it was written.", mend=AGAIN)
    return manifest


def template_kwargs(spec: TeacherSpec) -> dict[str, Any]:
    """Variables of the teacher's chat template: the recipe's, or those its cache was built with."""
    if spec.cache is None:
        return spec.chat_template_kwargs
    identity = read_json(Path(spec.cache).expanduser() / IDENTITY, "a teacher cache's identity")
    return dict(identity["chat_template_kwargs"])


# ----- the teacher --------------------------------------------------------------------------


class CachedTeacher:
    """A teacher whose hidden states come with the batch, and whose head alone is in memory.

    Args:
        accelerator: says on which device, and brings its mixed precision.
    """

    model = None  # none is loaded
    top = None  # of held-out records hidden states say all, whatever is kept of the others

    def __init__(self, cache: TeacherCache, accelerator: Accelerator | None = None) -> None:
        self.cache = cache
        self.head = cache.head("cpu" if accelerator is None else accelerator.device)
        self.autocast: Autocast = (
            contextlib.nullcontext if accelerator is None else accelerator.autocast)
        if keeps_type(self.head.weight.dtype):
            self.autocast = functools.partial(
                torch.autocast, self.head.weight.device.type, enabled=False)

    @property
    def rows(self) -> int:
        return self.head.rows

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """[N, V], see `Teacher`."""
        with self.autocast():
            z = nn.functional.linear(self._stored(batch), self.head.weight, self.head.bias)
        return self.head.transform.forward(z)

    def hidden(self, batch: Batch) -> HiddenSignal:
        """As they were cached, with the head."""
        return HiddenSignal(self._stored(batch), self.head)

    @torch.no_grad()
    def sparse(self, batch: Batch, k: int) -> SparseSignal:
        """The k most likely tokens in float32, see `Teacher`; of a cache of a few entries these,
        as they were kept."""
        if not self.cache.signal.is_sparse:
            return most_likely(self.logits(batch), k, batch["teacher_labels"])
        self._refuse(batch, "teacher_entries")
        kind = Draws if self.cache.signal.kind == "sampled" else EntrySignal
        return kind(*(batch[f"teacher_{name}"] for name in SIGNALS[SPARSE]))

    def _stored(self, batch: Batch) -> Tensor:
        self._refuse(batch, "teacher_hidden")
        hidden: Tensor = batch["teacher_hidden"]
        return hidden.to(self.cache.dtype)  # DeepSpeed casts what goes to the device

    def _refuse(self, batch: Batch, name: str) -> None:
        if "teacher_problem" in batch:
            raise TaidError(batch["teacher_problem"])
        if name not in batch:
            raise TaidError(
                f"'{self.cache.folder}' has no {name.removeprefix('teacher_')} of "
                f"{batch['sources'][0]}: with its signal, only records of data.eval are measured, "
                "and only those of data.train are trained on.", mend=AGAIN)
