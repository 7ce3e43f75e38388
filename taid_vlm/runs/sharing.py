"""Whether teacher and LoRA student can share their base model."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from taid_vlm.config.model import ModelSpec, TeacherSpec
from taid_vlm.config.recipe import Recipe
from taid_vlm.models.loading import load_skeleton, weights_dtype
from taid_vlm.models.lora import CONFIG, LoraFolder, changed_ends, find_adapter
from taid_vlm.models.quantization import bytes_of, numel, stored_tensors
from taid_vlm.objectives import parse_objective
from taid_vlm.runs.ingredients import Ingredients

# what an adapter may say and still leave its base as it was, once it is switched off; any other
# key of LoraConfig (modules_to_save, bias, layer_replication ...) keeps two copies
_HARMLESS = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout",
    "use_rslora", "use_dora", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "lora_bias", "fan_in_fan_out", "megatron_core", "qalora_group_size",
    "ensure_weight_tying",
})
_PLAIN_INIT = (True, False, "gaussian")  # others take from the base what they begin with
_LOADED = ("trust_remote_code", "attn_implementation", "quantization", "init_kwargs")
_SHARDED = ("fsdp", "deepspeed", "torch_compile")
_LAUNCHED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


@dataclass(frozen=True)
class Sharing:
    """Of a teacher that is the student's base model.

    reason: why two copies are loaded nevertheless, "" where there is one.
    adapter: of the teacher, where it has one.
    """

    reason: str
    adapter: Path | None = None


def sharing(recipe: Recipe, found: Ingredients) -> Sharing | None:
    """What is to be done with a teacher that is the student's base; None for any other one."""
    teacher, student = recipe.teacher, recipe.student
    if teacher is None or teacher.server is not None or teacher.cache is not None:
        return None
    of_teacher, of_student = find_adapter(teacher, "teacher"), find_adapter(student, "student")
    base = teacher if of_teacher is None else of_teacher.base
    if _place(base) != _place(student if of_student is None else of_student.base):
        return None
    reasons = _reasons(recipe, found, teacher, of_teacher, of_student)
    return Sharing(next(reasons, ""), None if of_teacher is None else of_teacher.folder)


def in_words(shared: Sharing, base: PreTrainedModel) -> str:
    """What a run says of it at its start, of the model that has been loaded."""
    if shared.reason:
        return f"Teacher and student have one base model, loaded for each: {shared.reason}."
    number, size = sum(map(numel, base.parameters())), bytes_of(stored_tensors(base))
    return (f"Teacher and student share {number:,} parameters: {size / 1e9:.3g} GB are not loaded "
            "a second time.")


def _place(spec: ModelSpec) -> tuple[str, str]:
    path = Path(spec.model_name_or_path).expanduser()
    return (str(path.resolve()), "") if path.is_dir() else (spec.model_name_or_path, spec.revision)


def _reasons(
    recipe: Recipe, found: Ingredients, teacher: TeacherSpec, of_teacher: LoraFolder | None,
    of_student: LoraFolder | None,
) -> Iterator[str]:
    student = recipe.student
    if student.peft is None:
        yield "all of the student's weights are trained (without student.peft)"
    if of_student is not None:
        yield f"the student begins with the adapter '{student.model_name_or_path}' merged into it"
    for key in _LOADED:
        if getattr(teacher, key) != getattr(student, key):
            yield (f"teacher.{key} = {getattr(teacher, key)!r:.40} and student.{key} = "
                   f"{getattr(student, key)!r:.40}")
    for key in TeacherSpec.model_fields.keys() - ModelSpec.model_fields.keys():
        if getattr(teacher, key) != TeacherSpec.model_fields[key].default:
            yield f"teacher.{key} is set"
    one, two = (_dtype(spec, role, found) for spec, role in (
        (teacher, "teacher"), (student, "student")))
    if one != two:
        yield (f"the teacher's weights are {one}, the student's {two}; set student.dtype or "
               "teacher.dtype")
    for key in _SHARDED:
        if recipe.train.get(key):
            yield f"train.{key} is set"
    for key in _LAUNCHED:
        if os.environ.get(key) == "true":
            yield "accelerate's configuration shards the student"
    objective = parse_objective(found.args.objective)
    if objective.visual or objective.router:
        yield "the objective looks inside of both models"
    yield from (f"student.peft has {key}" for key in _changing(student.peft or {}))
    if of_teacher is not None:
        config = json.loads((of_teacher.folder / CONFIG).read_text(encoding="utf-8"))
        yield from (f"the teacher's adapter has {key}" for key in _changing(config))
        if changed_ends(load_skeleton(student, "student"), of_teacher):
            yield "the teacher's adapter changes head or embeddings"


def _dtype(spec: ModelSpec, role: str, found: Ingredients) -> str:
    config = found.configs[role]
    name = weights_dtype(spec, role, config)
    return str(getattr(config, "dtype", None) or torch.float32)[6:] if name == "auto" else str(name)


def _changing(adapter: dict[str, Any]) -> Iterator[str]:
    """Keys of an adapter's configuration that change its base, or may do so."""
    from peft import LoraConfig

    plain = {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
             for f in dataclasses.fields(LoraConfig)}
    if adapter.get("init_lora_weights", True) not in _PLAIN_INIT:
        yield f"init_lora_weights = {adapter['init_lora_weights']!r}"
    for key in adapter.keys() - _HARMLESS - {"init_lora_weights"}:
        if adapter[key] and adapter[key] != plain.get(key):
            yield key
