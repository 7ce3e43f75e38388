"""Putting a pair together: models by name, adapters, pairing and collator, checked on the data."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from taid_vlm.adapters import ModelAdapter, Processor, check_image_token, make_adapter
from taid_vlm.alignment import Pairing, check_modalities, pair_models
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.config.model import ModelSpec
from taid_vlm.errors import RecipeError, TaidError, nearest, with_place
from taid_vlm.evaluation.held_out import DIRECTIONS
from taid_vlm.models.forward import head_rows
from taid_vlm.models.loading import load_model, load_processor
from taid_vlm.models.lora import check_names, name_base
from taid_vlm.objectives import Objective, parse_objective
from taid_vlm.records import Record, first_rows, parts_of
from taid_vlm.teachers.cache import TeacherCache
from taid_vlm.teachers.shards import AGAIN
from taid_vlm.teachers.sparse import maps_hash
from taid_vlm.training.intake import PROBED_RECORDS, check_usable
from taid_vlm.training.router import check_router

if TYPE_CHECKING:
    from taid_vlm.training.config import DistillationConfig

logger = logging.getLogger(__name__)

CHUNK = "chunk_"  # before the names of figures of chunks


def pair_for_training(
    student: PreTrainedModel, teacher: PreTrainedModel | TeacherCache | None,
    processing_class: Processor | None, teacher_processing_class: Processor | None,
    args: DistillationConfig, datasets: Sequence[Any],
) -> tuple[Pairing | None, DistillationCollator]:
    """Adapters, pairing and collator for two models, checked against the data."""
    if processing_class is None or (teacher is not None and teacher_processing_class is None):
        role = "processing_class" if processing_class is None else "teacher_processing_class"
        raise TaidError(f"{role} is missing: models given as objects need their tokenizer or "
                        "processor beside them.")
    ours = make_adapter(processing_class, "student", length_limit(student.config, args.max_length),
                        args.chat_template_kwargs)
    theirs, pairing = None, None
    objective = parse_objective(args.objective)
    if hint := check_router(objective.router, student):
        logger.warning(hint)
    if teacher is not None:
        assert teacher_processing_class is not None
        theirs = make_adapter(
            teacher_processing_class, "teacher", length_limit(teacher.config, args.max_length),
            args.teacher_chat_template_kwargs)
        check_image_token(theirs, teacher.config)
    check_image_token(ours, student.config)
    parts = [part for dataset in datasets
             for part in (dataset.values() if isinstance(dataset, dict) else [dataset])]
    probed = [row for part in parts for source in parts_of(part)
              for row in first_rows(source, PROBED_RECORDS) if isinstance(row, Record)]
    adapters = [a for a in (theirs, ours) if a is not None]
    check_modalities([a.role for a in adapters if not a.sees_images],
                     any(record.images for record in probed))
    if teacher is not None and theirs is not None:
        answers = [text for r in probed for text in (r.answers or [r.text or ""])]
        rows = teacher.rows if isinstance(teacher, TeacherCache) else head_rows(teacher)
        pairing = pair_models(theirs, ours, rows, head_rows(student),
                              [text[:2000] for text in answers], objective.alignment)
        _refuse_metric(args.metric_for_best_model, pairing)
        if pairing.has_chunks and objective.sampled is not None and objective.sampled.estimates:
            raise TaidError("objective.on_policy.objective = 'sampled_rkl' needs the teacher's "
                            "probability of every sampled token, and these models split texts "
                            "differently; take reverse_kl.")
    for warning in (*(pairing.warnings if pairing else ()), *seams(adapters, probed)):
        logger.warning(warning)
    if isinstance(teacher, TeacherCache) and teacher.signal.is_sparse and objective.needs_teacher:
        _check_entries(teacher, pairing, objective)
    collator = DistillationCollator(
        ours, theirs, pairing, args.supervise, args.padding_side,  # type: ignore[arg-type]
        stored=_stored(teacher, objective))
    for number, part in enumerate(parts):
        check_usable(collator, part, 1.0 if number else args.max_left_out)
    if args.is_zero3:
        collator.beside = next((row for row in probed if row.images
                                and collator([row])["counts"]["rows"]), None)
    return pairing, collator


def seams(adapters: Sequence[ModelAdapter], records: Sequence[Record]) -> Iterator[str]:
    """A warning for each model that reads questions and answers with nothing between."""
    for adapter in adapters:
        places = [place for place in map(adapter.seam, records) if place]
        if places:
            yield (f"{adapter.role}: no chat template, so a question and its answer are joined as "
                   f"they are: with no space between in {len(places)} of the first {len(records)} "
                   f"records ({places[0]!r}). End the questions in the data with a space or a new "
                   f"line, or set {adapter.role}.chat_template")


def _stored(teacher: Any, objective: Objective) -> TeacherCache | None:
    """The cache that stands for a teacher; raises TaidError where a term asks a live one."""
    if not isinstance(teacher, TeacherCache):
        return None
    if objective.on_policy is not None:
        raise TaidError("objective.on_policy asks the teacher about answers that the student gives "
                        "while training, and teacher.cache holds what it said of the data only: "
                        "leave it out, or name the teacher with teacher.model_name_or_path.")
    for key, asks in (("token_weights", bool(objective.visual_advantage)),
                      (" and ".join(term.name for term in objective.visual), objective.visual)):
        if asks:
            raise TaidError(f"objective.{key} shows images to the teacher while training, and "
                            "teacher.cache holds its hidden states only: leave it out, or name the "
                            "teacher with teacher.model_name_or_path.")
    return teacher


def _check_entries(cache: TeacherCache, pairing: Pairing | None, objective: Objective) -> None:
    """Raise TaidError where a cache of a few entries is not of this pair, or of this objective."""
    try:
        cache.signal.check(pairing, objective)
    except TaidError as error:
        raise with_place(error, f"teacher.cache '{cache.folder}', built with") from error
    if pairing is None or maps_hash(pairing) != cache.identity["entries"]:
        raise TaidError(f"teacher.cache '{cache.folder}' holds entries of another pair's "
                        "vocabulary: it was built for another student or alignment.", mend=AGAIN)


def of_chunks(metric: str | None) -> bool:
    """Whether `metric_for_best_model` is a figure that only pairs with chunks have."""
    return str(metric).removeprefix("eval_").startswith(CHUNK)


def _refuse_metric(metric: str | None, pairing: Pairing) -> None:
    if of_chunks(metric) and not pairing.has_chunks:
        plain = str(metric).removeprefix("eval_").removeprefix(CHUNK)
        valid = [name for name in DIRECTIONS if not name.startswith(CHUNK)]
        raise RecipeError(f"train.metric_for_best_model = '{metric}' is no figure of this pair: "
                          f"its models split texts alike, without chunks.{nearest(plain, valid)}")


def refuse_absent(metric: str | None, figures: Mapping[str, Any]) -> None:
    """Raise RecipeError for a figure of chunks that the held-out records do not have."""
    name = str(metric).removeprefix("eval_")
    if of_chunks(metric) and figures and name not in figures:
        raise RecipeError(f"train.metric_for_best_model = '{metric}', but both models split all of "
                          "the held-out answers alike, so there is no such figure; take "
                          f"'{name.removeprefix(CHUNK)}'.")


def length_limit(config: Any, max_length: int | None) -> int | None:
    """The shorter of `max_length` and the positions the model was built for."""
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [x for x in (max_length, own) if x]
    return min(limits) if limits else None


def with_adapter(student: PreTrainedModel, config: Any, on_meta: bool = False) -> Any:
    """The student with an adapter of the peft library; raises TaidError if it does not fit.

    Args:
        on_meta: whether the adapter's own weights stay on the meta device.
    """
    from peft import get_peft_model

    check_names(student, config)
    try:
        model = get_peft_model(student, config, low_cpu_mem_usage=on_meta)
    except ValueError as error:
        raise TaidError(f"student.peft: {error}") from error
    name_base(model)
    return model


def resolve(
    model: Any, processor: Any, role: str, init_kwargs: Mapping[str, Any] | None
) -> tuple[Any, Any]:
    """Load what was given by name."""
    if isinstance(model, Mapping):
        pairs = {name: resolve(one, (processor or {}).get(name), f"teachers.{name}", init_kwargs)
                 for name, one in model.items()}
        return {name: one for name, (one, _) in pairs.items()}, {
            name: own for name, (_, own) in pairs.items()}
    if not isinstance(model, str):
        return model, processor
    spec = ModelSpec(model_name_or_path=model, init_kwargs=dict(init_kwargs or {}))
    return load_model(spec, role), processor or load_processor(spec, role)
