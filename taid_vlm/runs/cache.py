"""A recipe's teacher asked once about all of its records, its hidden states kept.

Every process takes every world-size-th record and writes shards of its own. A shard is whole or
absent and says which records it holds, so that an interrupted build goes on, with as many
processes as there are then.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from taid_vlm.adapters import check_reloaded
from taid_vlm.alignment import Pairing
from taid_vlm.batch.collator import Batch, DistillationCollator, TeacherRow
from taid_vlm.batch.several import SeveralCollator
from taid_vlm.config.data import DataSource, matches
from taid_vlm.config.model import DESCRIPTION, TeacherSpec
from taid_vlm.config.recipe import Recipe
from taid_vlm.errors import TaidError
from taid_vlm.fused.heads import Head
from taid_vlm.io.files import read_json, whole_file, write_json
from taid_vlm.io.hashing import SHORT, file_sha256, folder_sha256, sha256
from taid_vlm.io.manifest import read_manifest, seal
from taid_vlm.io.quiet import quiet
from taid_vlm.io.terminal import Pace
from taid_vlm.models.loading import (
    load_model,
    load_processor,
    load_skeleton,
    weight_bytes,
    weights_hash,
)
from taid_vlm.models.quantization import half_precision, numel, refuse_unavailable
from taid_vlm.objectives import parse_objective
from taid_vlm.records import StreamedRecords, first_rows
from taid_vlm.runs.folders import LOCK, locked, on_main
from taid_vlm.runs.ingredients import Ingredients, chosen_teacher, gather
from taid_vlm.runs.stages import parts_by_name
from taid_vlm.teachers.cache import HEAD, IDENTITY, KIND, SHARDS
from taid_vlm.teachers.local import LocalTeacher
from taid_vlm.teachers.shards import (
    BYTES,
    Entry,
    ShardWriter,
    key_of,
    pixels_hash,
    read_index,
    source_hash,
    whole_shards,
)
from taid_vlm.teachers.sparse import Signal, cut_down, maps_hash
from taid_vlm.training.several import put_together

logger = logging.getLogger(__name__)

FORMAT = 1
WHOLE = Signal()  # hidden states
PARTIAL = f".{DESCRIPTION}.partial"
SHARD_BYTES = 2**28  # of hidden states, after which a shard is written
PROBED = 64  # records that the size is estimated from
SPARE = 1.02  # of the estimated size, that the disk has to have room for
BESIDE = 3 * BYTES + 8 * 4  # bytes of an index per record
Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Side:
    """One set of records, and the collator that training would use for it."""

    learned: bool
    name: str
    records: Any
    collator: DistillationCollator
    sources: Sequence[Mapping[str, Any]]

    @property
    def pairing(self) -> Pairing:
        assert self.collator.pairing is not None  # there is a teacher
        return self.collator.pairing


@dataclass(frozen=True)
class Estimate:
    """What a cache will hold, from its first records: tokens that are compared, and bytes."""

    records: int
    tokens: int
    bytes: int
    per_token: int

    def __str__(self) -> str:
        return (f"about {self.tokens:,} answer tokens of {self.records:,} records, "
                f"{self.per_token:,} bytes each: {self.bytes / 1e9:.3g} GB (from the first "
                f"{PROBED})")


@dataclass(frozen=True)
class Built:
    """A finished cache. tokens, records: it holds. dropped: records left out, by reason.
    seconds: of this process's part of building it."""

    folder: Path
    records: int
    tokens: int
    bytes: int
    dropped: Mapping[str, int]
    seconds: float

    def __str__(self) -> str:
        left_out = ", ".join(f"{n} x {reason}" for reason, n in self.dropped.items())
        return (f"cache         {self.folder}\n"
                f"holds         {self.records:,} records, {self.tokens:,} answer tokens, "
                f"{self.bytes / 1e6:,.1f} MB, {self.bytes / max(self.tokens, 1):,.0f} bytes a "
                f"token\nleft out      {left_out or 'none'}\ntime          {self.seconds:.1f} s")


def build_cache(
    recipe: Recipe, output_dir: str | Path, dtype: Dtype = "auto", batch_size: int | None = None,
    shard_bytes: int = SHARD_BYTES, signal: Signal = WHOLE, teacher: str | None = None,
) -> Built:
    """Ask a recipe's teacher once about data.train and data.eval, of all stages.

    Args:
        teacher: of several, the name of the one that is asked, about its own records.
        output_dir: new, empty, or an interrupted build of the same cache, which goes on.
        dtype: of the hidden states on disk; "auto" as the teacher gives them, which loses nothing.
        batch_size: records at a time (default: the recipe's train.per_device_eval_batch_size).
        shard_bytes: of what is kept, after which a shard is written.
        signal: of the records to train on; of held-out ones hidden states are kept in any case.

    Raises:
        TaidError: anything a user can mend; what shows without weights, before they are loaded.
    """
    output = Path(output_dir).expanduser()
    key = chosen_teacher(recipe, teacher)
    spec = recipe.teacher_specs.get(key)
    if spec is None or spec.cache or spec.server:
        raise TaidError(f"cache: the recipe names no teacher that can be loaded. Name it with {key}"
                        ".model_name_or_path, without cache and server.")
    if spec.is_sharded:
        raise TaidError(f"cache: {key}.sharding cannot work here; take {key}.devices: auto.")
    sides, found = _sides(recipe, signal, teacher)
    refuse_unavailable(spec, key)
    with locked(output):
        on_main(lambda: _check_folder(output), output)
        estimate = on_main(lambda: _estimate(spec, sides, dtype, output, signal), output)
        accelerator = accelerator_of(found)
        if accelerator.is_main_process:
            print(f"size          {estimate}", flush=True)
        model = load_model(spec, key, half_precision(found.args))
        described = _Described(spec, sides, dtype, found, output, signal)
        identity = on_main(lambda: described.write(model), output)
        builder = _Builder(LocalTeacher(model, accelerator), accelerator, output, described,
                           identity, shard_bytes)
        built = builder.run(sides, batch_size or found.args.per_device_eval_batch_size,
                            found.args.dataloader_num_workers)
        accelerator.wait_for_everyone()
        return built


# ----- before weights -----------------------------------------------------------------------


def _sides(recipe: Recipe, signal: Signal, teacher: str | None) -> tuple[list[Side], Ingredients]:
    """Every set of records of every stage once, and what the first stage names."""
    sides: dict[str, Side] = {}
    firsts: list[Ingredients] = []
    for stage, part in parts_by_name(recipe):
        found, objective = gather(part), parse_objective(part.objective)
        firsts.append(found)
        if found.args.window is not None:
            raise TaidError("train.window: a cache holds whole texts and no windows of them; leave "
                            "it out, or train with the teacher itself.")
        with quiet("taid_vlm", warn=False):  # training says what there is to say
            skeletons = {key: found.caches.get(key) or load_skeleton(spec, key)
                         for key, spec in part.teacher_specs.items()}
            _, collator = put_together(
                load_skeleton(part.student, "student"), part.of_teachers(skeletons),
                found.student_processor, found.teacher_processor, found.args, found.train,
                found.eval)
            if isinstance(collator, SeveralCollator):
                collator = collator.alone(str(teacher))
        collator = replace(collator, stored=_take_note)
        for name, records in (("train", found.train), ("eval", found.eval)):
            if isinstance(records, StreamedRecords):
                raise TaidError(f"data.{name} is streamed, so nobody knows when all of it has been "
                                "seen: leave streaming out to cache a teacher.")
            if records is not None:
                sources = part.data.sources(name)
                key = repr((name, sources, objective.alignment, part.train.get("max_length"),
                            part.train.get("supervise")))
                sides.setdefault(key, Side(
                    name == "train", f"{stage}: data.{name}" if stage else f"data.{name}", records,
                    collator, [_described_source(part, source) for source in sources]))
                signal.check(collator.pairing, objective)
    if signal.is_sparse and len({maps_hash(side.pairing) for side in sides.values()}) > 1:
        raise TaidError(f"--signal {signal.kind}: the stages compare other entries, so what is "
                        "kept for one says nothing for the other. Keep hidden states.")
    return list(sides.values()), firsts[0]


def _described_source(recipe: Recipe, source: DataSource) -> dict[str, Any]:
    """Which records these are: where they lie, and the hash of every file among them."""
    start = recipe.start_of(source)
    paths = [] if start is None else [
        match for path in source.paths for match in matches(start / Path(path).expanduser())]
    return {"path": source.shown, "split": source.split, "max_records": source.max_records,
            "weight": source.weight,
            "files": [file_sha256(path).hex()[:SHORT] for path in paths if path.is_file()]}


def _take_note(rows: Sequence[TeacherRow], batch: Batch) -> Batch:
    return {"teacher_rows": list(rows)}


def _check_folder(output: Path) -> None:
    """Something else must not be mixed with a cache, and a finished one is not built again."""
    if (read_manifest(output) or {}).get("kind") == KIND:
        raise TaidError(f"--output = '{output}' holds a finished cache: train with "
                        "teacher.cache, remove it, or choose another folder.")
    foreign = {path.name for path in output.iterdir()} - {LOCK, PARTIAL}
    if foreign and not (output / IDENTITY).is_file():
        raise TaidError(f"--output = '{output}' is not empty, and holds no interrupted build "
                        "of a cache; choose another folder.")


def _estimate(
    spec: TeacherSpec, sides: Sequence[Side], dtype: Dtype, output: Path, signal: Signal
) -> Estimate:
    """From the first records of every side; raises TaidError where the disk has no room."""
    skeleton = load_skeleton(spec, "teacher")
    rows, width = (int(n) for n in skeleton.get_output_embeddings().weight.shape)
    stored = weight_bytes(spec, skeleton)
    item = stored if dtype == "auto" else getattr(torch, dtype).itemsize
    tokens = records = size = 0
    for side in sides:
        first = list(first_rows(side.records, PROBED))
        with quiet("taid_vlm", warn=False):
            seen = sum(len(side.collator([row])["teacher_labels"]) for row in first)
        more = round(seen * len(side.records) / max(len(first), 1))
        size += more * signal.token_bytes(side.learned, width, item)
        tokens, records = tokens + more, records + len(side.records)
    per_token = round(size / max(tokens, 1))
    size += records * BESIDE + rows * width * stored
    there = sum(path.stat().st_size for path in (output / SHARDS).glob("*.safetensors"))
    free = shutil.disk_usage(output).free
    if size * SPARE - there > free:
        raise TaidError(f"the cache takes about {(size - there) / 1e9:,.3g} GB more, and "
                        f"'{output}' has {free / 1e9:,.3g} GB of room. Make room, choose another "
                        "disk, or keep hidden states in half of it with --dtype bfloat16.")
    return Estimate(records, tokens, size, per_token)


def accelerator_of(found: Ingredients) -> Accelerator:
    """Of a run of this recipe: its device and its mixed precision."""
    args = found.args
    return Accelerator(cpu=args.use_cpu,
                       mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no")


# ----- whose hidden states --------------------------------------------------------------------


@dataclass(frozen=True)
class _Described:
    """Config, processor and identity of the teacher, as the cache keeps them."""

    spec: TeacherSpec
    sides: Sequence[Side]
    dtype: Dtype
    found: Ingredients
    output: Path
    signal: Signal

    def write(self, model: PreTrainedModel) -> str:
        """Write what describes the teacher, or compare it with an interrupted build's; the
        identity's hash. `head` and `hidden` follow with the first batch."""
        partial, path = self.output / PARTIAL, self.output / IDENTITY
        shutil.rmtree(partial, ignore_errors=True)
        model.config.save_pretrained(partial)
        _save_processor(self.spec, partial)
        facts = self._facts(model, partial)
        if not path.is_file():
            write_json(facts, path)
        before = read_json(path, "a cache's identity")
        facts = json.loads(json.dumps(facts))
        for key, now in facts.items():
            if before.get(key) != now:
                raise TaidError(
                    f"'{self.output}' is an interrupted build of another cache: its {key} was "
                    f"{before.get(key)!r:.120}, now {now!r:.120}. Take the change back, or choose "
                    "another folder.")
        if (self.output / DESCRIPTION).is_dir():
            shutil.rmtree(partial)
        else:
            partial.replace(self.output / DESCRIPTION)
        return sha256([json.dumps(facts, sort_keys=True).encode()]).hex()[:SHORT]

    def _facts(self, model: PreTrainedModel, folder: Path) -> dict[str, Any]:
        args = self.found.args
        return {
            "format": FORMAT,
            "model": {"name": self.spec.model_name_or_path, "revision": self.spec.revision,
                      "model_type": model.config.model_type,
                      "parameters": sum(map(numel, model.parameters()))},
            "weights": weights_hash(model),
            "processor": folder_sha256(folder, folder.rglob("*")).hex()[:SHORT],
            "chat_template_kwargs": self.spec.chat_template_kwargs,
            "dtype": self.dtype,
            "signal": {"kind": self.signal.kind, "k": self.signal.k},
            "entries": maps_hash(self.sides[0].pairing) if self.signal.is_sparse else None,
            "precision": {"weights": _name(model.dtype), "bf16": args.bf16, "fp16": args.fp16,
                          "attention": model.config._attn_implementation},
            "data": [{"side": side.name, "records": len(side.records), "sources": side.sources}
                     for side in self.sides],
        }

    def finish(self, hidden: torch.dtype, head: Head) -> None:
        """Write the head, and add to the identity what the first batch has shown."""
        tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
        with whole_file(self.output / HEAD) as partial:
            save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, partial)
        path = self.output / IDENTITY
        write_json({**read_json(path, "a cache's identity"),
                    "computed": {"hidden": _name(hidden)},
                    "head": {"rows": head.rows, "width": head.weight.shape[1],
                             "scale": head.transform.scale, "softcap": head.transform.softcap}},
                   path)


def _save_processor(spec: TeacherSpec, folder: Path) -> None:
    """Beside the config; training shows records to what is loaded from there, which must not read
    them otherwise."""
    processor = load_processor(spec, "teacher")
    processor.save_pretrained(folder)
    again = load_processor(TeacherSpec(
        model_name_or_path=str(folder), trust_remote_code=spec.trust_remote_code), "teacher")
    check_reloaded(getattr(processor, "tokenizer", processor), getattr(again, "tokenizer", again),
                   "saving and loading the teacher's tokenizer",
                   "Name one that is saved as it is with teacher.processor_name_or_path.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ----- records --------------------------------------------------------------------------------


class _Numbered(Dataset[Any]):
    """Records with their numbers, in order."""

    def __init__(self, records: Any, numbers: Sequence[int]) -> None:
        self.records, self.numbers = records, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, Any]]:
        wanted = [self.numbers[i] for i in indices]
        fetch = getattr(self.records, "__getitems__", None)
        rows = fetch(wanted) if fetch else [self.records[i] for i in wanted]
        return list(zip(wanted, rows, strict=True))


@dataclass(frozen=True)
class _Collate:
    """The collator, and which record every row of its batch is."""

    collator: DistillationCollator

    def __call__(self, items: Sequence[tuple[int, Any]]) -> Batch:
        batch = self.collator([row for _, row in items])
        rows: list[TeacherRow] = batch.pop("teacher_rows")
        numbers = {id(row): number for number, row in items}
        batch["kept"] = [] if not batch["counts"]["rows"] else [
            (numbers[id(row.record)], source_hash(row.source),
             key_of(row.ids, pixels_hash(row.images)), row.positions) for row in rows]
        return batch


@dataclass
class _Builder:
    """One process's part of the work."""

    teacher: LocalTeacher
    accelerator: Accelerator
    output: Path
    described: _Described
    identity: str
    shard_bytes: int

    def run(self, sides: Sequence[Side], batch_size: int, workers: int) -> Built:
        started, dropped = time.perf_counter(), Counter[str]()
        done = on_main(lambda: whole_shards(self.output / SHARDS, self.identity), self.output)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        shares = [[i for i in range(len(side.records)) if (number, i) not in done][rank::world]
                  for number, side in enumerate(sides)]
        writer = ShardWriter(self.output / SHARDS, self.identity, rank, self.shard_bytes)
        on_main(lambda: self._head(sides), self.output)
        own, speaks = sum(map(len, shares)), self.accelerator.is_main_process
        pace = Pace(own, batch_size, ", after two batches", speaks)
        with tqdm(total=own, desc="cache", unit=" records",
                  disable=None if speaks else True) as bar:
            for number, (side, share) in enumerate(zip(sides, shares, strict=True)):
                if not share:
                    continue
                for batch in DataLoader(_Numbered(side.records, share), batch_size,
                                        collate_fn=_Collate(side.collator), num_workers=workers):
                    for entry in self._ask(number, side, batch):
                        writer.add(entry)
                    pace.add(batch_size)
                    dropped.update(batch["counts"]["dropped"])
                    bar.update(min(batch_size, bar.total - bar.n))
        writer.flush()
        dropped = sum(gather_object([dropped]), Counter[str]())
        self.accelerator.wait_for_everyone()
        return on_main(lambda: self._finish(dropped, time.perf_counter() - started), self.output)

    def _head(self, sides: Sequence[Side]) -> None:
        """The head and what stands behind it, from the first record that can be used."""
        if (self.output / HEAD).is_file():
            return
        with quiet("taid_vlm", warn=False):
            batches = (side.collator([row]) for side in sides for row in first_rows(side.records))
            batch = next(batch for batch in batches if len(batch["labels"]))
        batch = send_to_device({key: batch[key] for key in ("teacher_inputs", "teacher_mask")},
                               self.accelerator.device)
        signal = self.teacher.hidden(batch)
        kind = self.teacher.model.config.model_type
        if signal is None or not isinstance(signal.head, Head):
            why = "does something behind its head that is not known here" if signal is None else \
                "has a head that is no plain matrix"
            raise TaidError(f"teacher ({kind}): the model {why}, so its hidden states do not say "
                            "all that it says; train with the teacher itself.")
        self.described.finish(signal.hidden.dtype, signal.head)

    def _ask(self, number: int, side: Side, batch: Batch) -> Iterator[Entry]:
        """What the teacher says of every record of a batch."""
        if not batch["kept"]:
            return
        moved = send_to_device({key: batch[key] for key in ("teacher_inputs", "teacher_mask")},
                               self.accelerator.device)
        sizes = [len(positions) for *_, positions in batch["kept"]]
        if self.described.signal.is_sparse and side.learned:
            parts = zip(self.teacher.logits(moved).cpu().split(sizes),
                        batch["map_index"].split(sizes), batch["kept"], strict=True)
            signals = [cut_down(self.described.signal, side.pairing, maps, logits, key.ids)
                       for logits, maps, (_, _, key, _) in parts]
        else:
            signals = [{"hidden": part} for part in self._hidden(moved).split(sizes)]
        for (place, source, key, positions), signal in zip(batch["kept"], signals, strict=True):
            yield Entry((number, place), source, key, positions, signal)

    def _hidden(self, batch: Batch) -> Tensor:
        signal = self.teacher.hidden(batch)
        assert signal is not None  # `_head` has asked
        hidden, dtype = signal.hidden.cpu(), self.described.dtype
        return hidden if dtype == "auto" else hidden.to(getattr(torch, dtype))

    def _finish(self, dropped: Mapping[str, int], seconds: float) -> Built:
        """The manifest, once every process has written its last shard."""
        paths = sorted((self.output / SHARDS).glob("*.safetensors"))
        if not paths:
            raise TaidError("cache: no record of the recipe can be used, so there is nothing to "
                            f"keep: {dict(dropped)}.")
        indices = [read_index(path, self.identity) for path in paths]
        tokens = sum(int(index["starts"][-1]) for index in indices)
        records = sum(len(index["ids"]) for index in indices)
        sizes = {path.name: path.stat().st_size for path in paths}
        seal(self.output, {"kind": KIND, "identity": self.identity, "shards": sizes,
                           "records": records, "tokens": tokens, "dropped": dict(dropped)}, [LOCK])
        return Built(self.output, records, tokens, sum(sizes.values()), dict(dropped), seconds)
