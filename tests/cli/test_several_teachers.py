"""Recipes with several teachers: rows by source, by column and mixed, through every command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.recipes import (
    Checkpoints,
    Outcome,
    pairs,
    picture_rows,
    write_jsonl,
    write_recipe,
)
from cli.test_cache import carried_out, difference

Cli = Callable[..., Outcome]


@pytest.fixture
def recipe(tmp_path: Path, checkpoints: Checkpoints) -> dict[str, Any]:
    """A seeing teacher for pictures, a text model of another tokenizer for texts; one source says
    which, in the other the rows do."""
    pictures = write_jsonl(tmp_path / "pictures.jsonl", picture_rows(tmp_path, 5))
    texts = write_jsonl(tmp_path / "texts.jsonl", [
        {**row, "taught": "writes" if index % 2 else "sees"}
        for index, row in enumerate(pairs(6, 3))])
    sources = [{"path": str(pictures), "teacher": "sees"},
               {"path": str(texts), "columns": {"teacher": "taught"}}]
    return {
        "teachers": {"sees": {"model_name_or_path": checkpoints("internvl")},
                     "writes": checkpoints("llama", "metaspace", 2)},
        "student": {"model_name_or_path": checkpoints("llava", "permuted", seed=1)},
        "data": {"train": sources, "eval": sources},
        "objective": {"terms": ["taid", {"name": "ce", "weight": 0.2}]},
        "train": {"learning_rate": 5e-3, "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
                  "num_train_epochs": 1, "per_device_train_batch_size": 1, "seed": 3,
                  "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 2,
                  "save_strategy": "no"},
        "evaluate": {"examples": 1, "max_new_tokens": 4},
        "output_dir": str(tmp_path / "live"),
    }


def test_a_run_names_its_teachers_everywhere(
    recipe: dict[str, Any], cli: Cli, tmp_path: Path
) -> None:
    results = carried_out(cli, tmp_path, recipe)
    assert {name: one["alignment"]["case"] for name, one in results["teachers"].items()} == {
        "sees": "b", "writes": "c"}
    assert [*results["models"]] == ["student"]
    assert results["alignment"] is None
    assert results["train"]["loss_implementation"]["name"] == "fused"
    assert not results["train"]["unread_columns"]
    for moment in ("before", "after"):
        figures = results["eval"][moment]
        assert figures["kl/sees"] > 0
        assert figures["kl/writes"] > 0
        assert figures["n_answers"] == 11
    assert [*results["canary"]["teachers"]] == ["sees"]
    page = (tmp_path / "live/report.html").read_text()
    card = (tmp_path / "live/student/README.md")
    for text in (page, *([card.read_text()] if card.exists() else [])):
        assert "sees" in text
        assert "writes" in text


def test_each_teacher_has_a_cache_of_its_own(
    recipe: dict[str, Any], cli: Cli, tmp_path: Path
) -> None:
    """Trained record by record on both caches, a run is that of the live teachers bit for bit."""
    expected, live = carried_out(cli, tmp_path, recipe), write_recipe(tmp_path, recipe, "live.yaml")
    refused = cli("cache", live, "--output", tmp_path / "x")
    assert refused.status == 2
    assert "name it with --teacher. Valid: sees, writes" in refused.err
    nearest = cli("cache", live, "--output", tmp_path / "x", "--teacher", "see")
    assert nearest.status == 2
    assert "Did you mean 'sees'?" in nearest.err
    folders = {}
    for name, others in (("sees", 3), ("writes", 8)):
        folders[name] = str(tmp_path / f"cache-{name}")
        done = cli("cache", live, "--output", folders[name], "--teacher", name)
        assert done.status == 0, done.err
        assert f"{2 * others} x another teacher's" in done.out
    cached = {**recipe, "output_dir": str(tmp_path / "cached"),
              "teachers": {name: {"cache": folder} for name, folder in folders.items()}}
    results = carried_out(cli, tmp_path, cached)
    assert difference(expected, results) == 0.0
    for figure in ("kl", "kl/sees", "kl/writes", "nll"):
        assert results["eval"]["after"][figure] == expected["eval"]["after"][figure]
    assert results["teachers"]["sees"]["model"]["cache"]["folder"] == folders["sees"]


def test_the_doctor_and_the_plan_name_them(
    recipe: dict[str, Any], cli: Cli, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, recipe)
    done = cli("inspect", path, "--all", "--record", "1", "--html", tmp_path / "doctor.html")
    assert done.status == 0, done.err
    assert "teachers.sees (case b)" in done.out
    assert "teachers.writes (case c)" in done.out
    assert "of the teacher" in done.out
    told = json.loads(cli("inspect", path, "--json").out)
    assert [*told["facts"]] == ["teachers.sees", "teachers.writes", "student"]
    assert told["verdict"]["case"] == "c"
    plan = cli("plan", path, "--json")
    assert plan.status == 0, plan.err
    (stage,) = json.loads(plan.out)["stages"]
    assert not [note for note in stage["notes"] if "rehearsed" in note]
    assert {"teachers.sees", "teachers.writes"} <= {*stage["batch"]["tokens"]}
    one = cli("plan", write_recipe(tmp_path, {
        **recipe, "teachers": {"sees": recipe["teachers"]["sees"]},
        "data": {"train": recipe["data"]["train"][0]}}), "--json")
    both, single = (next(part["most"] for part in json.loads(out)["stages"][0]["components"]
                         if part["name"] == "teacher parameters") for out in (plan.out, one.out))
    assert both > single


@pytest.mark.parametrize(("change", "says"), [
    ({"teacher": "x"}, "'teacher' and 'teachers' both say"),
    ({"teacher_weights": {"sees": 1, "write": 1}}, "teacher_weights is 'write'.*'writes'"),
    ({"teachers": {}}, "'teachers' is empty"),
    ({"objective": {"terms": ["taid", "visual_relation"]}}, "visual terms, token_weights and"),
    ({"objective": {"name": "forward_kl", "on_policy": {"lmbda": 0.5, "max_new_tokens": 4}}},
     "on_policy are of one teacher"),
])
def test_what_contradicts_itself_is_refused(
    change: dict[str, Any], says: str, recipe: dict[str, Any], cli: Cli, tmp_path: Path,
    no_weights: None,
) -> None:
    done = cli("distill", write_recipe(tmp_path, {**recipe, **change}))
    assert done.status == 2
    (error,) = done.errors
    assert re.search(says, error), error


def test_names_in_the_data_are_checked(
    recipe: dict[str, Any], cli: Cli, tmp_path: Path, no_weights: None
) -> None:
    wrong = {**recipe["data"]["train"][0], "teacher": "seas"}
    done = cli("distill", write_recipe(tmp_path, {**recipe, "data": {"train": wrong}}))
    assert done.status == 2
    assert "is 'seas', but 'teachers' has no such name. Did you mean 'sees'?" in done.err
    rows = [{**row, "teacher": "write"} for row in pairs(4)]
    data = str(write_jsonl(tmp_path / "wrong.jsonl", rows))
    done = cli("distill", write_recipe(tmp_path, {**recipe, "data": {"train": data}}))
    assert done.status == 2
    assert "4 of the first 4 rows name the teacher 'write'" in done.err
    alone = {key: value for key, value in recipe.items() if key != "teachers"}
    alone["teacher"] = recipe["teachers"]["sees"]
    alone["data"] = {"train": recipe["data"]["train"][1]}
    done = cli("distill", write_recipe(tmp_path, alone))
    assert done.status == 2
    assert "columns.teacher = 'taught' has no effect without 'teachers'" in done.err


def test_the_only_one_is_a_single_teacher(
    recipe: dict[str, Any], cli: Cli, tmp_path: Path
) -> None:
    data = dict.fromkeys(("train", "eval"), recipe["data"]["train"][0]["path"])
    single = {**recipe, "data": data, "teacher": recipe["teachers"]["sees"]}
    del single["teachers"]
    named = {**recipe, "data": data, "output_dir": str(tmp_path / "named"),
             "teachers": {"sees": recipe["teachers"]["sees"]}}
    one, other = (carried_out(cli, tmp_path, each) for each in (single, named))
    assert difference(one, other) == 0.0
    assert one["eval"] == other["eval"]
    assert one["models"] == other["models"]
