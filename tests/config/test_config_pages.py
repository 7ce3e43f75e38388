"""What is written from the classes: the reference, JSON Schema, a first recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from taid_vlm.commands.parser import reference
from taid_vlm.config.init import RATES, init_recipe
from taid_vlm.config.objective import TERMS
from taid_vlm.config.recipe import Recipe, load_recipe
from taid_vlm.config.reference import reference_page
from taid_vlm.config.schema import benchmark_schema, recipe_schema
from taid_vlm.config.training import WITHOUT_EFFECT, train_spec
from taid_vlm.config.yaml import read_yaml
from taid_vlm.errors import RecipeError
from taid_vlm.objectives import parse_objective

ROOT = Path(__file__).parents[2]

# ----- the reference ------------------------------------------------------------------------


def test_the_reference_is_what_the_classes_say() -> None:
    assert (ROOT / "docs/reference.md").read_text() == reference(), (
        "docs/reference.md is not up to date; docs/architecture.md says how it is written")


def test_rows_of_the_reference() -> None:
    page = reference_page()
    for row in (
        "| `max_records` | whole number >= 1 |  | records | Only the first so many. |",
        "| `output_dir` | text | required |  |",
        "| `taid: t_start` | number >= 0, <= 1 | `0.4` |  | t at the first step. |",
        "| `jsd` | `js`, `gjs` | Generalised Jensen-Shannon divergence",
        "| `padding_side` | `left`, `right` | `right` |  |",
        "| `objective` | text or mapping | `{\"name\": \"taid\"}` |",
    ):
        assert row in page
    assert all(f"`{key}`" in page for key in (*Recipe.model_fields, *TERMS, *WITHOUT_EFFECT))


def test_options_of_commands_follow() -> None:
    class Options(BaseModel):
        max_records: int | None = Field(default=None, ge=1, description="The first rows only.")

    page = reference_page({"evaluate": Options})
    assert page.startswith(reference_page())
    assert "## `taid-vlm evaluate`\n" in page
    assert "| `--max-records` | whole number >= 1 |  |  | The first rows only. |" in page


# ----- JSON Schema --------------------------------------------------------------------------


def resolved(schema: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The schema of a key inside a recipe, behind references and texts that stand for mappings."""
    found = schema
    for key in (*keys, ""):
        while "$ref" in found:
            found = schema["$defs"][found["$ref"].rpartition("/")[2]]
        found = found["oneOf"][0] if key and "oneOf" in found else found  # one source, not a list
        while "$ref" in found:
            found = schema["$defs"][found["$ref"].rpartition("/")[2]]
        options = [option for option in found.get("anyOf", ()) if option.get("type") != "null"]
        if options and key:
            found = options[-1]
            while "$ref" in found:
                found = schema["$defs"][found["$ref"].rpartition("/")[2]]
            found = next((o for o in found.get("anyOf", ()) if "properties" in o), found)
        if key:
            found = found["properties"][key]
    return found


def test_the_schema_of_a_recipe() -> None:
    schema = json.loads(json.dumps(recipe_schema()))
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["student", "data", "output_dir"]
    train = resolved(schema, "train")
    assert set(train["properties"]) == set(train_spec().model_fields)
    assert train["additionalProperties"] is False
    assert train["properties"]["torch_compile"]["type"] == "boolean"
    assert all(field.get("description") for field in train["properties"].values())
    one, several = resolved(schema, "data", "train")["oneOf"]
    assert resolved({**schema, **one})["anyOf"][0] == {"type": "string"}
    assert several == {"type": "array", "items": one}
    assert resolved(schema, "student", "dtype")["anyOf"][0]["enum"][0] == "auto"
    options = schema["properties"]["objective"]["oneOf"]
    forms = [resolved({**schema, **option}) for option in options]
    names = [name for form in forms if "anyOf" in form for name in form["anyOf"][0].get(
        "enum", [form["anyOf"][0].get("const")])]
    assert set(names) == {name for kind in TERMS.values() for name in kind.names()}
    assert len(set(names)) == len(names)  # a bare name fits one form alone


def test_the_schema_of_a_benchmark() -> None:
    schema = benchmark_schema()
    assert schema["required"] == ["type", "data"]
    assert resolved(schema, "columns")["properties"]["answer"]["default"] == "answer"


def test_editors_find_no_mistake_in_shipped_recipes() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(recipe_schema())
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert [error.message for error in check.iter_errors(read_yaml(path, "recipe"))] == []


@pytest.mark.parametrize(("teacher", "valid"), [
    ("a", True), ({"model_name_or_path": "a"}, True), ({"cache": "c"}, True), ({}, False),
    ({"processor_name_or_path": "a", "server": {"url": "http://x/v1", "model": "a"}}, True),
    ({"server": {"url": "http://x/v1", "model": "a"}}, False), ({"dtype": "float32"}, False)])
def test_editors_know_what_a_teacher_needs(teacher: Any, valid: bool) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    recipe = {"teacher": teacher, "student": "b", "data": {"train": "t.jsonl"}, "output_dir": "o"}
    assert jsonschema.Draft202012Validator(recipe_schema()).is_valid(recipe) == valid


# ----- a first recipe -----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "my student: 3", "data"):
        Path(name).mkdir()
    for name in ("train.jsonl", "held out.csv"):
        Path(name).write_text("")
    return tmp_path


@pytest.mark.parametrize("train_what", RATES)
@pytest.mark.parametrize("held_out", [None, "held out.csv"])
def test_a_first_recipe_reads_back(train_what: Any, held_out: str | None, folder: Path) -> None:
    text = init_recipe("teacher", "./my student: 3", "train.jsonl", held_out, train_what)
    (folder / "first.yaml").write_text(text)
    recipe = load_recipe(folder / "first.yaml")
    assert recipe.teacher.model_name_or_path == "teacher"
    assert recipe.student.model_name_or_path == "./my student: 3"
    assert recipe.output_dir == "runs/my student: 3"
    assert recipe.objective == {"name": "taid"}
    assert recipe.data.train.path == "train.jsonl"
    assert (recipe.data.eval and recipe.data.eval.path) == held_out
    assert ("eval_strategy" in recipe.train) == (held_out is not None)
    assert recipe.train["learning_rate"] == {"full": 2e-5, "lora": 1e-4, "projector": 1e-3}[
        train_what]
    assert (recipe.student.peft is not None) == (train_what == "lora")
    assert recipe.train.get("freeze") == (
        ["tower", "language_model", "head"] if train_what == "projector" else None)
    assert text.count("#") > 6
    assert ("lost layers" in text) == (train_what == "full")


def test_what_a_first_recipe_proposes_is_read(folder: Path) -> None:
    text = init_recipe("teacher", "my student: 3", "train.jsonl").replace(
        "  name: taid ", "  # ").replace("  # terms:", "  terms:").replace("  # on_p", "  on_p")
    (folder / "first.yaml").write_text(text)
    objective = parse_objective(load_recipe(folder / "first.yaml").objective)
    assert [(term.name, term.weight) for term in objective.terms] == [("taid", 1.0), ("ce", 0.2)]
    assert objective.on_policy is not None and objective.on_policy.lmbda == 0.5


def test_hub_names_need_not_lie_here(folder: Path) -> None:
    (folder / "first.yaml").write_text(init_recipe("Qwen/Qwen2.5-VL-7B", "gpt2", "a/b.c"))
    assert load_recipe(folder / "first.yaml").data.train.path == "a/b.c"


@pytest.mark.parametrize(("arguments", "message"), [
    (("./teach", "s", "train.jsonl"), "teacher: './teach' does not exist. Did you mean 'teacher'?"),
    (("teacher", "~/no/such", "train.jsonl"), "student: '~/no/such' does not exist."),
    (("teacher", "s", "trian.jsonl"), "train: 'trian.jsonl' does not exist. Did you mean 'train.j"),
    (("teacher", "s", "data/x"), "train: 'data/x' does not exist."),
    (("teacher", "s", "train.jsonl", "held_out.csv"), "eval: 'held_out.csv' does not exist. Did"),
    (("teacher", "s", "train.jsonl", None, "lorra"), "train_what = 'lorra'. Did you mean 'lora'?"),
])
def test_a_path_that_does_not_exist(arguments: Any, message: str, folder: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        init_recipe(*arguments)
    assert message in str(caught.value)
