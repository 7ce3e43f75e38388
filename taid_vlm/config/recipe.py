"""Recipes: one strict YAML file says what a run does.

    teacher: {model_name_or_path: path-or-name}
    student: {model_name_or_path: path-or-name}
    data: {train: train.jsonl, eval: eval.parquet}
    objective: {name: taid}
    train: {max_steps: 200, learning_rate: 1e-3}   # transformers' TrainingArguments
    output_dir: runs/first

Everything is checked before anything is loaded, torch included, and the resolved recipe is written
with the run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PrivateAttr, model_validator

from taid_vlm.config.data import (
    DataSource,
    DataSpec,
    Mixture,
    Sources,
    StageData,
    exists,
    listed,
    replaced,
)
from taid_vlm.config.evaluation import EvaluateSpec
from taid_vlm.config.kinds import AsWritten, Name, wanted
from taid_vlm.config.model import ModelSpec, StudentSpec, TeacherSpec
from taid_vlm.config.objective import VISUAL, ObjectiveSpec, Term, TokenWeights, read_objective
from taid_vlm.config.secrets import holds_hidden, redact
from taid_vlm.config.section import Section, check
from taid_vlm.config.training import train_spec
from taid_vlm.config.yaml import dump_yaml, parse_yaml, read_yaml
from taid_vlm.errors import RecipeError, nearest

TEACHERS = "teachers"
# what a text in place of a mapping stands for, by the mapping's path
BARE = {**dict.fromkeys(("teacher", "student", TEACHERS), ModelSpec.bare),
        **dict.fromkeys(("data.train", "data.eval"), DataSource.bare),
        "objective": Term.bare, "objective.token_weights": TokenWeights.bare}
TeacherName = Annotated[str, Field(pattern=r"^\w[\w-]*$"), wanted(
    "letters, digits, '_' and '-' (it is part of keys)")]


def _without_nulls(value: Any) -> Any:
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        if inner is None:  # a resolved recipe holds no null, so it would not be the same
            raise ValueError(f".{key} has no value; leave it out.")
    return value


def _named(model: Any) -> Any:
    if model is not None and not model.model_name_or_path:
        raise ValueError(".model_name_or_path = '', but it must be a folder or a hub name.")
    return model


def _different(stages: tuple[StageSpec, ...]) -> tuple[StageSpec, ...]:
    names = [stage.name for stage in stages]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the name '{name}' stands twice.")
    return stages


def _listed(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(" must be a list of {name: ..., train: {...}}.")
    return tuple(value)


Objective = Annotated[Any, AsWritten(lambda: ObjectiveSpec, values=False)]
Train = Annotated[dict[str, Any], AsWritten(train_spec)]


class StageSpec(Section):
    """One stage of a run in stages; what it leaves out is as in the rest of the recipe.

    Args:
        name: Names the stage's folder, output_dir/stages/1-NAME.
        train: Keys that replace those of the recipe's train.
        objective: Instead of the recipe's.
        data: Sides that replace those of the recipe's data.
    """

    name: Name
    train: Annotated[Train, BeforeValidator(_without_nulls)] = {}
    objective: Objective | None = None
    data: Annotated[dict[str, Sources], AsWritten(lambda: StageData),
                    BeforeValidator(_without_nulls)] = {}


class Recipe(Section):
    """A whole run.

    Args:
        student: The model that learns.
        data: Records to train on, and held-out records.
        output_dir: Where everything is written: checkpoints, student, figures, report.
        teacher: The model that is learned from; only ce (SFT) needs none.
        teachers: Several of them by name, instead of teacher: {NAME: what teacher takes, ...}.
            Which one teaches a row, its source says (data.train: [{path: ..., teacher: NAME}]) or
            the row itself, in a column `teacher`; where none does, all teach every row, alike.
        teacher_weights: Of several teachers, the mixture for rows that name none: {NAME: weight}.
        objective: A loss, or a weighted sum of losses.
        train: How it is trained.
        evaluate: What is done with the held-out records.
        stages: Runs one after the other, each from the student of the one before.
    """

    blank_is_absent: ClassVar[bool] = True

    student: Annotated[StudentSpec, AfterValidator(_named)]
    data: DataSpec
    output_dir: Annotated[str, Field(min_length=1), wanted("a folder's path")]
    teacher: Annotated[TeacherSpec | None, AfterValidator(_named)] = None
    teachers: dict[TeacherName, Annotated[TeacherSpec, AfterValidator(_named)]] | None = None
    teacher_weights: Mixture | None = None
    objective: Objective = {"name": "taid"}
    train: Train = {}
    evaluate: EvaluateSpec = Field(default_factory=EvaluateSpec)
    stages: Annotated[tuple[StageSpec, ...], BeforeValidator(_listed), AfterValidator(_different)
                      ] | None = None
    _base: Path = PrivateAttr(default=Path("."))  # where relative data paths start

    @model_validator(mode="after")
    def _teacher_where_one_is_needed(self) -> Self:
        if self.teachers is not None and not self.teachers:
            raise ValueError("'teachers' is empty; name at least one, or take it out.")
        objectives = [read_objective(objective) for objective in (
            self.objective, *(stage.objective for stage in self.stages or ())) if objective]
        if not self.teacher_specs and any(objective.needs_teacher for objective in objectives):
            raise ValueError("'teacher' is missing; only the objective 'ce' (SFT) needs none.")
        of_one = any(objective.token_weights or objective.on_policy or isinstance(term, VISUAL)
                     for objective in objectives for term in objective.losses)
        if of_one and len(self.teacher_specs) > 1:
            raise ValueError("objective: visual terms, token_weights and on_policy are of one "
                             f"teacher, and there are {len(self.teacher_specs)} teachers; take "
                             "them out.")
        return self

    @model_validator(mode="after")
    def _stages_go_on_from_whole_weights(self) -> Self:
        if self.stages and self.student.quantization is not None:
            raise ValueError(f"student.quantization = '{self.student.quantization}' cannot stand "
                             "beside stages: a stage goes on from the student before it, whose "
                             "adapter cannot be merged into rounded weights.")
        return self

    @model_validator(mode="after")
    def _known_teachers(self) -> Self:
        if self.teachers and self.teacher is not None:
            raise ValueError("'teacher' and 'teachers' both say what is learned from; take one of "
                             "them out.")
        for name, teacher in (self.teachers or {}).items():
            if teacher.is_sharded and len(self.teachers or ()) > 1:
                raise ValueError(f"teachers.{name}.sharding = '{teacher.sharding}': a process asks "
                                 "one of several teachers only about its own rows, and a sharded "
                                 "one is asked by all at once; take devices or quantization.")
        sides = {f"data.{name}": side for name, side in self.data.sides.items()} | {
            f"stages '{stage.name}': data.{name}": side for stage in self.stages or ()
            for name, side in stage.data.items()}
        named: list[tuple[str, Any]] = [("teacher_weights", self.teacher_weights)]
        for place, side in sides.items():
            for source in listed(side):
                where = f"{place}: the teacher of '{source.shown}'"
                column = source.columns.get("teacher")
                if column and not self.teachers:
                    raise ValueError(f"{place}: columns.teacher = '{column}' has no effect without "
                                     "'teachers'.")
                named.append((where, source.teacher))
        for where, names in named:
            for name in [names] if isinstance(names, str) else names or ():
                if name not in (self.teachers or ()):
                    raise ValueError(f"{where} is '{name}', but 'teachers' has no such name."
                                     f"{nearest(name, self.teachers or ())}")
        return self

    @property
    def teacher_specs(self) -> dict[str, TeacherSpec]:
        """The teachers by the key that they have in the recipe: "teacher", or "teachers.NAME"."""
        if self.teachers:
            return {f"{TEACHERS}.{name}": spec for name, spec in self.teachers.items()}
        return {} if self.teacher is None else {"teacher": self.teacher}

    def of_teachers(self, by_key: Mapping[str, Any]) -> Any:
        """What there is of each, by the keys of `teacher_specs`, as it is handed on: of a single
        teacher itself (None without), of several by their names."""
        if self.teachers:
            return {name: by_key.get(f"{TEACHERS}.{name}") for name in self.teachers}
        return by_key.get("teacher")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and dict(self) == dict(other)  # wherever it was read

    def tree(self) -> dict[str, Any]:
        """As plain data, without what is left out and without secrets."""
        return dict(redact(_pruned(self)))

    def to_yaml(self) -> str:
        """The resolved recipe, as it is written beside the results: without secrets."""
        return dump_yaml(self.tree())

    def digest(self) -> str:
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()[:16]

    def resolved(self) -> Recipe:
        """The recipe with data paths that hold from anywhere, to be written with the run."""
        sides = {name: replaced(side, self._resolved_source)
                 for name, side in self.data.sides.items()}
        stages = self.stages and tuple(stage.model_copy(update={"data": {
            name: replaced(side, self._resolved_source) for name, side in stage.data.items()
        }}) for stage in self.stages)
        return self.model_copy(update={"data": self.data.model_copy(update=sides),
                                       "stages": stages})

    def _resolved_source(self, source: DataSource) -> DataSource:
        start = self.start_of(source)
        if start is None:
            return source
        paths = tuple(str((start / path).resolve()) for path in source.paths)
        root = source.image_root and str((start / source.image_root).resolve())
        return source.model_copy(update={
            "path": paths[0] if isinstance(source.path, str) else paths, "image_root": root})

    def start_of(self, source: DataSource) -> Path | None:
        """Where a relative data path starts: the working directory, or else the recipe's folder.

        None if it is at neither place (a name on the hub).
        """
        for start in (Path("."), self._base):
            if all(exists(start / Path(path).expanduser()) for path in source.paths):
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

    Example:
        >>> from pathlib import Path
        >>> from taid_vlm import load_recipe
        >>> _ = Path("mine.yaml").write_text(\"\"\"
        ... teacher: path/to/teacher
        ... student: path/to/student
        ... data: {train: train.jsonl}
        ... train: {learning_rate: 1e-4}
        ... output_dir: runs/first
        ... \"\"\")
        >>> recipe = load_recipe("mine.yaml", ["train.learning_rate=2e-4", "objective=forward_kl"])
        >>> recipe.train, recipe.objective
        ({'learning_rate': 0.0002}, 'forward_kl')
    """
    path = Path(path)
    tree = read_yaml(path, "recipe")
    if not isinstance(tree, dict):
        empty = " (this file is empty)" if tree is None else ""
        raise RecipeError(f"{path}: a recipe is a mapping with 'student', 'data', ...{empty}")
    for override in overrides:
        _apply(tree, override)
    return parse_recipe(tree, path.parent)


def parse_recipe(tree: Mapping[str, Any], base: Path = Path(".")) -> Recipe:
    """Check a recipe that is already a mapping."""
    if (key := holds_hidden(tree)) is not None:
        raise RecipeError(f"{key} was a secret, which is not written with a run: name it again "
                          f"({key}=...), or log in with `hf auth login` and take it out.")
    recipe = check(Recipe, tree, "recipe")
    recipe._base = base
    return recipe


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override '{override}' must look like train.max_steps=100.")
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents, 1):
        inner = tree.setdefault(parent, {})
        path = TEACHERS if parents[0] == TEACHERS else ".".join(parents[:depth])
        if isinstance(inner, str) and path in BARE:
            inner = tree[parent] = {BARE[path]: inner}
        if not isinstance(inner, dict):
            raise RecipeError(f"override '{override}': '{parent}' is no mapping.")
        tree = inner
    try:
        tree[last] = parse_yaml(value)
    except RecipeError as error:
        raise RecipeError(f"override '{override}': {error}") from None


def _pruned(value: Any) -> Any:
    """Without None and empty mappings, so that the written recipe is short."""
    if isinstance(value, (Mapping, BaseModel)):
        cleaned = {str(key): _pruned(item) for key, item in dict(value).items()}
        return {key: item for key, item in cleaned.items() if item is not None and item != {}}
    if isinstance(value, (list, tuple)):
        return [_pruned(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)
