"""Shards of a teacher's cache: records with their hidden states, whole or absent.

A shard holds R records with n tokens in all: at the predicting positions of `positions` [n] (of the
predicted tokens, in the row without padding) either `hidden` [n, H], or `entries` and `log_probs`
[n, k] of the entries that the pair compares with `log_rest` [n] of all others; `starts` [R + 1] of
each record among them, and of each record 16 bytes of SHA-256 of its token ids, its images' pixels
and its name in the data (`ids`, `images`, `sources` [R, 16]), the CRC-32 of what is stored of it
(`sums` [R]), and where it stood: (side, number) (`places` [R, 2]).
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from taid_vlm.errors import TaidError
from taid_vlm.io.files import whole_file
from taid_vlm.io.hashing import sha256
from taid_vlm.records.videos import Clip, Picture

logger = logging.getLogger(__name__)

BYTES = 16  # of every hash in an index
INDEX = ("ids", "images", "sources", "sums", "starts", "places")
SECONDS = 300.0  # after which a shard is written, however small: so much is lost at most
HIDDEN, SPARSE = "hidden", "sparse"
SIGNALS = {HIDDEN: ("hidden",), SPARSE: ("entries", "log_probs", "log_rest")}
AGAIN = "Build the cache again with `taid-vlm cache` from this recipe's models and data."
Place = tuple[int, int]  # which side of the data, and which of its records


class Key(NamedTuple):
    """What a record's hidden states depend on beside the teacher, hashed."""

    ids: bytes
    images: bytes


def key_of(ids: Sequence[int], images: bytes) -> Key:
    """Of a row's token ids without padding, and the hash of its pixels."""
    return Key(sha256([np.asarray(ids, np.int64).tobytes()])[:BYTES], images)


def pixels_hash(images: Sequence[Picture]) -> bytes:
    """Of images and videos as they were decoded."""
    return sha256(part for image in images for part in _pixels(image))[:BYTES]


def _pixels(picture: Picture) -> Iterator[bytes]:
    if isinstance(picture, Clip):
        yield repr((picture.indices, picture.rate, picture.total)).encode()
    for image in picture.frames if isinstance(picture, Clip) else (picture,):
        yield repr((image.mode, image.size)).encode()
        yield image.tobytes()


def source_hash(source: str) -> bytes:
    """Of a record's name in the data."""
    return sha256([source.encode()])[:BYTES]


def checksum(signal: Mapping[str, Tensor], positions: Sequence[int]) -> int:
    """CRC-32 of the bytes of one record's tensors on the CPU, and of where they stand."""
    total = zlib.crc32(np.asarray(positions, np.int64).tobytes())
    for name in sorted(signal):
        total = zlib.crc32(signal[name].contiguous().view(torch.uint8).numpy().data, total)
    return total


class Entry(NamedTuple):
    """What the teacher said of one record, by name as in SIGNALS [n, ...] on the CPU, and what it
    is of."""

    place: Place
    source: bytes
    key: Key
    positions: list[int]
    signal: Mapping[str, Tensor]


def opened(path: Path) -> Any:
    """A shard, memory-mapped; raises TaidError where it is torn."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise TaidError(f"'{path}' is not as it was written ({error}).", mend=AGAIN) from None


def read_index(path: Path, identity: str) -> dict[str, np.ndarray[Any, Any]]:
    """What a shard says of its records; raises TaidError where it is torn, or of another cache."""
    file = opened(path)
    owner = (file.metadata() or {}).get("identity")
    if not {*INDEX, "positions"} <= {*file.keys()}:
        raise TaidError(f"'{path}' is no shard of a cache.", mend=AGAIN)
    if owner != identity:
        raise TaidError(f"'{path}' belongs to another cache (its identity is {owner}, this "
                        f"cache's {identity}).", mend=AGAIN)
    kind = next((kind for kind, names in SIGNALS.items() if {*names} <= {*file.keys()}), "")
    records = file.get_slice("sums").get_shape()[0]
    return {**{name: file.get_tensor(name).numpy() for name in INDEX},
            "kind": np.full(records, kind)}


# ----- writing -----------------------------------------------------------------------------


class ShardWriter:
    """Entries, gathered into shards."""

    def __init__(self, folder: Path, identity: str, rank: int, shard_bytes: int) -> None:
        self.folder, self.identity, self.rank = folder, identity, rank
        self.shard_bytes, self.entries = shard_bytes, list[Entry]()
        self.size, self.since = 0, time.perf_counter()

    def add(self, entry: Entry) -> None:
        if self.entries and self.entries[0].signal.keys() != entry.signal.keys():
            self.flush()  # a shard is of one kind
        signal = {name: values.clone() for name, values in entry.signal.items()}
        self.entries.append(Entry(*entry[:-1], signal))
        self.size += sum(values.nbytes for values in signal.values())
        if self.size >= self.shard_bytes or time.perf_counter() - self.since > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what has been gathered as one shard, whole or not at all."""
        if self.entries:
            number = 1 + max((int(path.stem.split("-")[1]) for path in
                              self.folder.glob(f"{self.rank:05d}-*.safetensors")), default=-1)
            with whole_file(self.folder / f"{self.rank:05d}-{number:06d}.safetensors") as partial:
                save_file(_tensors(self.entries), partial, {"identity": self.identity})
        self.entries, self.size, self.since = [], 0, time.perf_counter()


def _tensors(entries: Sequence[Entry]) -> dict[str, Tensor]:
    def hashes(values: Sequence[bytes]) -> Tensor:
        return torch.frombuffer(bytearray(b"".join(values)), dtype=torch.uint8).view(-1, BYTES)

    lengths = torch.tensor([0, *(len(entry.positions) for entry in entries)])
    return {
        **{name: torch.cat([entry.signal[name] for entry in entries])
           for name in entries[0].signal},
        "positions": torch.tensor([p for entry in entries for p in entry.positions],
                                  dtype=torch.int32),
        "starts": lengths.cumsum(0),
        "ids": hashes([entry.key.ids for entry in entries]),
        "images": hashes([entry.key.images for entry in entries]),
        "sources": hashes([entry.source for entry in entries]),
        "sums": torch.tensor([checksum(entry.signal, entry.positions) for entry in entries]),
        "places": torch.tensor([entry.place for entry in entries]),
    }


def whole_shards(folder: Path, identity: str) -> set[Place]:
    """Places of the records that an interrupted build has kept; what it left half is removed."""
    done = set[Place]()
    for path in folder.glob(".*"):
        path.unlink()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            done |= {(int(side), int(number)) for side, number in
                     read_index(path, identity)["places"]}
        except TaidError as error:
            logger.warning("%s It is removed, and its records are asked again.", error.message)
            path.unlink()
    return done
