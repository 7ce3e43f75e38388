"""`shrink`: a student that is its teacher with fewer layers or fewer image tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from taid_vlm.adapters import ModelAdapter, Processor, check_reloaded, make_adapter
from taid_vlm.alignment import check_modalities
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.config.data import DataSource
from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import TaidError, nearest
from taid_vlm.io.folders import new_folder, whole_or_absent
from taid_vlm.io.terminal import table
from taid_vlm.models.forward import answer_logits
from taid_vlm.models.generation import generate_answers
from taid_vlm.models.loading import load_config, load_model, load_processor, sees_images
from taid_vlm.models.parts import count_parameters
from taid_vlm.models.published import save_weights
from taid_vlm.records import (
    ImageRef,
    Malformed,
    Message,
    Record,
    first_rows,
    open_records,
)
from taid_vlm.students.image_tokens import (
    Narrowing,
    choose_tokens,
    narrow_model,
    narrow_processor,
)
from taid_vlm.students.layers import (
    Kept,
    Stack,
    best_choice,
    block_influence,
    checked_list,
    checked_number,
    cut_layers,
    even_choice,
    language_stack,
    skipping,
    tower_stack,
)

Choice = Literal["even", "importance"]
CHOICES = ("even", "importance")
CALIBRATION_BATCH = 4
PROBE_SIDE = 448
EXACT = 1e-5  # logits that are to be equal may differ by this share of the largest
NOISE = 4  # and by so many times what a model's own logits differ by from run to run


@dataclass(frozen=True)
class Shrunk:
    """What was made.

    parameters: by part, (teacher, student). layers, tower_layers: the teacher's numbers of those
    that were kept. image_tokens: by what they are counted for, (teacher, student). importance:
    every language model layer's score where it was measured. checks: what was found to hold.
    """

    output_dir: Path
    parameters: Mapping[str, tuple[int, int]]
    layers: Kept | None
    tower_layers: Kept | None
    image_tokens: Mapping[str, tuple[int, int]]
    importance: tuple[float, ...] | None
    checks: tuple[str, ...]

    def table(self) -> str:
        """Everything as text for a terminal."""
        rows = [("parameters", "teacher", "student"),
                *((part, f"{a:,}", f"{b:,}") for part, (a, b) in self.parameters.items()),
                *((f"image tokens {what}", f"{a:,}", f"{b:,}")
                  for what, (a, b) in self.image_tokens.items())]
        lines = [table(rows, right=(1, 2))]
        for name, kept in (("layers kept", self.layers), ("tower layers kept", self.tower_layers)):
            if kept is not None:
                lines.append(f"{name}: {', '.join(map(str, kept))}")
        if self.importance is not None:
            scores = (f"{i}: {score:.4f}" for i, score in enumerate(self.importance))
            lines.append(f"importance: {', '.join(scores)}")
        return "\n".join([*lines, *(f"checked: {check}" for check in self.checks),
                          f"student: {self.output_dir}"])


def shrink(
    teacher: str | ModelSpec, output_dir: str | Path, *, layers: int | None = None,
    keep: Sequence[int] | None = None, choose: Choice = "even",
    calibration: str | DataSource | None = None, calibration_records: int = 64,
    tower_layers: int | None = None, image_tokens: int | None = None,
) -> Shrunk:
    """Make a student from its teacher: config, weights, processor and generation settings.

    Args:
        teacher: folder or hub name, of a model with vision or a text model.
        output_dir: a new or empty folder.
        layers: how many layers of the language model to keep, or `keep`: which, from 0.
        choose: which of them: "even" (`layers.even_choice` has the rule) or "importance", the
            largest block influence on `calibration_records` records of `calibration`.
        tower_layers: how many layers of the vision tower to keep, evenly.
        image_tokens: how many tokens an image (or tile) becomes; `image_tokens.py` has the rule.

    Raises:
        TaidError: nothing to do, a choice that does not fit, or an architecture that cannot be cut
            so; nothing is left in `output_dir` then.
    """
    options = _Options(layers, keep, choose, calibration, calibration_records, tower_layers,
                       image_tokens)
    folder = _check(options, Path(output_dir).expanduser().absolute())
    spec = (ModelSpec(model_name_or_path=teacher, dtype="auto") if isinstance(teacher, str)
            else teacher)
    config, processor = load_config(spec, "teacher"), load_processor(spec, "teacher")
    if getattr(config, "quantization_config", None) is not None:
        raise TaidError(f"teacher: '{spec.model_name_or_path}' is quantized, and only plain "
                        "weights can be cut; give the model it was made from.")
    stacks = _stacks(config, options)
    narrowing = None if image_tokens is None else choose_tokens(config, processor, image_tokens)
    make_adapter(processor, "teacher")  # a processor without a template is refused before loading
    records = _records(options, sees_images(config))
    model = load_model(spec, "teacher").to(_device()).eval()
    scores = _scores(model, processor, stacks, records) if records else None
    cuts = {stack: _kept(stack, options, scores) for stack in stacks}
    return replace(_written(model, processor, cuts, narrowing, folder), importance=scores)


@dataclass(frozen=True)
class _Options:
    """The options of `shrink`."""

    layers: int | None
    keep: Sequence[int] | None
    choose: str
    calibration: str | DataSource | None
    calibration_records: int
    tower_layers: int | None
    image_tokens: int | None


# ----- before anything is loaded ------------------------------------------------------------


def _check(options: _Options, folder: Path) -> Path:
    """The output folder, where options fit together and it can be written."""
    if options.choose not in CHOICES:
        raise TaidError(f"choose = '{options.choose}'.{nearest(options.choose, CHOICES)}")
    if options.layers is not None and options.keep is not None:
        raise TaidError("layers says how many and keep says which: give one of them.")
    if options.layers is options.keep is options.tower_layers is options.image_tokens is None:
        raise TaidError("nothing to shrink: give layers, keep, tower_layers or image_tokens.")
    measured = options.choose == "importance"
    if measured and (options.layers is None or options.calibration is None):
        raise TaidError("choose = 'importance' needs layers (how many to keep) and calibration "
                        "(records to measure them on).")
    if not measured and options.calibration is not None:
        raise TaidError("calibration is only for choose = 'importance'.")
    if options.calibration_records < 1:
        raise TaidError(f"calibration_records = {options.calibration_records}, but it must be at "
                        "least 1.")
    return new_folder(folder)


def _stacks(config: PretrainedConfig, options: _Options) -> list[Stack]:
    """The sides that lose layers, with the numbers checked."""
    stacks = []
    if options.layers is not None or options.keep is not None:
        stacks.append(language_stack(config))
    if options.tower_layers is not None:
        stacks.append(tower_stack(config))
    for stack in stacks:
        if stack.side == "vision tower" and options.tower_layers is not None:
            checked_number(stack, options.tower_layers, "tower_layers")
        elif options.keep is not None:
            checked_list(stack, options.keep, "keep")
        elif options.layers is not None:
            checked_number(stack, options.layers, "layers")
    return stacks


def _records(options: _Options, sees: bool) -> list[Record | Malformed]:
    """The first records of the calibration data; none without."""
    source = options.calibration
    if source is None:
        return []
    source = DataSource(path=source) if isinstance(source, str) else source
    number = min(options.calibration_records, source.max_records or options.calibration_records)
    records = open_records(source.model_copy(update={"max_records": number}))
    check_modalities([] if sees else ["teacher"], records.has_images)
    return list(first_rows(records))


# ----- choosing -----------------------------------------------------------------------------


def _device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else accelerator


def _scores(
    model: PreTrainedModel, processor: Processor, stacks: Sequence[Stack],
    records: Sequence[Record | Malformed],
) -> tuple[float, ...]:
    """Block influence of the language model's layers."""
    collator = DistillationCollator(make_adapter(processor, "student"))
    batches = (records[i : i + CALIBRATION_BATCH]
               for i in range(0, len(records), CALIBRATION_BATCH))
    return tuple(block_influence(model, stacks[0], collator, batches))


def _kept(stack: Stack, options: _Options, scores: Sequence[float] | None) -> Kept:
    if stack.side == "vision tower":
        assert options.tower_layers is not None
        return even_choice(stack, options.tower_layers)
    if options.keep is not None:
        return checked_list(stack, options.keep, "keep")
    assert options.layers is not None
    if scores is None:
        return even_choice(stack, options.layers)
    return best_choice(stack, options.layers, scores)


# ----- making and checking ------------------------------------------------------------------


def _written(
    model: PreTrainedModel, processor: Processor, cuts: Mapping[Stack, Kept],
    narrowing: Narrowing | None, folder: Path,
) -> Shrunk:
    """The student in its folder, which is whole or not there."""
    with whole_or_absent(folder, "the student could not be saved to '{}'") as partial:
        shrunk = _make(model, processor, cuts, narrowing, partial)
    return replace(shrunk, output_dir=folder)


def _make(
    model: PreTrainedModel, processor: Processor, cuts: Mapping[Stack, Kept],
    narrowing: Narrowing | None, folder: Path,
) -> Shrunk:
    """Build the student, write it and check it."""
    probes = probe_inputs(make_adapter(processor, "teacher"))
    student, checks, tokens = model, [], {}
    if cuts:
        student = cut_layers(model, cuts)
        _check_cut(model, student, probes, cuts)
        checks.append("logits are the teacher's with the dropped layers skipped")
    if narrowing is not None:
        student = narrow_model(student, narrowing)
        narrow_processor(processor, narrowing)
        tokens[narrowing.family.per] = (narrowing.before, narrowing.after)
    save_weights(student, folder)
    processor.save_pretrained(folder)
    after = check_saved(student, processor, folder)
    checks.append("plain Auto classes load the same weights, token ids and logits; it answers")
    if sees_images(model.config):
        tokens[f"of a {PROBE_SIDE} x {PROBE_SIDE} image"] = (
            _image_tokens(model, probes[0]), _image_tokens(student, after[0]))
    kept = {stack.side: layers for stack, layers in cuts.items()}
    return Shrunk(folder, _parameters(model, student), kept.get("language model"),
                  kept.get("vision tower"), tokens, None, tuple(checks))


def _questions(sees: bool) -> list[Record]:
    """A question without a picture and, for a model that sees, first one about a picture."""
    ramp = torch.arange(PROBE_SIDE**2 * 3).view(PROBE_SIDE, PROBE_SIDE, 3) * 7 % 256
    picture = ImageRef(Image.fromarray(ramp.byte().numpy()), "probe")
    answer = Message("assistant", ("A red circle.",))
    with_image = Message("user", (None, "What is in this picture?"))
    pictures = [Record("probe", (with_image, answer), (picture,))] if sees else []
    return [*pictures, Record("probe", (Message("user", ("What is it?",)), answer))]


def probe_inputs(adapter: ModelAdapter) -> list[dict[str, Tensor]]:
    """The questions as inputs of the model."""
    return [adapter.encode([adapter.render(record)], [[image.load() for image in record.images]]
                           ).inputs for record in _questions(adapter.sees_images)]


def _image_tokens(model: PreTrainedModel, probe: Mapping[str, Tensor]) -> int:
    names = ("image_token_id", "image_token_index")
    token = next(x for x in (getattr(model.config, n, None) for n in names) if x is not None)
    return int((probe["input_ids"] == token).sum())


@torch.inference_mode()
def probe_logits(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    moved = {key: x.to(model.device) for key, x in inputs.items()}
    return answer_logits(model, moved, moved["attention_mask"].bool()).float()


def _check_cut(
    teacher: PreTrainedModel, student: PreTrainedModel, probes: Sequence[Mapping[str, Tensor]],
    cuts: Mapping[Stack, Kept],
) -> None:
    """The student must compute what the teacher does without the dropped layers."""
    for inputs in probes:
        with skipping(teacher, cuts):
            expected = [probe_logits(teacher, inputs) for _ in range(2)]
        _check_equal(probe_logits(student, inputs), expected,
                     f"{teacher.config.model_type} cannot be cut to these layers: the result is "
                     "not the teacher without the others (its layers depend on their numbers or on "
                     "each other in a way its config cannot express). Choose others with keep.")


def check_saved(
    student: PreTrainedModel, processor: Processor, folder: Path
) -> list[dict[str, Tensor]]:
    """Load what was written as a user would: the same weights, ids and logits, and an answer.

    Returns the probes as the loaded processor makes them.
    """
    before = make_adapter(processor, "teacher").tokenizer
    spec = ModelSpec(model_name_or_path=str(folder), dtype="auto")
    again = load_model(spec, "student").to(student.device).eval()
    processor = load_processor(spec, "student")
    saved, loaded = student.state_dict(), again.state_dict()
    changed = [name for name in saved.keys() | loaded.keys()
               if name not in saved or name not in loaded or not saved[name].equal(loaded[name])]
    if changed:
        raise TaidError(f"the student's {min(changed)} is not the same after saving and loading.")
    adapter = make_adapter(processor, "student")
    check_reloaded(before, adapter.tokenizer, "saving and loading the student's tokenizer")
    probes = probe_inputs(adapter)
    for inputs in probes:
        _check_equal(probe_logits(again, inputs), [probe_logits(student, inputs) for _ in range(2)],
                     "the student's logits are not the same after saving and loading.")
    question = _questions(adapter.sees_images)[0]
    generate_answers(again, adapter, [(question, 0)], max_new_tokens=4)
    return probes


def _check_equal(logits: Tensor, expected: Sequence[Tensor], message: str) -> None:
    """Raise TaidError unless `logits` is what was `expected` (two runs of the same model)."""
    first, second = expected
    allowed = EXACT * first.abs().max() + NOISE * (first - second).abs().max()
    same = logits.shape == first.shape and bool(logits.isfinite().all())
    if not same or (logits - first).abs().max() > allowed:
        raise TaidError(message)


def _parameters(
    teacher: PreTrainedModel, student: PreTrainedModel
) -> dict[str, tuple[int, int]]:
    """Parameters by part, of both; tied ones once."""
    both = [{part: numbers["parameters"] for part, numbers in count_parameters(model).items()}
            for model in (teacher, student)]
    total = tuple(sum(counts.values()) for counts in both)
    parts = {part: (count, both[1][part]) for part, count in both[0].items()}
    return {**parts, "all": (total[0], total[1])}
