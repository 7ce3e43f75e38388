"""Sections: described, frozen, strict in Python too, and the same recipe has the same hash."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import TrainingArguments

from taid_vlm.config import benchmark, data, evaluation, kinds, model, objective, recipe, training
from taid_vlm.config.arguments import trainer_arguments
from taid_vlm.config.benchmark import BenchmarkSpec
from taid_vlm.config.data import DataSource
from taid_vlm.config.evaluation import EvaluateSpec
from taid_vlm.config.model import ModelSpec, StudentSpec
from taid_vlm.config.objective import ALONE, TERMS, read_objective
from taid_vlm.config.recipe import Recipe, load_recipe, parse_recipe
from taid_vlm.config.section import Section
from taid_vlm.config.training import ELSEWHERE, WITHOUT_EFFECT, TrainSpec, train_spec
from taid_vlm.config.yaml import dump_yaml
from taid_vlm.errors import RecipeError
from taid_vlm.objectives import LOSSES, TaidSchedule, parse_objective
from taid_vlm.runs.stages import expand
from taid_vlm.training.config import DistillationConfig

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "recipes.json").read_text())
TREE = {"teacher": "t", "student": "s", "data": {"train": "x.jsonl"}, "output_dir": "o"}


def sections() -> Iterator[type[Section]]:
    rooms = (benchmark, data, evaluation, kinds, model, objective, recipe, training)
    for _, kind in [pair for room in rooms for pair in inspect.getmembers(room, inspect.isclass)]:
        if issubclass(kind, Section) and kind is not Section:
            yield kind
    yield from ALONE.values()


# ----- what is written ----------------------------------------------------------------------


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["digest"])
def test_recipes_keep_their_hashes(
    golden: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded before recipes were pydantic's: results on disk must stay those of their recipes."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(golden["recipe"])
    recipe = load_recipe("r.yaml", golden["overrides"])
    assert recipe.to_yaml() == golden["yaml"]
    assert recipe.digest() == golden["digest"]
    assert [[stage.output_dir, stage.digest()] for stage in expand(recipe)] == golden["stages"]
    Path("again.yaml").write_text(recipe.to_yaml())
    assert load_recipe("again.yaml").digest() == golden["digest"]


def test_where_a_recipe_lies_is_no_part_of_it(tmp_path: Path) -> None:
    here, there = parse_recipe(TREE), parse_recipe(TREE, tmp_path)
    assert here == there and here != parse_recipe({**TREE, "output_dir": "p"})
    (tmp_path / "x.jsonl").write_text("")
    assert there.start_of(there.data.train) == tmp_path and here.start_of(here.data.train) is None
    assert there.model_copy(update={"output_dir": "p"}).start_of(there.data.train) == tmp_path


# ----- sections -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(sections()), ids=lambda kind: kind.__name__)
def test_every_key_is_described(kind: type[Section]) -> None:
    assert kind.summary().endswith(".")
    for name, field in kind.model_fields.items():
        assert field.description and len(field.description) > 8, name


@pytest.mark.parametrize(("make", "message"), [
    (lambda: DataSource(), "DataSource: 'path' is missing."),
    (lambda: DataSource(path=3), "path = 3, but it must be text, or a list"),
    (lambda: DataSource("x", max_records=0), "max_records = 0, but it must be at least 1."),
    (lambda: DataSource("x", colums={}), "DataSource has no key 'colums'. Did you mean 'columns'?"),
    (lambda: ModelSpec("x", dtype="half"), "dtype = 'half'."),
    (lambda: EvaluateSpec(examples=True), "examples = True, but it must be a whole number."),
    (lambda: BenchmarkSpec(type="yes_no", data="x", tags="kind"), "a list of columns"),
    (lambda: Recipe(**{**TREE, "data": {"train": {"pth": 1}}}), "data.train has no key 'pth'."),
])
def test_python_is_as_strict_as_yaml(make: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_sections_are_values() -> None:
    source = DataSource("a.jsonl", split="test")
    assert source == DataSource(path="a.jsonl", split="test")
    with pytest.raises(ValidationError, match="frozen"):
        source.split = "train"  # type: ignore[misc]
    other = source.model_copy(update={"split": "train"})
    assert (source.split, other.split, other.path) == ("test", "train", "a.jsonl")
    assert StudentSpec("x", peft={"r": 4}).peft == {"r": 4}
    DataSource("a").columns["prompt"] = "q"  # a default belongs to one section alone
    assert DataSource("b").columns == {}


def test_whole_numbers_are_whole_everywhere() -> None:
    recipe = parse_recipe({**TREE, "evaluate": {"examples": 1e1}, "train": {"max_steps": 1e3}})
    assert type(recipe.evaluate.examples) is type(recipe.train["max_steps"]) is int


@pytest.mark.parametrize(("section", "message"), [
    ({"train": {"save_strategy": False}}, "put quotes around"),
    ({"train": {"seed": "3"}}, "train.seed = '3', but it must be a whole number."),
    ({"train": {"bf16": 1}}, "train.bf16 = 1, but it must be true or false."),
    ({"train": {"torch_compile": "no"}}, "train.torch_compile = 'no', but it must be true or fals"),
    ({"train": {"adam_beta1": "big"}}, "train.adam_beta1 = 'big', but it must be a number."),
    ({"train": {"deepspeed": 3}}, "train.deepspeed = 3, but it must be a mapping or text."),
    ({"train": {"data_seed": 1.5}}, "train.data_seed = 1.5, but it must be a whole number."),
    ({"train": {"report_to": 3}}, "train.report_to = 3, but it must be text or a list."),
    ({"train": {"learning_rates": {"tower": True}}}, "learning_rates.tower = True, but it must be"),
    ({"student": {"model_name_or_path": "s", "peft": [4]}}, "student.peft = [4], but it must be a"),
    ({"objective": {"name": "taid", "weight": True}}, "objective.weight = True"),
    ({"stages": [{"name": "a", "objective": {"name": "jsd", "beta": 2}}]},
     "stages 'a': objective.beta = 2, but it must be in [0, 1]."),
    ({"stages": [{"name": "a", "train": None}]}, "train must be a mapping, got None."),
    ({"data": {"train": {"path": "x", "columns": {"prompt": 3}}}}, "data.train.columns.prompt = 3"),
    ({3: 4}, "recipe has no key '3'."),
])
def test_nothing_becomes_another_kind(section: dict[Any, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({**TREE, **section})
    assert message in str(caught.value)


def test_a_section_without_a_value_is_as_one_that_is_left_out() -> None:
    assert parse_recipe({**TREE, "train": None, "evaluate": None, "objective": None,
                         "stages": None}) == parse_recipe(TREE)


# ----- train --------------------------------------------------------------------------------


def test_every_key_of_the_installed_transformers_is_known() -> None:
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert set(trainer_arguments()) == fields
    own = {field.name for field in dataclasses.fields(DistillationConfig) if field.init}
    assert set(train_spec().model_fields) == own - set(ELSEWHERE) - set(WITHOUT_EFFECT)
    assert own >= {*ELSEWHERE, *WITHOUT_EFFECT}


def test_a_transformers_that_spreads_its_keys_over_classes_is_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "training_args.py").write_text("class TrainingArguments(Base):\n    a: int = 1\n")
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    keys = trainer_arguments.__wrapped__()
    assert "learning_rate" in keys and "a" not in keys


RUNS_OWN = {"logging_steps", "save_total_limit", "dataloader_pin_memory"}


@pytest.mark.parametrize("name", sorted(TrainSpec.model_fields))
def test_defaults_are_those_of_training(name: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(DistillationConfig)}
    told, used = TrainSpec.model_fields[name].default, fields[name].default
    assert told == used or name in RUNS_OWN or (told is None and used is False)


def test_keys_of_transformers_keep_their_values() -> None:
    train = {"fsdp": True, "lr_scheduler_kwargs": {"a": {3: "x"}}, "debug": "", "eval_delay": 0.5,
             "hub_strategy": "end", "weight_decay": 1, "report_to": ["none"], "tf32": None}
    assert parse_recipe({**TREE, "train": train}).train == train
    assert type(parse_recipe({**TREE, "train": train}).train["weight_decay"]) is int


# ----- objectives ---------------------------------------------------------------------------


def test_the_terms_are_the_losses() -> None:
    per_token = {name: kind for name, kind in TERMS.items()
                 if not name.startswith(("visual_", "router"))}
    assert list(per_token) == list(LOSSES)
    for name, kind in per_token.items():
        if name == "taid":  # its parameter is not the recipe's, but the schedule's
            signature = dict(inspect.signature(TaidSchedule).parameters)
            signature.pop("total_steps")
        else:
            signature = dict(inspect.signature(LOSSES[name].function).parameters)
            signature.pop("pair")
        own = [key for key in kind.parameters() if key not in ("focus", "clip")]
        if name == "amid":  # taid's, and which mean
            assert own == ["t_start", "t_end", "rate", "momentum", "adaptive", "alpha"]
            continue
        assert own == list(signature)
        for key, parameter in signature.items():
            assert kind.model_fields[key].default == parameter.default, (name, key)


@pytest.mark.parametrize("name", TERMS)
def test_a_loss_alone_and_in_a_sum(name: str) -> None:
    extra = {key: TERMS[name].model_fields[key].default for key in TERMS[name].parameters()}
    terms = [{"name": name, **extra}, *(["taid"] if name.startswith(("visual_", "router")) else [])]
    summed = parse_objective({"terms": terms, "kd_temperature": 2})
    assert summed.kd_temperature == 2
    if not name.startswith(("visual_", "router")):
        assert summed == parse_objective({"name": name, **extra, "kd_temperature": 2})
        assert read_objective(name).needs_teacher == LOSSES[name].needs_teacher == (name != "ce")


@pytest.mark.parametrize(("value", "message"), [
    ({"terms": ["taid", {"name": "jsd", "bta": 1}]}, "objective.terms[1] 'jsd' has no key 'bta'."),
    ({"terms": ["taid"], "kd_temprature": 2}, "objective has no key 'kd_temprature'. Did you mean"),
    ({"terms": ["taid"], "beta": 2}, "'beta' stands beside 'terms'"),
    ({"name": "taid", "terms": ["ce"]}, "objective 'taid' has no key 'terms'."),
    ({"name": "taid", "alignment": "exakt"}, "objective.alignment = 'exakt'. Did you mean 'exact'"),
    ({"name": ["taid"]}, "objective: unknown loss '['taid']'."),
])
def test_mistakes_in_an_objective(value: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_objective(value)
    assert message in str(caught.value)


# ----- keys without their section, or in another's --------------------------------------------


PLACES = [*(f"train.{key}" for key in train_spec().model_fields), "student.peft", "evaluate.canary",
          "objective.on_policy.lmbda", "objective.on_policy.max_new_tokens", "objective.t_start",
          "data.train.columns", "data.video.frames"]


@pytest.mark.parametrize("place", PLACES)
def test_a_key_without_its_section_is_told_its_place(place: str) -> None:
    section, _, key = place.rpartition(".")
    other = "evaluate" if section == "train" else "train"
    stages = [{"name": "a", key: 1}]
    for wrong in ({key: 1}, {other: {key: 1}}, {"stages": stages}):
        with pytest.raises(RecipeError, match=f"has no key '{key}'. Did you mean .*'{place}'"):
            parse_recipe({**TREE, **wrong})


@pytest.mark.parametrize(("override", "message"), [
    ("logging_first_step=true", "recipe has no key 'logging_first_step'. Did you mean "
     "'train.logging_first_step'?"),
    ("learning_rat=1", "Did you mean 'train.learning_rate'?"),  # mistyped, too
    ("lr=1e-4", "Did you mean 'train.learning_rate'?"),  # as other tools call it
    ("train.lr=1e-4", "Did you mean 'train.learning_rate'?"),
    ("lora_alpha=8", "Did you mean 'student.peft'?"),
    ("batch_size=8", "Did you mean 'train.per_device_train_batch_size' or"),
    ("train.max_step=1", "Did you mean 'max_steps'?"),  # of the same section
    ("objective.lmbda=1", "'taid' has no key 'lmbda'. Did you mean 'objective.on_policy.lmbda'?"),
    ("columns.image=x", "Did you mean 'data.train.columns' or 'data.eval.columns'?"),
    ("objective.beta=1", "'taid' has no key 'beta'. Valid: "),  # another loss has, at this place
    ("nothing_like_it=1", "has no key 'nothing_like_it'. Valid: "),
])
def test_an_override_in_the_wrong_place(tmp_path: Path, override: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(dump_yaml({**TREE, "objective": "taid"}))
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml", [override])
    assert message in str(caught.value)


def test_a_benchmarks_keys_have_places_too() -> None:
    with pytest.raises(RecipeError, match=r"no key .question.\. Did you mean .columns"):
        BenchmarkSpec(type="yes_no", data="x", question="q")


def test_overrides_reach_into_what_is_written_as_a_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(dump_yaml({**TREE, "objective": "taid"}))
    recipe = load_recipe(tmp_path / "r.yaml", [
        "objective.t_start=0.2", "data.train.columns.image=picture", "student.dtype=bfloat16"])
    assert recipe.objective == {"name": "taid", "t_start": 0.2}
    assert recipe.data.train.columns == {"image": "picture"} and recipe.student.dtype == "bfloat16"
