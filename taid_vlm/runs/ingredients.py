"""What a recipe names, opened and checked before any weights are loaded."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from taid_vlm.adapters import Processor, check_image_token, make_adapter
from taid_vlm.alignment import check_modalities
from taid_vlm.batch.several import role_of
from taid_vlm.batch.sparse import check_sparse
from taid_vlm.config.data import listed
from taid_vlm.config.recipe import Recipe
from taid_vlm.errors import TaidError, nearest
from taid_vlm.io.quiet import quiet
from taid_vlm.models.loading import load_config, load_processor, load_skeleton, sees_images
from taid_vlm.models.lora import check_names
from taid_vlm.models.parts import freeze_parts
from taid_vlm.objectives import parse_objective
from taid_vlm.records import AnyRecords, Record, StreamedRecords, open_sources, parts_of
from taid_vlm.records.record import TEACHER
from taid_vlm.teachers import TeacherCache
from taid_vlm.training.budget import check_budget
from taid_vlm.training.config import DistillationConfig, training_arguments
from taid_vlm.training.early import check_files, refuse_early
from taid_vlm.training.intake import named_unread
from taid_vlm.training.pair import of_chunks
from taid_vlm.training.several import put_together

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ingredients:
    """What a recipe names.

    configs: of the models, "student" and the keys of `Recipe.teacher_specs`. eval: held-out
    records, which have a length and an order; None without any. teacher_processor: of several
    teachers by name. caches: of teachers that are not loaded, by their keys.
    """

    args: DistillationConfig
    configs: Mapping[str, PretrainedConfig]
    train: AnyRecords
    eval: Any
    student_processor: Processor
    teacher_processor: Any
    caches: Mapping[str, TeacherCache]


def gather(recipe: Recipe) -> Ingredients:
    """Open data and processors; every mistake that can show without weights shows here."""
    check_files(recipe.train)
    teachers = recipe.teacher_specs
    caches = {key: TeacherCache(spec.cache, spec.trust_remote_code)
              for key, spec in teachers.items() if spec.cache is not None}
    args = training_arguments(recipe)
    adapter = lora_config(recipe.student.peft)
    if args.freeze or args.learning_rates or adapter is not None:
        skeleton = load_skeleton(recipe.student, "student")
        freeze_parts(skeleton, args.freeze, args.learning_rates)
        if adapter is not None:
            check_names(skeleton, adapter)
    configs = {"student": load_config(recipe.student, "student")}
    refuse_early(args, recipe, lora_config(recipe.student.peft))
    if any(spec.server is not None for spec in teachers.values()):
        check_sparse(parse_objective(args.objective), "a served teacher")
    configs |= {key: load_config(spec, key) for key, spec in teachers.items()}
    seed = args.seed if args.data_seed is None else args.data_seed
    train = open_sources(recipe.data.sources("train"), recipe.start_of, "data.train", seed)
    for part in parts_of(train) if recipe.teachers else ():
        part.unread.pop(TEACHER, None)  # says which teacher a row has
    for sentence in named_unread(parts_of(train)):
        logger.warning("data.train: %s.", sentence)
    held_out: Any = recipe.data.eval and open_sources(
        recipe.data.sources("eval"), recipe.start_of, "data.eval", weighted=False)
    if isinstance(train, StreamedRecords) and args.max_steps <= 0:
        raise TaidError("data.train is streamed, so its length is not known: set train.max_steps.")
    if args.tokens_per_batch is not None:
        check_budget(train)
    if args.window is not None and args.max_steps <= 0:
        raise TaidError("train.window makes a stream of the data, so the length of an epoch is not "
                        "known: set train.max_steps.")
    if held_out is None and args.eval_strategy != "no":
        raise TaidError(f"train.eval_strategy = '{args.eval_strategy}', but there is no data.eval.")
    if isinstance(held_out, StreamedRecords):
        if any(source.max_records is None for source in listed(recipe.data.eval)):
            raise TaidError("data.eval is streamed: set data.eval.max_records.")
        held_out = list(held_out)
    blind = [role for role, config in configs.items() if not sees_images(config)]
    # of several teachers each is shown its own records
    check_modalities([role for role in blind if role in ("student", "teacher")],
                     any(_has_images(s) for s in (train, held_out) if s is not None))
    processors = {"student": load_processor(recipe.student, "student")} | {
        key: load_processor(spec, key) for key, spec in teachers.items()}
    for role, processor in processors.items():
        if role not in blind:
            check_image_token(make_adapter(processor, role), configs[role])
    student, teacher = processors["student"], recipe.of_teachers(processors)
    if caches or recipe.teachers or (teachers and of_chunks(args.metric_for_best_model)):
        skeletons = {key: caches.get(key) or load_skeleton(spec, key)
                     for key, spec in teachers.items()}
        with quiet("taid_vlm", warn=False):  # the run itself says what there is to say
            put_together(load_skeleton(recipe.student, "student"), recipe.of_teachers(skeletons),
                         student, teacher, args, train, held_out or [])
    return Ingredients(args, configs, train, held_out, student, teacher, caches)


def chosen_teacher(recipe: Recipe, name: str | None) -> str:
    """The key of the teacher that a cache is to be of; raises TaidError for a name that is none."""
    names = recipe.teachers or {}
    if name is None and not names:
        return "teacher"
    if name is None and len(names) > 1:
        raise TaidError("cache: the recipe has several teachers, and a cache is of one: name it "
                        f"with --teacher. Valid: {', '.join(names)}.")
    chosen = next(iter(names)) if name is None else name
    if chosen not in names:
        raise TaidError(f"--teacher = '{chosen}' is none of the recipe's teachers."
                        f"{nearest(chosen, names)}")
    return role_of(chosen)


def _has_images(records: Any) -> bool:
    if isinstance(records, list):
        return any(record.images for record in records if isinstance(record, Record))
    return records.has_images


def lora_config(config: Mapping[str, Any] | None) -> Any:
    """The LoraConfig that `student.peft` stands for; raises TaidError for keys it lacks."""
    if config is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise TaidError("student.peft needs the peft library: pip install 'taid-vlm[peft]'."
                        ) from None
    valid = [f.name for f in dataclasses.fields(LoraConfig)]
    for key in config:
        if key not in valid:
            match = difflib.get_close_matches(key, [*valid, "rank"], n=1)
            hint = "r" if match == ["rank"] else "".join(match)
            raise TaidError(f"student.peft has no key '{key}'. Did you mean '{hint}'?")
    return LoraConfig(**config)
