"""Recipes are strict: what cannot be meant is refused with the key, the value and the mend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from taid_vlm.config.recipe import Recipe, load_recipe, parse_recipe
from taid_vlm.config.training import WITHOUT_EFFECT
from taid_vlm.errors import RecipeError
from taid_vlm.training.config import training_arguments

RECIPES = Path(__file__).parents[2] / "recipes"
MINIMAL = """\
teacher: {model_name_or_path: big}
student: {model_name_or_path: small}
data: {train: train.jsonl, eval: eval.jsonl}
objective: {name: taid}
train: {max_steps: 20}
output_dir: out
"""


def read(folder: Path, text: str = MINIMAL, overrides: Sequence[str] = ()) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def refused(folder: Path, *overrides: str, text: str = MINIMAL) -> str:
    with pytest.raises(RecipeError) as caught:
        read(folder, text, overrides)
    return str(caught.value)


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in yaml.safe_load(MINIMAL).items() if name != key}


# ----- keys ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("override", "where", "meant"), [
    ("studnet=x", "recipe", "student"),
    ("student.model_name_or_pth=x", "student", "model_name_or_path"),
    ("student.pefft={r: 4}", "student", "peft"),
    ("teacher.revison=main", "teacher", "revision"),
    ("data.evl=x", "data", "eval"),
    ("data.train={path: x, colums: {}}", "data.train", "columns"),
    ("objective.t_strat=0.3", "objective 'taid'", "t_start"),
    ("objective={name: jsd, betta: 0.3}", "'jsd'", "beta"),
    ("train.learning_rat=1", "train", "learning_rate"),
    ("evaluate.exmples=3", "evaluate", "examples"),
])
def test_unknown_keys_name_the_nearest(
    override: str, where: str, meant: str, tmp_path: Path
) -> None:
    message = refused(tmp_path, override)
    assert f"Did you mean '{meant}'?" in message
    assert where in message
    assert override.partition("=")[0].rsplit(".", 1)[-1] in message or "{" in override


def test_a_key_of_the_teacher_only_is_no_key_of_the_student_alone(tmp_path: Path) -> None:
    assert "teacher has no key 'peft'" in refused(tmp_path, "teacher.peft={r: 4}")


@pytest.mark.parametrize("text", [
    MINIMAL + "output_dir: other\n",
    MINIMAL.replace("{max_steps: 20}", "{max_steps: 20, max_steps: 30}"),
])
def test_a_key_may_stand_only_once(text: str, tmp_path: Path) -> None:
    message = refused(tmp_path, text=text)
    assert "stands twice" in message
    assert "line" in message


def test_anchors_and_merges_are_no_duplicates(tmp_path: Path) -> None:
    text = MINIMAL.replace("{model_name_or_path: big}", "&one {model_name_or_path: big}")
    text = text.replace("{model_name_or_path: small}", "{<<: *one, revision: v2}")
    recipe = read(tmp_path, text)
    assert (recipe.student.model_name_or_path, recipe.student.revision) == ("big", "v2")


@pytest.mark.parametrize("key", ["student", "data", "output_dir", "teacher"])
@pytest.mark.parametrize("absent", [True, False])
def test_what_is_missing_is_named(key: str, absent: bool) -> None:
    tree = without(key) if absent else {**without(key), key: None}
    with pytest.raises(RecipeError, match=f"'{key}' is missing"):
        parse_recipe(tree)


@pytest.mark.parametrize(("section", "key"), [
    ("student", "student.model_name_or_path"), ("teacher", "teacher.model_name_or_path"),
    ("data", "data.train"),
])
def test_missing_keys_inside_a_section(section: str, key: str) -> None:
    inner = {"eval": "x"} if section == "data" else {"revision": "main"}
    with pytest.raises(RecipeError, match=f"{key} is missing"):
        parse_recipe({**without(section), section: inner})


def test_only_ce_needs_no_teacher() -> None:
    tree = without("teacher")
    assert parse_recipe({**tree, "objective": "ce"}).teacher is None
    with pytest.raises(RecipeError, match="'ce'"):
        parse_recipe({**tree, "objective": {"terms": ["ce", "taid"]}})


# ----- values -------------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "value"), [
    ("1e-4", 1e-4), ("1E-4", 1e-4), ("1e5", 1e5), (".5e-3", 5e-4), ("-2e+3", -2e3),
    ("1.5e3", 1.5e3), ("1.e2", 100.0), ("1_0e2", 1e3), ("0.1", 0.1), ("3", 3),
])
def test_numbers(written: str, value: float, tmp_path: Path) -> None:
    recipe = read(tmp_path, overrides=[f"train.learning_rate={written}"])
    found = recipe.train["learning_rate"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("written", "value"), [
    ("train.max_steps=1e3", 1000), ("train.max_steps=20.0", 20), ("train.seed=1e2", 100),
    ("train.save_steps=0.25", 0.25), ("train.eval_steps=0.5", 0.5), ("train.logging_steps=2e1", 20),
    ("train.max_length=null", None), ("train.per_device_train_batch_size=1.6e1", 16),
])
def test_whole_numbers(written: str, value: float | None, tmp_path: Path) -> None:
    """1e3 is one; where transformers takes a share of all steps, one below 1 is kept."""
    key = written.partition("=")[0].removeprefix("train.")
    arguments = training_arguments(read(tmp_path, overrides=[written, "train.use_cpu=true"]))
    assert getattr(arguments, key) == value
    assert type(getattr(arguments, key)) is type(value)


@pytest.mark.parametrize("written", ["e5", "1.2.3", "1e", "1e5x", "e-4", "v1e5", "1-e5", "'1e-4'"])
def test_strings_stay_strings(written: str, tmp_path: Path) -> None:
    recipe = read(tmp_path, overrides=[f"student.revision={written}"])
    assert recipe.student.revision == written.strip("'")


@pytest.mark.parametrize(("override", "told"), [
    ("train.learning_rate=abc", "train.learning_rate = 'abc'"),
    ("train.max_steps=many", "train.max_steps = 'many'"),
    ("train=fast", "train must be a mapping"),
    ("student=[a, b]", "student must be a mapping"),
    ("student={model_name_or_path: 7}", "student.model_name_or_path = 7"),
    ("student=''", "student.model_name_or_path = ''"),
    ("data=train.jsonl", "data must be a mapping"),
    ("data.train=3", "data.train must be a mapping"),
    ("evaluate=all", "evaluate must be a mapping"),
    ("objective={weight: 2}", "objective needs a 'name'"),
    ("objective.kd_temperature=0", "objective.kd_temperature = 0"),
    ("objective={terms: []}", "objective.terms must be a list"),
    ("objective={terms: [ce, ce]}", "names a loss twice"),
    ("objective={terms: [ce], t_start: 0.1}", "'t_start' stands beside 'terms'"),
    ("objective={terms: [{name: ce, weight: -1}]}", "weight = -1"),
    ("objective.alpha=automatic", "alpha = 'automatic'"),
    ("objective.momentum=1", "momentum = 1"),
    ("objective.t_start='0.4'", "t_start"),
    ("objective.adaptive='no'", "adaptive"),
    ("objective=5", "objective"),
])
def test_wrong_values_are_told(override: str, told: str, tmp_path: Path) -> None:
    assert told in refused(tmp_path, override)


def test_unknown_loss_names_the_nearest(tmp_path: Path) -> None:
    message = refused(tmp_path, "objective.name=tiad")
    assert "tiad" in message
    assert "'taid'" in message


def test_t_never_falls(tmp_path: Path) -> None:
    message = refused(tmp_path, "objective={name: taid, t_start: 0.9, t_end: 0.2}")
    assert "0.9" in message
    assert "0.2" in message


@pytest.mark.parametrize(("override", "told"), [
    ("train.max_steps=[1", "train.max_steps"),
    ("train.max_steps=2.5", "train.max_steps = 2.5, but it must be a whole number"),
    ("train.max_steps=true", "train.max_steps = True, but it must be a whole number"),
    ("train.save_steps=2.5", "train.save_steps = 2.5, but it must be a whole number"),
    ("train.seed=true", "train.seed = True, but it must be a whole number"),
    ("train.max_steps=0.5", "train.max_steps = 0.5"),
    ("train.seed=0.5", "train.seed = 0.5"),
    ("train.max_steps=-2.5", "train.max_steps = -2.5"),
    ("train.gradient_accumulation_steps=null", "accumulation_steps = None"),
    ("train.seed=null", "train.seed = None"),
    ("evaluate.max_new_tokens=0", "evaluate.max_new_tokens = 0"),
    ("data.train={path: x, max_records: -1}", "max_records = -1"),
    ("train.learning_rate=[1]", "train.learning_rate = [1], but it must be a number"),
    ("train.learning_rate=true", "train.learning_rate = True, but it must be a number"),
    ("train.learning_rate=null", "train.learning_rate = None, but it must be a number"),
    ("train.max_length=abc", "train.max_length = 'abc'"),
    ("train.bf16='no'", "train.bf16 = 'no', but it must be true or false"),
    ("train.fp16=1", "train.fp16 = 1, but it must be true or false"),
    ("train.per_device_train_batch_size=0", "batch_size = 0, but it must be at least 1"),
    ("train.lr_scheduler_type=foo", "train: foo is not a valid SchedulerType"),
    ("train.eval_strategy=sometimes", "train: sometimes is not a valid IntervalStrategy"),
    ("train.optim=foo", "train: foo is not a valid OptimizerNames"),
    ("train.load_best_model_at_end=true", "train: --load_best_model_at_end requires"),
    ("train.logging_steps=0", "train: logging strategy"),
    ("objective={terms: [5]}", "a term must be a name or a mapping with 'name', got 5"),
    ("evaluate.examples=many", "evaluate.examples = 'many', but it must be a whole number"),
    ("evaluate.progress=13", "evaluate.progress = 13, but it is of .examples = 12"),
    ("evaluate.examples=true", "evaluate.examples = True, but it must be a whole number"),
    ("student.trust_remote_code='no'", "trust_remote_code = 'no', but it must be true or false"),
    ("student.peft=4", "student.peft = 4, but it must be a mapping"),
    ("student.revision=5", "student.revision = 5, but it must be text"),
    ("student.dtype=float12", "student.dtype = 'float12'"),
    ("data.train={path: x, streaming: 'false'}", "data.train.streaming = 'false'"),
    ("data.train={path: x, max_records: ten}", "data.train.max_records = 'ten'"),
    ("data.train={path: x, columns: [a]}", "data.train.columns = ['a']"),
    ("data.train={path: 5}", "data.train.path = 5, but it must be text"),
    ("output_dir=''", "output_dir = ''"),
])
def test_values_of_a_wrong_kind_are_refused(override: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        training_arguments(read(tmp_path, overrides=[override, "train.use_cpu=true"]))
    assert told in str(caught.value)


def test_a_recipe_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"student: \xff\xfe")
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_recipe(tmp_path / "recipe.yaml")


# ----- keys that belong elsewhere -----------------------------------------------------------


@pytest.mark.parametrize(("key", "place"), [
    ("output_dir", "output_dir"), ("objective", "objective"),
    ("model_init_kwargs", "student.init_kwargs"),
    ("teacher_model_init_kwargs", "teacher.init_kwargs"),
])
def test_keys_that_belong_elsewhere(key: str, place: str, tmp_path: Path) -> None:
    assert f"train.{key} belongs to '{place}'" in refused(tmp_path, f"train.{key}=x")


@pytest.mark.parametrize("key", sorted(WITHOUT_EFFECT))
def test_options_without_effect_are_refused(key: str, tmp_path: Path) -> None:
    assert f"train.{key} has no effect" in refused(tmp_path, f"train.{key}=true")


def test_own_arguments_may_stand_under_train(tmp_path: Path) -> None:
    arguments = training_arguments(read(tmp_path, overrides=[
        "train.supervise=all", "train.max_length=64", "train.padding_side=left",
        "train.use_cpu=true"]))
    assert (arguments.supervise, arguments.max_length) == ("all", 64)
    assert arguments.padding_side == "left"


# ----- overrides ----------------------------------------------------------------------------


def test_overrides_reach_every_level(tmp_path: Path) -> None:
    recipe = read(tmp_path, overrides=[
        "train.max_steps=7", "objective.t_start=0.1", "evaluate.examples=2", "output_dir=there",
        "student.peft.r=4", "data.eval=null", "data.train={path: x, max_records: 3}",
    ])
    assert recipe.train["max_steps"] == 7
    assert recipe.objective == {"name": "taid", "t_start": 0.1}
    assert recipe.evaluate.examples == 2
    assert recipe.output_dir == "there"
    assert recipe.student.peft == {"r": 4}
    assert recipe.data.eval is None
    assert recipe.data.train.max_records == 3


def test_overrides_of_a_model_given_as_a_bare_string(tmp_path: Path) -> None:
    text = MINIMAL.replace("{model_name_or_path: small}", "small")
    recipe = read(tmp_path, text, ["student.dtype=bfloat16"])
    assert recipe.student.model_name_or_path == "small"
    assert recipe.student.dtype == "bfloat16"


def test_a_later_override_wins(tmp_path: Path) -> None:
    recipe = read(tmp_path, overrides=["train.max_steps=1", "train.max_steps=2"])
    assert recipe.train["max_steps"] == 2


@pytest.mark.parametrize("override", ["train.max_steps", "=5", "train.max_steps.deep=5",
                                      "output_dir.x=1"])
def test_malformed_overrides(override: str, tmp_path: Path) -> None:
    assert f"'{override}'" in refused(tmp_path, override)


# ----- files --------------------------------------------------------------------------------


def test_a_missing_recipe_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text(MINIMAL)
    with pytest.raises(RecipeError, match=r"frist\.yaml.*does not exist.*'first\.yaml'"):
        load_recipe(tmp_path / "frist.yaml")


@pytest.mark.parametrize("text", ["", "- a list\n", "just words\n", "student: {unclosed\n"])
def test_files_that_are_no_recipe(text: str, tmp_path: Path) -> None:
    assert "recipe.yaml" in refused(tmp_path, text=text)


@pytest.mark.parametrize("overrides", [
    [],
    ["student={model_name_or_path: s, peft: {r: 4, target_modules: [q_proj]}, dtype: float32}"],
    ["objective={terms: [{name: taid, t_start: 0.1}, {name: ce, weight: 0.5}]}"],
    ["data.train={path: x.parquet, columns: {prompt: q, completion: a}, max_records: 9}"],
    ["train={learning_rate: 1e-4, bf16: false, lr_scheduler_type: cosine}", "objective=jsd"],
    ["student.model_name_or_path='007'", "output_dir='1.5'", "teacher.revision='true'"],
    ["teacher.revision='12e5678'"],
    ["output_dir=läufe/数量"],
])
def test_the_resolved_recipe_reads_back(overrides: list[str], tmp_path: Path) -> None:
    recipe = read(tmp_path, overrides=overrides)
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe.to_yaml())
    again = load_recipe(path)
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert again.to_yaml() == recipe.to_yaml()


def test_the_digest_tells_recipes_apart(tmp_path: Path) -> None:
    plain, other = read(tmp_path), read(tmp_path, overrides=["train.max_steps=21"])
    assert plain.digest() != other.digest()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe = load_recipe(path, ["train.use_cpu=true"])
    training_arguments(recipe)
    resolved = yaml.safe_load(recipe.to_yaml())
    assert parse_recipe(resolved).digest() == recipe.digest()
