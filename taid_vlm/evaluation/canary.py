"""The vision canary: does a model look at its images?

A model's own answer distributions with the real image are compared with those with a blank image,
and with another record's image. A model that does not look (its projector is untrained, its
processor is not its own, ...) can still have a fine loss, but both differences are 0.

Both substitutes take the size of the image they stand for, so that tokens and positions stay as
they are and nothing but the pixels differs: a model to which they mean nothing gives exactly 0.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from PIL import Image
from torch import Tensor, nn

from taid_vlm.adapters import Continuation, ModelAdapter, Rendered, continued_record
from taid_vlm.alignment import supervised_positions
from taid_vlm.batch.collator import DistillationCollator, predicting_mask, target_ids
from taid_vlm.batch.several import SeveralCollator, role_of
from taid_vlm.errors import SampleDropped
from taid_vlm.evaluation.held_out import ALL, Tally, in_step
from taid_vlm.models.forward import answer_logits, evaluation_mode
from taid_vlm.objectives import data_nll, diagnose
from taid_vlm.records import Record
from taid_vlm.records.images import GREY
from taid_vlm.records.videos import Clip, Picture, VideoRef, like, mapped, shown_as

logger = logging.getLogger(__name__)

# Nats per answer token below which a model counts as blind. By Pinsker's inequality the image then
# moves at most sqrt(0.001 / 2) = 2.2 % of a token's probability on average. Rounding logits around
# 20 to bfloat16 alone gives 0.0006, so less could not be told from nothing.
BLIND_BELOW = 1e-3
REAL, BLANK, SHUFFLED, FROZEN = "real", "blank", "shuffled", "frozen"
CHECKS = (
    "Check that the processor is the model's own, that its chat template puts the images before "
    "the answers, that the checkpoint held the weights of its vision tower and projector, that "
    "training reaches what connects the two (peft), and that the answers of the data cannot be "
    "given without the images."
)

Figures = dict[str, float | int]
Looks = dict[str, Figures]  # by role


# ----- substitutes --------------------------------------------------------------------------


def blank(picture: Picture) -> Picture:
    """Mid grey of the same size, which is about 0 once a processor has normalised it.

    One colour for all records says nothing about any of them; an image's own mean colour would
    still answer what is asked about colours.
    """
    return mapped(picture, lambda image: like(Image.new("RGB", image.size, GREY), image))


def frozen(picture: Picture) -> Picture:
    """A video that stands still at its first frame: it tells who looks at one frame alone."""
    return picture.frozen() if isinstance(picture, Clip) else picture


def shuffled(records: Sequence[Record]) -> list[Record | None]:
    """For every record the next one, in a circle, that has as many images (and videos) and not the
    same.

    None where there is none. Without repeated images this is a permutation without fixed points
    of all records with the same number of images.
    """
    return [
        next((other for other in (*records[index + 1 :], *records[:index])
              if _kinds(other) == _kinds(record) and _values(other) != _values(record)),
             None)
        for index, record in enumerate(records)
    ]


def _kinds(record: Record) -> list[str]:
    return [image.kind for image in record.images]


def _values(record: Record) -> list[Any]:
    return [image.stored() for image in record.images]


def choose(dataset: Sequence[Any], number: int, collator: DistillationCollator) -> list[Record]:
    """The first `number` records with an image before an answer that every model can use.

    What cannot be used is reported and counted by the evaluation of the same records.
    """
    return list(islice(collator.usable(dataset, _answers_after_images), number))


def _answers_after_images(record: Record) -> frozenset[int]:
    """Turns of the answers that an image stands before; no image can change an earlier one."""
    return frozenset(
        turn for turn in (record.learned if record.images else ())
        if any(None in message.parts for message in record.before(turn)))


def in_own_words(
    adapter: ModelAdapter, records: Sequence[Record],
    say: Callable[[Sequence[tuple[Record, int]]], Sequence[Continuation]],
) -> list[tuple[Record, Rendered]]:
    """Records as `choose` finds them with what the model itself `say`s first after an image, and
    how it sees that; without those of which it says nothing that can be learned."""
    shown = list[tuple[Record, Rendered]]()
    for answer in say([(record, min(_answers_after_images(record))) for record in records]):
        with contextlib.suppress(SampleDropped):
            shown.append(continued_record(adapter, answer))
    return shown


# ----- one model ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    """One record as a model is shown it: its real images and their substitutes."""

    rendered: Rendered
    turns: frozenset[int]
    images: Mapping[str, list[Picture]]
    has_partner: bool

    @property
    def has_video(self) -> bool:
        return any(isinstance(picture, Clip) for picture in self.images[REAL])

    def measured(self, version: str) -> bool:
        """Whether that substitute is another picture than the record's own."""
        return self.has_video if version == FROZEN else version == BLANK or self.has_partner


def canary(
    model: nn.Module, adapter: ModelAdapter, records: Sequence[Record], **options: Any
) -> Figures:
    """How much the images of `records` matter to a model, over all processes.

    Args:
        records: with images that can be read, as `choose` finds them; the same in all processes.
        options: of `look`.

    Returns:
        kl_blank, kl_shuffled: KL(real || substitute) in nats per answer token, over the model's
        whole vocabulary. gain_blank, gain_shuffled: nats per token that the real image adds to
        the log-likelihood of the reference answer; looking helps where it is above 0. Each with
        its standard error (`kl_blank_stderr`, ...) over records. kl_frozen, gain_frozen: the same
        for videos whose every frame is the first, over the records that have one. n_records,
        n_tokens, and without_partner: records that the figures of shuffled images (absent if
        there are none) do without, as no other record has as many images. {} without any records.
    """
    merged = Tally()
    for part in gather_object([look(model, adapter, records, **options)]):
        merged.merge(part)
    return _summarise(merged)


@torch.no_grad()
def look(
    model: nn.Module,
    adapter: ModelAdapter,
    records: Sequence[Record],
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    process: tuple[int, int] = (0, 1),
    rendered: Sequence[Rendered] | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Tally:
    """One process's share of `canary`, as sums per record.

    Touches no random state and no gradient; the model's mode is restored.

    Args:
        process: (rank, world size); this call takes every world-size-th record.
        rendered: what the model is shown of the records, where that is not its own rendering.
    """
    pairs = list(zip(records, shuffled(records), strict=True))
    shown = [adapter.render(record) for record in records] if rendered is None else rendered
    versions = [BLANK, *[SHUFFLED] * any(partner is not None for _, partner in pairs),
                *[FROZEN] * any(
                    VideoRef.kind in _kinds(record) for record in records)]
    tally = Tally()
    for share in in_step(len(records), batch_size, process):
        samples = [_sample(shown[index], *pairs[index]) for index in share or [0]]
        with evaluation_mode(model), autocast():
            for name, values in _differences(model, adapter, samples, versions, device):
                if share and len(values):
                    tally.table[ALL][name].add(float(values.sum()), len(values))
    return tally


def _sample(rendered: Rendered, record: Record, partner: Record | None) -> _Sample:
    real: list[Picture] = [image.load() for image in record.images]
    # without a partner its own images fill the place, so that all three batches have one shape
    others = [image.load() for image in (partner or record).images]
    images: dict[str, list[Picture]] = {
        REAL: real,
        BLANK: [blank(image) for image in real],
        FROZEN: [frozen(image) for image in real],
        SHUFFLED: [shown_as(other, image) for other, image in zip(others, real, strict=True)],
    }
    turns = _answers_after_images(record)
    return _Sample(rendered, turns, images, partner is not None)


def _differences(
    model: nn.Module, adapter: ModelAdapter, samples: Sequence[_Sample], versions: Sequence[str],
    device: Any,
) -> Iterator[tuple[str, Tensor]]:
    """For every sample: a figure's name, and its values over the sample's tokens."""
    real, labels, rows = _predict(model, adapter, samples, REAL, device)
    for version in versions:
        substituted, again, _ = _predict(model, adapter, samples, version, device)
        assert torch.equal(labels, again), "an answer's tokens do not depend on the pixels"
        figures = compared(real, labels, substituted)
        for index, sample in enumerate(samples):
            if sample.measured(version):
                for name, values in figures.items():
                    yield f"{name}_{version}", values[rows == index]


def compared(real: Tensor, labels: Tensor, substituted: Tensor) -> dict[str, Tensor]:
    """KL(real || substitute), and what the real image adds to the answer's log-likelihood, [N]
    each, of logits [N, V]."""
    seeing, without = (data_nll(x, labels) for x in (real, substituted))
    figures = {"kl": diagnose(substituted, real)["kl"], "gain": without - seeing}
    return {name: values.double().cpu() for name, values in figures.items()}


def _predict(
    model: nn.Module, adapter: ModelAdapter, samples: Sequence[_Sample], version: str, device: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V], the tokens [N] they are to predict, and whose they are [N]."""
    encoded = adapter.encode([s.rendered for s in samples], [s.images[version] for s in samples])
    positions = [
        (index, position) for index, sample in enumerate(samples)
        for position, turn in supervised_positions(encoded.rows[index]) if turn in sample.turns
    ]
    mask = predicting_mask(encoded.inputs["input_ids"], positions)
    labels = target_ids(encoded.rows, positions).to(device)
    inputs = send_to_device(encoded.inputs, device)
    rows = torch.tensor([index for index, _ in positions])
    return answer_logits(model, inputs, mask.to(device)), labels, rows


def _summarise(tally: Tally) -> Figures:
    table = tally.table.get(ALL)
    if not table:
        return {}
    kl_blank = table["kl_blank"]
    partners = table["kl_shuffled"].records if "kl_shuffled" in table else 0
    out: Figures = {"n_records": kl_blank.records, "n_tokens": int(kl_blank.tokens),
                    "without_partner": kl_blank.records - partners}
    for name, moments in table.items():
        out[name], out[f"{name}_stderr"] = moments.mean, moments.stderr
    return out


# ----- a run --------------------------------------------------------------------------------


class Canary:
    """Measures both models of a run at every evaluation; the teacher, which does not change, once.

    Args:
        number: records with images that are measured; 0 measures nothing.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        # by identity; a data set is kept beside it, so that no other one can take its place
        self._first: dict[int, tuple[Any, list[Record], Looks]] = {}

    def measure(
        self, dataset: Sequence[Any], student: nn.Module, teacher: Any,
        collator: DistillationCollator, **options: Any,
    ) -> Looks:
        """Figures by role, {} where no record has an image; a model that is blind is warned of.

        Args:
            teacher: the model, several by name, or None.
            options: of `look`.
        """
        if not self.number:
            return {}
        _, records, first = self._first.get(id(dataset)) or (
            dataset, choose(dataset, self.number, collator), {})
        looks = dict(first)
        if records and not first:
            looks |= {role: canary(model, adapter, own, **options)
                      for role, model, adapter, own in _teachers(teacher, collator, records)}
        if records:
            looks["student"] = canary(student, collator.student, records, **options)
        _, _, first = self._first.setdefault(id(dataset), (dataset, records, looks))
        if options.get("process", (0, 1))[0] == 0:
            for sentence in blind_warnings(looks, first.get("student")).values():
                logger.warning("%s %s", sentence, CHECKS)
        return looks


def _teachers(
    teacher: Any, collator: DistillationCollator, records: Sequence[Record]
) -> Iterator[tuple[str, nn.Module, ModelAdapter, Sequence[Record]]]:
    """Every teacher in this process by its role, with its adapter and the records it teaches."""
    if isinstance(collator, SeveralCollator):
        for name, model in (teacher or {}).items():
            own = list(collator.shares.taught(name, records))
            if own:
                yield role_of(name), model, collator.teacher_of(name), own
    elif teacher is not None and collator.teacher is not None:
        yield "teacher", teacher, collator.teacher, records


def is_blind(figures: Mapping[str, float | int]) -> bool:
    """Whether neither a blank image nor another record's changes the answers."""
    divergences = [figures[name] for name in ("kl_blank", "kl_shuffled") if name in figures]
    return bool(divergences) and max(divergences) < BLIND_BELOW


def blind_warnings(looks: Looks, start: Figures | None = None) -> dict[str, str]:
    """A warning for every role whose model does not look.

    Args:
        start: the student's figures at first; perhaps it looked then.
    """
    return {role: _warning(role, looks, start or {}) for role, figures in looks.items()
            if is_blind(figures)}


def _warning(role: str, looks: Looks, start: Figures) -> str:
    figures, teacher = looks[role], looks.get("teacher", {})
    who = f"The {role}" if role in ("student", "teacher") else role
    other = f" and another record's image by {figures['kl_shuffled']:.2g}" \
        if "kl_shuffled" in figures else ""
    text = (f"{who} DOES NOT LOOK at its images: over {figures['n_records']} records, a blank "
            f"image in place of the real one changes its answers by {figures['kl_blank']:.2g}"
            f"{other} nats per token, which is below {BLIND_BELOW:g}.")
    if role == "student" and start and not is_blind(start):
        text += f" It did look at first ({start['kl_blank']:.2g})."
    if role == "student" and teacher and not is_blind(teacher):
        text += f" The teacher does look ({teacher['kl_blank']:.2g})."
    return text


def account(before: Looks, after: Looks) -> dict[str, Any] | None:
    """What results.json says about looking: figures, and the warnings as sentences."""
    if not after:
        return None
    start = before["student"]
    first, last = blind_warnings(before), blind_warnings(after, start)
    warnings = [sentence for role, sentence in last.items() if role != "student"]
    warnings += [f"{when} training: {texts['student']}"
                 for when, texts in (("Before", first), ("After", last)) if "student" in texts]
    return {"teacher": after.get("teacher"),
            "teachers": {role.removeprefix(role_of("")): figures for role, figures in after.items()
                         if role not in ("teacher", "student")},
            "student": {"before": start, "after": after["student"]},
            "warnings": [*warnings, CHECKS] if warnings else []}
