"""A served teacher in training: asked ahead, checked before the first step, and lost in order."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer

from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.batch.sparse import SparseSignal, check_one_by_one, check_sparse
from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import TaidError
from taid_vlm.evaluation.canary import BLIND_BELOW, blank
from taid_vlm.io.endpoint import ServerLost
from taid_vlm.io.manifest import read_manifest
from taid_vlm.models.loading import load_model
from taid_vlm.objectives import Objective
from taid_vlm.records import Record, first_rows
from taid_vlm.teachers import (
    CachedTeacher,
    LocalTeacher,
    ServedTeacher,
    SharedTeacher,
    TeacherCache,
    TeacherInStudent,
    TeacherLost,
    Teachers,
)
from taid_vlm.teachers.protocol import Laws, as_chat
from taid_vlm.teachers.served import SAME_MODEL, AskingCollator, distance, parts_for
from taid_vlm.teachers.several import each
from taid_vlm.training.visual import visual_collator

logger = logging.getLogger(__name__)

CALLED = "a served teacher"
CHECKED = 8  # records, with and without images, that a teacher is checked on
SHIFTED_BY = 0.5  # nats per token by which no teacher knows its neighbours' tokens better
ERRORS = 4.0  # and standard errors that it has to be beside
ABOVE_UNIFORM = 3.0  # nats per token above a uniform guess that not even random weights have
NOISE = 3.0  # times what the same picture changes is what another one has to change at least


def serve(
    collator: DistillationCollator, teacher: Any, objective: Objective, dataset: Any
) -> DistillationCollator:
    """The collator with what a served teacher has to be sent; rows that its server does not take
    are left out. For any other teacher the same collator.

    Raises:
        TaidError: an objective or a pair that needs more than a server gives, or a teacher that
            does not pass `check_teacher`.
    """
    if not isinstance(teacher, ServedTeacher):
        return collator
    check_sparse(objective, CALLED)
    assert collator.pairing is not None
    assert collator.teacher is not None
    check_one_by_one(collator.pairing, CALLED)
    if objective.sampled is not None and objective.sampled.estimates and not all(
            vocabulary.identity for vocabulary in collator.pairing.maps):
        raise TaidError(f"objective.on_policy.objective = 'sampled_rkl': {CALLED} says how likely "
                        "its own tokens are, and the student has others beside them; take "
                        "forward_kl or taid, or a teacher in this process.")
    limits = [n for n in (collator.teacher.max_length, teacher.longest) if n]
    collator.teacher.max_length = min(limits, default=None)
    collator = replace(collator, chat=as_chat)
    if dataset is not None and teacher.asks:
        check_teacher(teacher, collator, dataset)
    return collator


def shapes_of(teacher: Any) -> Any:
    """The model, or of a served one its shapes."""
    if isinstance(teacher, TeacherInStudent):
        return teacher.model
    return teacher.skeleton if isinstance(teacher, ServedTeacher) else teacher


def training_collator(
    collator: DistillationCollator, objective: Objective, student: Any, teacher: Any
) -> Any:
    """With what the objective asks of images, or asking served teachers ahead."""
    served = served_of(teacher)
    if served and objective.needs_teacher:
        return AskingCollator(collator, served)
    return collator if served or isinstance(teacher, Mapping) else visual_collator(
        collator, objective, student, teacher)


def served_of(teacher: Any) -> dict[str, ServedTeacher]:
    """The served ones by the name of their part of a batch, "" of a single teacher."""
    return {name: one for name, one in each(teacher).items() if isinstance(one, ServedTeacher)}


def place_teacher(
    teacher: Any, accelerator: Accelerator, pairing: Any = None, called: str = "The teacher",
    sharding: str = "replicate",
) -> Any:
    """A model becomes a teacher in this process, a cache one with its head; several do by name.

    Args:
        pairing: of several, how each is compared. sharding: of a model, over the processes.
    """
    if isinstance(teacher, Mapping):
        return Teachers({name: place_teacher(one, accelerator, called=f"The teacher '{name}'")
                         for name, one in teacher.items()}, pairing)
    if teacher is None or isinstance(teacher, ServedTeacher):
        return teacher
    if isinstance(teacher, TeacherInStudent):
        return SharedTeacher(teacher, accelerator)
    if not isinstance(teacher, TeacherCache):
        return LocalTeacher(teacher, accelerator, sharding)
    if accelerator.is_main_process:
        logger.info("%s is cached in '%s' and shown no images: whether it looks at its own (the "
                    "canary) is not measured.", called, teacher.folder)
    return CachedTeacher(teacher, accelerator)


def await_signals(
    teacher: Any, batches: Sequence[dict[str, Any]], accelerator: Accelerator
) -> None:
    """Wait for what was asked ahead; raise TeacherLost in every process if it fails in one."""
    for name, served in served_of(teacher).items():
        problem = None
        try:
            served.wait(parts_for(name, batches))
        except TaidError as error:
            problem = str(error)
        problems = gather_object([problem]) if accelerator.num_processes > 1 else [problem]
        if any(problems):
            served.close()
            raise TeacherLost(next(filter(None, problems)))


@contextlib.contextmanager
def kept_if_lost(trainer: Trainer) -> Iterator[None]:
    """If a server is lost inside, between two steps of training, the last one is kept: a whole
    checkpoint from which the run goes on when the server is back."""
    try:
        yield
    except ServerLost as lost:
        step = trainer.state.global_step
        if not trainer.is_in_train or not step:
            raise
        folder = Path(str(trainer.args.output_dir)) / f"checkpoint-{step}"
        if read_manifest(folder) is None:
            trainer._save_checkpoint(trainer.model_wrapped, None)
        raise type(lost)(lost.message, mend=f"The run is kept in '{folder}': run again with "
                         "--resume when the server is back.") from lost


# ----- before the first step ----------------------------------------------------------------


def check_teacher(
    teacher: ServedTeacher, collator: DistillationCollator, dataset: Any
) -> None:
    """Ask about a few records, and refuse a teacher that cannot be the one that is meant.

    Its weights, where they are at hand (`server.check`), must say the same. Otherwise: it must not
    know the data worse than a uniform guess does, not know the tokens beside the data's better
    than these, and its answers must depend on the pictures.

    Raises:
        TaidError: which of these, with figures.
    """
    records = _some(collator, dataset)
    if not records:
        return
    batch = collator(records)
    signal = teacher.sparse(batch, teacher.top)
    if teacher.server.check is not None:
        _check_weights(teacher, teacher.server.check, batch, signal)
    else:
        _check_data(teacher, batch, signal)
    seeing = [record for record in records if record.images]
    if seeing:
        _check_sight(teacher, collator, seeing)


def _some(collator: DistillationCollator, dataset: Any) -> list[Record]:
    """The first usable records, those with images before others."""
    usable = [record for record in first_rows(dataset, 4 * CHECKED)
              if isinstance(record, Record) and collator([record])["counts"]["rows"]]
    return sorted(usable, key=lambda record: not record.images)[:CHECKED]


def _check_data(teacher: ServedTeacher, batch: dict[str, Any], signal: SparseSignal) -> None:
    labels, row = batch["teacher_labels"], batch["row"]
    for by in (-1, 1):
        here = slice(1, None) if by < 0 else slice(None, -1)
        there = slice(None, -1) if by < 0 else slice(1, None)
        inside = row[here] == row[there]
        if not bool(inside.any()):
            continue
        laws = SparseSignal(*(part[here][inside] for part in signal[:3]))
        plain, beside = (-_likelihood(laws, labels[side][inside], teacher.rows)
                         for side in (here, there))
        gains = (plain - beside).double()
        error = float(gains.std(correction=0)) / math.sqrt(len(gains))
        if gains.mean() > SHIFTED_BY + ERRORS * error:
            side = "before" if by < 0 else "after"
            raise _refused(teacher, f"is shifted: its laws fit the tokens {side} those they are "
                           f"said to be of ({beside.mean():.2f} against {plain.mean():.2f} nats "
                           "per token)")
    own = -_likelihood(signal, labels, teacher.rows).mean()
    uniform = math.log(teacher.rows)
    if own > uniform + ABOVE_UNIFORM:
        raise _refused(teacher, f"knows nothing of the data: {own:.2f} nats per token, where a "
                       f"guess among all {teacher.rows:,} tokens has {uniform:.2f}")


def _likelihood(signal: SparseSignal, tokens: Tensor, rows: int) -> Tensor:
    """Log-probabilities [N] of tokens; one outside of the k has an equal share of the rest."""
    others = max(rows - signal.ids.shape[-1], 1)
    share = signal.log_rest.clamp(min=-1e4) - math.log(others)
    among = signal.log_probs.masked_fill(signal.ids != tokens[:, None], -torch.inf).amax(-1)
    return torch.where(among > -torch.inf, among, share)


def _check_sight(
    teacher: ServedTeacher, collator: DistillationCollator, records: Sequence[Record]
) -> None:
    """Compare with a grey picture of the same size, and with the same picture once more."""
    batch = collator(records)
    grey = replace(collator, chat=lambda adapter, record, rendered, images: as_chat(
        adapter, record, rendered, [blank(image) for image in images]))(records)
    first, again, other = (teacher.sparse(b, teacher.top) for b in (batch, batch, grey))
    noise, moved = _gap(first, again), _gap(first, other)
    if moved < max(BLIND_BELOW, NOISE * noise):
        raise _refused(teacher, f"DOES NOT LOOK at its images: a grey picture in place of the real "
                       f"one changes its log-probabilities by {moved:.2g} nats per token over "
                       f"{len(records)} records (the same one again: {noise:.2g})")


def _gap(first: SparseSignal, second: SparseSignal) -> float:
    """Mean absolute difference of the data's log-probabilities."""
    assert first.own is not None
    assert second.own is not None
    return float((first.own - second.own).abs().mean())


def _check_weights(
    teacher: ServedTeacher, folder: str, batch: dict[str, Any], signal: SparseSignal
) -> None:
    model = load_model(ModelSpec(model_name_or_path=folder), "teacher.server.check")
    local = LocalTeacher(model).sparse(batch, teacher.top)
    here, there = (Laws(x.ids, x.log_probs.double(), x.log_rest) for x in (local, signal))
    apart = distance(here, there)
    if not apart <= SAME_MODEL:
        raise _refused(teacher, f"is not the model in teacher.server.check = '{folder}': their "
                       f"log-probabilities differ by {apart:.2g} nats, weighted by "
                       f"probability, and rounding leaves less than {SAME_MODEL:g}")


def _refused(teacher: ServedTeacher, problem: str) -> TaidError:
    teacher.close()
    return TaidError(
        f"teacher.server: '{teacher.server.model}' at '{teacher.server.url}' {problem}.",
        mend="Check that the server has the right weights, and that teacher.processor_name_or_path "
             "is that model's own.")
