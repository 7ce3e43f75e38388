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
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import yaml

from taid_vlm.errors import RecipeError, TaidError, nearest, nearest_sibling
from taid_vlm.io.hashing import text_hash
from taid_vlm.models.loading import DTYPES, ModelSpec
from taid_vlm.objectives import parse_objective
from taid_vlm.records import DataSource

if TYPE_CHECKING:
    from taid_vlm.training.config import DistillationConfig

WHOLE_NUMBERS = frozenset({"max_steps", "max_length", "save_total_limit", "eval_steps"})
SHARES_OF_STEPS = frozenset({"logging_steps", "save_steps", "eval_steps", "warmup_steps"})
AT_LEAST_ONE = frozenset({"per_device_train_batch_size", "per_device_eval_batch_size",
                          "gradient_accumulation_steps"})
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
    canary: at how many records with images it is asked whether the models look; 0 asks nothing.
    """

    examples: int = 12
    max_new_tokens: int = 64
    canary: int = 64


@dataclass(frozen=True)
class StageSpec:
    """One stage of a run in stages; what it leaves out is as in the rest of the recipe.

    train: keys that replace those of the recipe's `train`.
    objective: instead of the recipe's.
    data: `train` or `eval` (or both) instead of the recipe's.
    """

    name: str
    train: Mapping[str, Any] = field(default_factory=dict)
    objective: Any = None
    data: Mapping[str, DataSource] = field(default_factory=dict)


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
    stages: tuple[StageSpec, ...] | None = None  # one after the other; see `taid_vlm.runs.stages`
    base: Path = field(default=Path("."), compare=False)  # where relative data paths start

    def to_yaml(self) -> str:
        """The resolved recipe, as it is written beside the results."""
        plain = {key: value for key, value in asdict(self).items() if key != "base"}
        return yaml.dump(_pruned(plain), Dumper=_Dumper, sort_keys=False, allow_unicode=True)

    def digest(self) -> str:
        return text_hash(self.to_yaml())

    def training_arguments(self) -> DistillationConfig:
        """transformers' arguments with this package's defaults under them."""
        from taid_vlm.training.config import DistillationConfig

        steps = self.train.get("max_steps", 0)
        defaults = {
            "report_to": "none", "save_total_limit": 2,
            "logging_steps": max(1, steps // 100) if steps else 10,
            "dataloader_pin_memory": _has_accelerator(),
        }
        own = {"output_dir": self.output_dir, "objective": self.objective,
               "canary_records": self.evaluate.canary}
        try:
            return DistillationConfig(**{**defaults, **self.train, **own})
        except TaidError:
            raise
        except Exception as error:  # transformers checks values and combinations its own way
            raise RecipeError(f"train: {error}") from error

    def resolved(self) -> Recipe:
        """The recipe with data paths that hold from anywhere, to be written with the run."""
        sides = {name: self._resolved_source(side) for name, side in vars(self.data).items()}
        stages = self.stages and tuple(replace(stage, data={
            name: self._resolved_source(side) for name, side in stage.data.items()
        }) for stage in self.stages)
        return replace(self, data=DataSpec(**sides), stages=stages)

    def _resolved_source(self, source: DataSource | None) -> Any:
        start = None if source is None else self.start_of(source)
        if source is None or start is None:
            return source
        root = source.image_root and str((start / source.image_root).resolve())
        return replace(source, path=str((start / source.path).resolve()), image_root=root)

    def start_of(self, source: DataSource) -> Path | None:
        """Where a relative data path starts: the working directory, or else the recipe's folder.

        None if it is at neither place (a name on the hub).
        """
        for start in (Path("."), self.base):
            if (start / Path(source.path).expanduser()).exists():
                return start
        return None


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
    tree = read_yaml(path, "recipe")
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with 'student', 'data', ...")
    for override in overrides:
        _apply(tree, override)
    return parse_recipe(tree, path.parent)


def parse_recipe(tree: Mapping[str, Any], base: Path = Path(".")) -> Recipe:
    """Check a recipe that is already a mapping."""
    known(tree, [f.name for f in dataclasses.fields(Recipe) if f.name != "base"], "recipe")
    for key in ("student", "data", "output_dir"):
        if tree.get(key) is None:
            raise RecipeError(f"recipe: '{key}' is missing.")
    if not isinstance(tree["output_dir"], str) or not tree["output_dir"]:
        raise RecipeError(f"output_dir = {tree['output_dir']!r}, but it must be a folder's path.")
    teacher = tree.get("teacher")
    recipe = Recipe(
        student=_model(StudentSpec, tree["student"], "student"),
        teacher=None if teacher is None else _model(ModelSpec, teacher, "teacher"),
        data=_data(tree["data"]),
        output_dir=str(tree["output_dir"]),
        objective=tree.get("objective", {"name": "taid"}),
        train=_train({} if tree.get("train") is None else tree["train"]),
        evaluate=_evaluate({} if tree.get("evaluate") is None else tree["evaluate"]),
        stages=None if tree.get("stages") is None else _stages(tree["stages"]),
        base=base,
    )
    for objective in (recipe.objective, *(stage.objective for stage in recipe.stages or ())):
        needed = objective is not None and parse_objective(objective).needs_teacher
        if needed and teacher is None:
            raise RecipeError("recipe: 'teacher' is missing; only the objective 'ce' (SFT) needs "
                              "none.")
    return recipe


# ----- YAML ---------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, and a key may stand only once."""


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that _Loader would take for numbers."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)([eE][-+]?[0-9]+)$"),
        list("-+0123456789."),
    )


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    names = [loader.construct_object(key) for key in own]
    for key, name in zip(own, names, strict=True):
        if names.count(name) > 1:
            raise RecipeError(f"the key '{name}' stands twice (line {key.start_mark.line + 1}).")
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file holds; `what` it is, for the message where there is none."""
    if not path.is_file():
        raise RecipeError(f"{what} '{path}' does not exist.{nearest_sibling(path, '*.y*ml')}")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None


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
    try:
        tree[last] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"override '{override}': not valid YAML: {error}") from None


# ----- sections -----------------------------------------------------------------------------


def _model(kind: type, value: Any, where: str) -> Any:
    value = {"model_name_or_path": value} if isinstance(value, str) else value
    spec = build(kind, value, where)
    if not spec.model_name_or_path:
        raise RecipeError(f"{where}.model_name_or_path = {spec.model_name_or_path!r}, but it must "
                          "be a folder or a hub name.")
    if spec.dtype is not None and spec.dtype not in DTYPES:
        raise RecipeError(f"{where}.dtype = '{spec.dtype}'.{nearest(spec.dtype, DTYPES)}")
    return spec


def _data(value: Any) -> DataSpec:
    if not isinstance(value, Mapping):
        raise RecipeError("data must be a mapping: {train: ..., eval: ...}.")
    known(value, ["train", "eval"], "data")
    if value.get("train") is None:
        raise RecipeError("data.train is missing.")
    sides = {key: _source(side, f"data.{key}") for key, side in value.items() if side is not None}
    return DataSpec(**sides)


def _stages(value: Any) -> tuple[StageSpec, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise RecipeError("stages must be a list of {name: ..., train: {...}}.")
    stages: list[StageSpec] = []
    for number, given in enumerate(value):
        stage = build(StageSpec, given, f"stages[{number}]")
        if not re.fullmatch(r"\w[\w.-]*", stage.name):
            raise RecipeError(f"stages[{number}].name = {stage.name!r}, but it must be letters, "
                              "digits, '_', '-' and '.' (it names a folder).")
        if stage.name in (earlier.name for earlier in stages):
            raise RecipeError(f"stages: the name '{stage.name}' stands twice.")
        stages.append(_stage(stage))
    return tuple(stages)


def _stage(stage: StageSpec) -> StageSpec:
    where = f"stages '{stage.name}'"
    known(stage.data, ["train", "eval"], f"{where}: data")
    for section, given in (("train", stage.train), ("data", stage.data)):
        for key, value in given.items():
            if value is None:  # a resolved recipe holds no null, so it would not be the same
                raise RecipeError(f"{where}: {section}.{key} has no value; leave it out.")
    try:
        train = _train(stage.train)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    data = {side: _source(given, f"{where}: data.{side}") for side, given in stage.data.items()}
    return replace(stage, train=train, data=data)


def _source(value: Any, where: str) -> DataSource:
    source = build(DataSource, {"path": value} if isinstance(value, str) else value, where)
    _at_least(source.max_records, 1, f"{where}.max_records")
    return source


def _evaluate(value: Any) -> EvaluateSpec:
    spec = build(EvaluateSpec, value, "evaluate")
    _at_least(spec.examples, 0, "evaluate.examples")
    _at_least(spec.max_new_tokens, 1, "evaluate.max_new_tokens")
    _at_least(spec.canary, 0, "evaluate.canary")
    return spec


def _at_least(given: int | None, least: int, where: str) -> None:
    if given is not None and given < least:
        raise RecipeError(f"{where} = {given}, but it must be at least {least}.")


def _train(value: Any) -> dict[str, Any]:
    from taid_vlm.training.config import DistillationConfig

    if not isinstance(value, Mapping):
        raise RecipeError("train must be a mapping of transformers' TrainingArguments.")
    elsewhere = {"output_dir": "output_dir", "objective": "objective",
                 "model_init_kwargs": "student.init_kwargs", "canary_records": "evaluate.canary",
                 "teacher_model_init_kwargs": "teacher.init_kwargs"}
    fields = {f.name: f for f in dataclasses.fields(DistillationConfig) if f.init}
    for key in value:
        if key in elsewhere:
            raise RecipeError(f"train.{key} belongs to '{elsewhere[key]}' of the recipe.")
        if key in WITHOUT_EFFECT:
            raise RecipeError(f"train.{key} has no effect on a distillation; take it out.")
    known(value, [name for name in fields if name not in elsewhere], "train")
    _check_parts(value)
    return {key: _training_value(key, given, fields[key].default) for key, given in value.items()}


def _check_parts(train: Mapping[str, Any]) -> None:
    from taid_vlm.models.parts import check_parts

    try:
        check_parts(train.get("freeze"), train.get("learning_rates"), "train.")
    except TaidError as error:
        raise RecipeError(str(error)) from None


def _training_value(key: str, given: Any, default: Any) -> Any:
    """Check a training argument against the kind of its default; 1e3 is a fine whole number."""
    whole = isinstance(given, float) and given.is_integer()
    number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if given is None and default is None:
        return None
    if key in WHOLE_NUMBERS or (isinstance(default, int) and not isinstance(default, bool)):
        share = key in SHARES_OF_STEPS and number and 0 < given < 1
        if not (number and (whole or share or isinstance(given, int))):
            raise RecipeError(f"train.{key} = {given!r}, but it must be a whole number.")
        given = int(given) if whole else given
    elif isinstance(default, bool) and not isinstance(given, bool):
        raise RecipeError(f"train.{key} = {given!r}, but it must be true or false.")
    elif isinstance(default, float) and not number:
        raise RecipeError(f"train.{key} = {given!r}, but it must be a number.")
    if key in AT_LEAST_ONE and given < 1:
        raise RecipeError(f"train.{key} = {given!r}, but it must be at least 1.")
    return given


def build(kind: type, value: Any, where: str) -> Any:
    """A dataclass from a mapping, with unknown and missing keys refused."""
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where} must be a mapping, got {value!r:.60}.")
    fields = dataclasses.fields(kind)
    known(value, [f.name for f in fields], where)
    for f in fields:
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in value:
            raise RecipeError(f"{where}.{f.name} is missing.")
    hints = get_type_hints(kind)
    for key, given in value.items():
        _check_type(given, hints[key], f"{where}.{key}")
    return kind(**value)


_KINDS: dict[Any, tuple[Any, str]] = {
    str: (str, "text"), bool: (bool, "true or false"), int: (int, "a whole number"),
    Mapping: (Mapping, "a mapping"),
}


def _check_type(given: Any, hint: Any, where: str) -> None:
    """A value must be of the kind its field declares ('no' is a text, not false)."""
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    plain = [get_origin(option) or option for option in options]
    if given is None and type(None) in plain:
        return
    kinds = [_KINDS[option] for option in plain if option in _KINDS]
    fits = any(isinstance(given, kind) and (kind is bool or not isinstance(given, bool))
               for kind, _ in kinds)
    if kinds and not fits:
        wanted = " or ".join(name for _, name in kinds)
        raise RecipeError(f"{where} = {given!r:.60}, but it must be {wanted}.")


def known(value: Mapping[str, Any], valid: Sequence[str], where: str) -> None:
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
