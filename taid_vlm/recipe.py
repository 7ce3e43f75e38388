"""Recipes: one strict YAML file says what a run does.

    teacher: {model_name_or_path: path-or-name}
    student: {model_name_or_path: path-or-name}
    data: {train: train.jsonl, eval: eval.parquet}
    objective: {name: taid}
    train: {max_steps: 200, learning_rate: 1e-3}   # transformers' TrainingArguments
    output_dir: runs/first

Unknown keys are refused with the nearest valid one, values are checked before anything is
loaded, and the resolved recipe is written with the run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from taid_vlm.errors import RecipeError, nearest
from taid_vlm.models import ModelSpec
from taid_vlm.objectives import parse_objective
from taid_vlm.records import DataSource

if TYPE_CHECKING:
    from taid_vlm.trainer import DistillationConfig

# TrainingArguments that act in parts of transformers' Trainer which distillation replaces
WITHOUT_EFFECT = frozenset({
    "average_tokens_across_devices", "batch_eval_metrics", "do_eval", "do_predict", "do_train",
    "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object",
    "include_for_metrics", "label_names", "label_smoothing_factor", "prediction_loss_only",
    "remove_unused_columns", "resume_from_checkpoint", "use_liger_kernel", "liger_kernel_config",
})


@dataclass(frozen=True)
class StudentSpec(ModelSpec):
    """The student; `peft` holds a LoraConfig's arguments to train an adapter only."""

    peft: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class DataSpec:
    """Records to train on and held-out records (`eval` may be left out)."""

    train: DataSource
    eval: DataSource | None = None


@dataclass(frozen=True)
class EvaluateSpec:
    """What is done with the held-out records beside the figures.

    examples: how many of them teacher and student answer for the report's gallery.
    max_new_tokens: length of those answers.
    """

    examples: int = 12
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Recipe:
    """A whole run; see the module's head for the YAML."""

    student: StudentSpec
    data: DataSpec
    output_dir: str
    teacher: ModelSpec | None = None
    objective: Any = field(default_factory=lambda: {"name": "taid"})
    train: Mapping[str, Any] = field(default_factory=dict)
    evaluate: EvaluateSpec = field(default_factory=EvaluateSpec)
    base: Path = field(default=Path("."), compare=False)  # where relative data paths start

    def to_yaml(self) -> str:
        """The resolved recipe, as it is written beside the results."""
        plain = {key: value for key, value in asdict(self).items() if key != "base"}
        return yaml.safe_dump(_pruned(plain), sort_keys=False, allow_unicode=True)

    def digest(self) -> str:
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()[:16]

    def training_arguments(self) -> DistillationConfig:
        """transformers' arguments with this package's defaults under them."""
        from taid_vlm.trainer import DistillationConfig

        steps = self.train.get("max_steps", 0)
        defaults = {
            "report_to": "none", "save_total_limit": 2,
            "logging_steps": max(1, steps // 100) if steps else 10,
            "dataloader_pin_memory": _has_accelerator(),
        }
        return DistillationConfig(**{
            **defaults, **self.train, "output_dir": self.output_dir, "objective": self.objective,
        })


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: YAML file; relative data paths start from the working directory, or, if nothing is
            there, from the file's folder.
        overrides: "section.key=value", value in YAML.

    Raises:
        RecipeError: with the key, the value and what would be valid.
    """
    path = Path(path)
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) if siblings else ""
        raise RecipeError(f"recipe '{path}' does not exist.{hint}")
    try:
        tree = yaml.load(path.read_text(), Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with 'student', 'data', ...")
    for override in overrides:
        _apply(tree, override)
    return parse_recipe(tree, path.parent)


def parse_recipe(tree: Mapping[str, Any], base: Path = Path(".")) -> Recipe:
    """Check a recipe that is already a mapping."""
    _known(tree, [f.name for f in dataclasses.fields(Recipe) if f.name != "base"], "recipe")
    for key in ("student", "data", "output_dir"):
        if tree.get(key) is None:
            raise RecipeError(f"recipe: '{key}' is missing.")
    teacher = tree.get("teacher")
    recipe = Recipe(
        student=_model(StudentSpec, tree["student"], "student"),
        teacher=None if teacher is None else _model(ModelSpec, teacher, "teacher"),
        data=_data(tree["data"]),
        output_dir=str(tree["output_dir"]),
        objective=tree.get("objective", {"name": "taid"}),
        train=_train(tree.get("train") or {}),
        evaluate=_build(EvaluateSpec, tree.get("evaluate") or {}, "evaluate"),
        base=base,
    )
    objective = parse_objective(recipe.objective)
    if objective.needs_teacher and teacher is None:
        raise RecipeError("recipe: 'teacher' is missing; only the objective 'ce' (SFT) needs none.")
    return recipe


# ----- YAML ---------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, and a key may stand only once."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)([eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise RecipeError(f"the key '{key}' stands twice{node.start_mark}.")
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override '{override}' must look like train.max_steps=100.")
    *parents, last = key.split(".")
    for parent in parents:
        inner = tree.setdefault(parent, {})
        if isinstance(inner, str) and parent in ("teacher", "student"):
            inner = tree[parent] = {"model_name_or_path": inner}
        if not isinstance(inner, dict):
            raise RecipeError(f"override '{override}': '{parent}' is no mapping.")
        tree = inner
    tree[last] = yaml.load(value, Loader=_Loader)


# ----- sections -----------------------------------------------------------------------------


def _model(kind: type, value: Any, where: str) -> Any:
    value = {"model_name_or_path": value} if isinstance(value, str) else value
    spec = _build(kind, value, where)
    if not isinstance(spec.model_name_or_path, str) or not spec.model_name_or_path:
        raise RecipeError(f"{where}.model_name_or_path = {spec.model_name_or_path!r}, but it must "
                          "be a folder or a hub name.")
    return spec


def _data(value: Any) -> DataSpec:
    if not isinstance(value, Mapping):
        raise RecipeError("data must be a mapping: {train: ..., eval: ...}.")
    _known(value, ["train", "eval"], "data")
    if value.get("train") is None:
        raise RecipeError("data.train is missing.")
    sides = {key: _source(side, f"data.{key}") for key, side in value.items() if side is not None}
    return DataSpec(**sides)


def _source(value: Any, where: str) -> DataSource:
    return _build(DataSource, {"path": value} if isinstance(value, str) else value, where)


def _train(value: Any) -> dict[str, Any]:
    from taid_vlm.trainer import DistillationConfig

    if not isinstance(value, Mapping):
        raise RecipeError("train must be a mapping of transformers' TrainingArguments.")
    elsewhere = {"output_dir": "output_dir", "objective": "objective",
                 "model_init_kwargs": "student.init_kwargs",
                 "teacher_model_init_kwargs": "teacher.init_kwargs"}
    fields = {f.name: f for f in dataclasses.fields(DistillationConfig) if f.init}
    for key in value:
        if key in elsewhere:
            raise RecipeError(f"train.{key} belongs to '{elsewhere[key]}' of the recipe.")
        if key in WITHOUT_EFFECT:
            raise RecipeError(f"train.{key} has no effect on a distillation; take it out.")
    _known(value, [name for name in fields if name not in elsewhere], "train")
    for key, given in value.items():
        if isinstance(given, str) and isinstance(fields[key].default, (int, float)) \
                and not isinstance(fields[key].default, bool):
            raise RecipeError(f"train.{key} = '{given}', but it must be a number.")
    return dict(value)


def _build(kind: type, value: Any, where: str) -> Any:
    """A dataclass from a mapping, with unknown and missing keys refused."""
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where} must be a mapping, got {value!r:.60}.")
    fields = dataclasses.fields(kind)
    _known(value, [f.name for f in fields], where)
    for f in fields:
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in value:
            raise RecipeError(f"{where}.{f.name} is missing.")
    return kind(**value)


def _known(value: Mapping[str, Any], valid: Sequence[str], where: str) -> None:
    for key in value:
        if key not in valid:
            raise RecipeError(f"{where} has no key '{key}'.{nearest(key, valid)}")


def _pruned(value: Any) -> Any:
    """Without None and empty mappings, so that the written recipe is short."""
    if isinstance(value, Mapping):
        cleaned = {str(key): _pruned(item) for key, item in value.items()}
        return {key: item for key, item in cleaned.items() if item is not None and item != {}}
    if isinstance(value, (list, tuple)):
        return [_pruned(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
