"""Collator: records in, one aligned batch for teacher and student out.

A record that cannot be used (unreadable image, empty answer, too long, ...) is left out of its
batch and counted under its reason; the counts travel with the batch. Nothing is cut silently:
conversations that are too long are dropped whole, and only plain texts are shortened.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from taid_vlm.adapters import (
    Continuation,
    EncodedBatch,
    EncodedRow,
    GlobalViews,
    ModelAdapter,
    Rendered,
    SeenSizes,
    Side,
    Supervise,
    agree,
    continued_record,
)
from taid_vlm.alignment import (
    Aligned,
    AlignedChunk,
    AlignedToken,
    Pairing,
    align_alone,
    student_positions,
    supervised_positions,
    teacher_positions,
)
from taid_vlm.errors import AlignmentError, Problem, RecordError, SampleDropped, TaidError
from taid_vlm.records import Malformed, Record, first_rows, parse_record
from taid_vlm.records.record import problem_of
from taid_vlm.records.videos import Picture

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
Row: TypeAlias = Record | Malformed | Continuation | Mapping[str, Any]
TOO_LONG, UNALIGNED = "longer than max_length", "nothing aligned"
NO_VIEW = "video for visual terms"
CUT = "cut"  # not dropped: plain texts that were shortened


class TeacherRow(NamedTuple):
    """A record as the teacher is shown it: token ids without padding, images, and the positions
    among the ids of those tokens that are compared, in order."""

    record: Record
    ids: list[int]
    images: list[Picture]
    positions: list[int]

    @property
    def source(self) -> str:
        """What messages call the record."""
        return self.record.source


@dataclass(frozen=True)
class _Sample:
    record: Record
    images: list[Picture]
    rendered: dict[str, Rendered]  # by role
    cut: bool = False


@dataclass
class DistillationCollator:
    """Makes batches; picklable, so it runs in data-loader workers.

    Args:
        student, teacher: the adapters; without a teacher (SFT) every supervised token counts.
        pairing: how the two are compared; needed with a teacher.
        supervise: "answers" (the assistant's texts) or "all" (every text of the conversation).
        padding_side: of both models' inputs.
        degrade: makes an image that says nothing, of the same size; the teacher is then shown
            these, too.
        chat: what a served teacher is sent of a row with images, from its adapter, the record, its
            rendering and its images; None of a row without.
        views: by role, what finds the images' global views.
        stored: what has the teacher's hidden states, or takes note of where they are asked for:
            given the batch's rows and the batch, it says what of the batch is another. Where it
            says which rows it `holds`, the teacher's processor is not shown their pixels again.
        beside: a record whose images are shown, and of which nothing is learned, with every batch
            that has none: where weights lie in shares, all processes use a tower or none does.
        left_out: what a message says of a record that cannot be used.
        reported: the first message of every reason for which a record was left out.

    A batch holds, for N aligned tokens in B rows:
        student_inputs, teacher_inputs: what the models take.
        student_mask, teacher_mask: bool [B, T], the predicting positions.
        weights: float32 [N] what each token's losses count; absent where all count 1.
        labels, teacher_labels: [N] the next token, in each model's own ids.
        map_index: [N] which vocabulary map; turn, row: [N]; categories: list of N names;
        sources: list of B names of the records; images: [B] how many each has.
        teacher_degraded: with `degrade`, those of the teacher's inputs in which degraded images
            differ; {} where no row has an image.
        teacher_chats: with `chat`, a list of B.
        teacher_hidden: with a cache as `stored`, the teacher's hidden states [N_teacher, H].
        student_views, teacher_views: with `views`, a View per image, in the same order.
        counts: `dropped` {reason: rows}, `cut` texts, and tokens supervised and aligned.
        notes: {what of the rows has no effect: rows}.
        intake: `sources` {origin: (rows read, used)}, `unread` {column that nothing reads: rows}.
    Where texts are split differently (`Pairing.has_chunks`) the two models' tokens differ in
    number, N counts the student's, map_index has one entry per pair of tokens, and there are also:
        pair_student, pair_teacher: [P] which tokens are compared entry by entry.
        chunk_student [N], chunk_teacher: the chunk of every token, -1 for none;
        chunk_last: [C] the student's last token of every chunk.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from taid_vlm.adapters import make_adapter
        >>> from taid_vlm.alignment import pair_models
        >>> from taid_vlm.batch.collator import DistillationCollator
        >>> from taid_vlm.demo.demo import data_folder
        >>> from taid_vlm.records import parse_record
        >>> models = data_folder() / "models"
        >>> teacher, student = (
        ...     make_adapter(AutoTokenizer.from_pretrained(models / f"words-{role}"), role)
        ...     for role in ("teacher", "student"))
        >>> pairing = pair_models(teacher, student, teacher_rows=512, student_rows=503)
        >>> collate = DistillationCollator(student, teacher, pairing)
        >>> batch = collate([parse_record({"question": "is it red?", "answer": "no"}, "here")])
        >>> batch["student_inputs"]["input_ids"].shape, batch["teacher_inputs"]["input_ids"].shape
        (torch.Size([1, 8]), torch.Size([1, 8]))
        >>> batch["labels"]  # "no", and the end of the turn
        tensor([416, 502])
        >>> batch["student_mask"]  # where they are predicted
        tensor([[False, False, False, False, False, True, True, False]])
    """

    student: ModelAdapter
    teacher: ModelAdapter | None = None
    pairing: Pairing | None = None
    supervise: Supervise = "answers"
    padding_side: Side = "right"
    degrade: Callable[[Picture], Picture] | None = None
    chat: Callable[..., Mapping[str, Any] | None] | None = None
    views: Mapping[str, GlobalViews] | None = None
    stored: Callable[[Sequence[TeacherRow], Batch], Batch] | None = None
    beside: Record | None = None
    left_out: str = "A record is left out"
    reported: dict[str, str] = field(default_factory=dict)
    seen: SeenSizes = field(default_factory=SeenSizes, repr=False)

    def __call__(self, rows: Sequence[Row]) -> Batch:
        with _uncollected():
            return self._collate(rows)

    def _collate(self, rows: Sequence[Row]) -> Batch:
        counts: Counter[str] = Counter()
        samples = [s for s in (self._attempt(row, counts) for row in rows) if s is not None]
        encoded, aligned = self._encode(samples, counts)
        read = Counter(getattr(row, "origin", "") for row in rows)
        used = Counter(sample.record.origin for sample in samples)
        unread = Counter(name for sample in samples for name in sample.record.unread)
        if not samples:  # every process must still take part in the step
            samples = [self._prepare(self.placeholder())]
            encoded, aligned = {a.role: self._run(a, samples) for a in self.adapters}, [[]]
        if self.beside is not None and not any(sample.images for sample in samples):
            samples, aligned = [*samples, self._prepare(self.beside)], [*aligned, []]
            encoded = {a.role: self._run(a, samples) for a in self.adapters}
        batch = self._assemble(samples, encoded, aligned, counts)
        batch["intake"] = {"sources": {name: (n, used[name]) for name, n in read.items() if name},
                           "unread": dict(unread)}
        return batch

    @property
    def adapters(self) -> list[ModelAdapter]:
        return [a for a in (self.teacher, self.student) if a is not None]

    def adapters_of(self, record: Record) -> list[ModelAdapter]:
        """Of the models that are shown a record."""
        return self.adapters

    def placeholder(self) -> Record:
        """What stands in for a batch's records where none can be used."""
        return Record("placeholder", text=".")

    # ----- one record -----------------------------------------------------------------------

    def _attempt(self, row: Row, counts: Counter[str]) -> _Sample | None:
        try:
            if isinstance(row, Malformed):
                self._leave_out(problem_of(row), counts)
                return None
            if isinstance(row, Continuation):
                return self._prepare_continuation(row)
            return self._prepare(row if isinstance(row, Record) else parse_record(row, "a row"))
        except (SampleDropped, RecordError, AlignmentError) as problem:
            self._leave_out(problem, counts)
            return None

    def _leave_out(self, problem: Problem, counts: Counter[str], source: str = "") -> None:
        """Count a record under its reason; the first one of each reason is reported in full."""
        reason, message = problem.reason, f"{source}: {problem}" if source else str(problem)
        counts[reason] += 1
        if reason not in self.reported:
            self.reported[reason] = message
            logger.warning("%s (%s). %s", self.left_out, reason, message)

    def usable(self, data: Any, wanted: Callable[[Record], Any]) -> Iterator[Record]:
        """Those of a data set's records that are wanted and that are not left out, in order."""
        return (row for row in first_rows(data)
                if isinstance(row, Record) and wanted(row) and self([row])["counts"]["rows"])

    def _prepare_continuation(self, row: Continuation) -> _Sample:
        """The student sees its own tokens, the teacher the text through its own template."""
        record, own = continued_record(self.student, row)
        return self._sample(record, {a.role: own if a is self.student else a.render(record)
                                     for a in self.adapters})

    def _prepare(self, record: Record) -> _Sample:
        return self._sample(record, {a.role: a.render(record, self.supervise)
                                     for a in self.adapters_of(record)})

    def _sample(self, record: Record, rendered: dict[str, Rendered]) -> _Sample:
        rendered = agree(rendered, record.source)
        if self.views and any(image.kind == "video" for image in record.images):
            raise SampleDropped(NO_VIEW, f"{record.source} holds a video, but the visual terms of "
                                "the objective compare images; leave them out.")
        return _Sample(record, [image.load() for image in record.images], rendered)

    def _notes(self, samples: Sequence[_Sample]) -> Counter[str]:
        """What of the records that are used has no effect; the first of each is reported."""
        notes = Counter[str]()
        for sample in samples:
            seen = {note for each in sample.rendered.values() for note in each.notes}
            for note in (*sample.record.without_effect, *sorted(seen)):
                notes[note] += 1
                if note not in self.reported:
                    self.reported[note] = f"{sample.record.source}: {note}"
                    logger.warning("Without effect in a record: %s (first in %s).", note,
                                   sample.record.source)
        return notes

    # ----- a batch --------------------------------------------------------------------------

    def _encode(
        self, samples: list[_Sample], counts: Counter[str]
    ) -> tuple[dict[str, EncodedBatch], list[list[Aligned]]]:
        """Encode until every row fits and aligns; `samples` shrinks in place."""
        while samples:
            try:
                encoded = {a.role: self._run(a, samples) for a in self.adapters}
            except (TaidError, SampleDropped) as error:
                self._drop_failing(samples, counts, error)
                continue
            if not self._shorten(samples, encoded, counts):
                aligned = [self._align(encoded, i, counts, sample.record.source)
                           for i, sample in enumerate(samples)]
                if all(aligned):
                    return encoded, aligned
                samples[:] = [s for s, pairs in zip(samples, aligned, strict=True) if pairs]
        return {}, []

    def _run(self, adapter: ModelAdapter, samples: Sequence[_Sample]) -> EncodedBatch:
        rendered = [sample.rendered[adapter.role] for sample in samples]
        images = [sample.images for sample in samples]
        holds = getattr(self.stored, "holds", None) if adapter is self.teacher else None
        try:
            known = None if holds is None or not any(images) else self.seen.encode(
                adapter, rendered, images, self.padding_side, holds)
            return known or adapter.encode(rendered, images, self.padding_side)
        except (TaidError, SampleDropped):
            raise
        except Exception as error:  # processors raise anything; the cause stays attached
            raise TaidError(f"{adapter.role}: the processor failed: {error}") from error

    def _drop_failing(
        self, samples: list[_Sample], counts: Counter[str], error: Exception
    ) -> None:
        """Find the rows that fail by themselves; if none does, the batch's error is raised."""
        kept = []
        for sample in samples:
            try:
                for adapter in self.adapters:
                    self._run(adapter, [sample])
                kept.append(sample)
            except (TaidError, SampleDropped) as problem:
                self._leave_out(problem, counts, sample.record.source)
        if len(kept) == len(samples):
            raise error
        samples[:] = kept

    def _shorten(
        self, samples: list[_Sample], encoded: dict[str, EncodedBatch], counts: Counter[str]
    ) -> bool:
        """Drop conversations and cut plain texts that are too long; True if anything changed."""
        kept, changed = [], False
        for index, sample in enumerate(samples):
            long = [a for a in self.adapters_of(sample.record)
                    if a.max_length and len(encoded[a.role].rows[index].ids) > a.max_length]
            changed |= bool(long)
            if long and sample.record.text is None:
                length = len(encoded[long[0].role].rows[index].ids)
                self._leave_out(SampleDropped(
                    TOO_LONG, f"{sample.record.source}: {length} tokens for the {long[0].role}"),
                    counts)
                continue
            if long:
                counts[CUT] += not sample.cut
                cut = {a.role: a.cut(sample.rendered[a.role], encoded[a.role].rows[index])
                       for a in long}
                sample = replace(sample, rendered={**sample.rendered, **cut}, cut=True)
            kept.append(sample)
        samples[:] = kept
        return changed

    def _align(
        self, encoded: dict[str, EncodedBatch], index: int, counts: Counter[str], source: str
    ) -> list[Aligned]:
        student = encoded["student"].rows[index]
        try:
            aligned = align_alone(student) if self.pairing is None else self.pairing.align(
                encoded["teacher"].rows[index], student)
        except (AlignmentError, SampleDropped) as problem:
            self._leave_out(problem, counts, source)
            return []
        if not aligned:
            self._leave_out(SampleDropped(UNALIGNED, source), counts)
        return aligned

    # ----- tensors --------------------------------------------------------------------------

    def _assemble(
        self, samples: Sequence[_Sample], encoded: dict[str, EncodedBatch],
        aligned: list[list[Aligned]], counts: Counter[str],
    ) -> Batch:
        flat = [(row, pair) for row, one in enumerate(aligned) for pair in one]
        tokens = {"student": [(row, position, pair.turn) for row, pair in flat
                              for position in student_positions(pair)],
                  "teacher": [(row, position, pair.turn) for row, pair in flat
                              for position in teacher_positions(pair)]}
        rows = [row for row, _, _ in tokens["student"]]
        turns = [turn for _, _, turn in tokens["student"]]
        batch: Batch = {
            "map_index": _long(pair.map_index for _, pair in flat
                               if pair.map_index is not None),
            "row": _long(rows),
            "turn": _long(turns),
            "categories": [samples[row].record.category(turn)
                           for row, turn in zip(rows, turns, strict=True)],
            "sources": [sample.record.source for sample in samples],
            "images": _long(len(sample.images) for sample in samples),
        }
        for role, side in encoded.items():
            positions = [(row, position) for row, position, _ in tokens[role]]
            batch[f"{role}_inputs"] = side.inputs
            batch[f"{role}_mask"] = predicting_mask(side.inputs["input_ids"], positions)
            name = "labels" if role == "student" else "teacher_labels"
            batch[name] = target_ids(side.rows, positions)
        if self.pairing is not None and self.pairing.has_chunks:
            batch |= _partners([pair for _, pair in flat])
        if self.degrade is not None:
            batch["teacher_degraded"] = self._degraded(samples, encoded["teacher"])
        if self.chat is not None:
            batch["teacher_chats"] = [
                self.chat(self.teacher, s.record, s.rendered["teacher"], s.images) for s in samples]
        if self.stored is not None:
            batch |= self.stored(_teacher_rows(samples, encoded["teacher"], tokens["teacher"]),
                                 batch)
        for role, views in (self.views or {}).items():
            batch[f"{role}_views"] = views(encoded[role])
        learned = [number for number, pairs in enumerate(aligned) if pairs]
        batch["counts"] = {
            "dropped": {key: n for key, n in counts.items() if key != CUT},
            "cut": counts[CUT],
            "supervised_tokens": sum(len(supervised_positions(encoded["student"].rows[number]))
                                     for number in learned),
            "aligned_tokens": len(rows),
            "chunk_tokens": sum(len(pair.student) for _, pair in flat
                                if isinstance(pair, AlignedChunk)),
            "rows": len(learned),
        }
        batch["notes"] = dict(self._notes([samples[number] for number in learned]))
        return batch | token_weights(encoded["student"].rows, tokens["student"])

    def _degraded(
        self, samples: Sequence[_Sample], real: EncodedBatch
    ) -> dict[str, Tensor]:
        """The teacher's inputs that change with the pixels; its tokens and their places do not."""
        if not any(sample.images for sample in samples):
            return {}
        assert self.teacher is not None
        assert self.degrade is not None
        other = self._run(self.teacher, [
            replace(sample, images=[self.degrade(image) for image in sample.images])
            for sample in samples])
        changed = {key: value for key, value in other.inputs.items()
                   if not torch.equal(value, real.inputs[key])}
        for key, value in changed.items():
            if value.shape != real.inputs[key].shape or not value.is_floating_point():
                raise TaidError(f"teacher: its processor's '{key}' depends on what an image shows, "
                                "so a degraded image cannot take its place; leave out "
                                "objective.token_weights.")
        return changed


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector of cycles.

    A batch is tens of thousands of small objects and no cycle; counting them, the collector walks
    all that the process holds, time and again: a third of a long batch's time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _teacher_rows(
    samples: Sequence[_Sample], encoded: EncodedBatch, tokens: Sequence[tuple[int, int, int]]
) -> list[TeacherRow]:
    places: list[list[int]] = [[] for _ in samples]
    for index, position, _ in tokens:
        places[index].append(position - encoded.rows[index].offset)
    return [TeacherRow(sample.record, row.ids, sample.images, positions)
            for sample, row, positions in zip(samples, encoded.rows, places, strict=True)]


def _partners(flat: list[Aligned]) -> dict[str, Tensor]:
    """Which tokens are compared one by one, and which form chunks, by their place in the batch."""
    pairs: list[tuple[int, int]] = []
    chunk_s: list[int] = []
    chunk_t: list[int] = []
    last: list[int] = []
    for pair in flat:
        if pair.map_index is not None:
            pairs.append((len(chunk_s), len(chunk_t)))
        if isinstance(pair, AlignedToken):
            chunk_s.append(-1)
            chunk_t.append(-1)
            continue
        chunk_s += [len(last)] * len(pair.student)
        chunk_t += [len(last)] * len(pair.teacher)
        last.append(len(chunk_s) - 1)
    return {"pair_student": _long(s for s, _ in pairs), "pair_teacher": _long(t for _, t in pairs),
            "chunk_student": _long(chunk_s), "chunk_teacher": _long(chunk_t),
            "chunk_last": _long(last)}


def _long(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long)


def predicting_mask(ids: Tensor, positions: list[tuple[int, int]]) -> Tensor:
    """bool [B, T], True one before every predicted token."""
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    rows, before = _long(row for row, _ in positions), _long(p - 1 for _, p in positions)
    mask[rows, before] = True
    return mask


def token_weights(
    rows: list[EncodedRow], tokens: Sequence[tuple[int, int, int]]
) -> dict[str, Tensor]:
    """{"weights": float32 [N]} of (row, position, turn) each; {} where every token weighs 1."""
    if all(answer.weight == 1.0 for row in rows for answer in row.answers):
        return {}
    known = [row.weights for row in rows]
    return {"weights": torch.tensor([known[row].get(position, 1.0) for row, position, _ in tokens],
                                    dtype=torch.float32)}


def target_ids(rows: list[EncodedRow], positions: list[tuple[int, int]]) -> Tensor:
    targets = [rows[row].ids[position - rows[row].offset] for row, position in positions]
    return torch.tensor(targets, dtype=torch.long)
