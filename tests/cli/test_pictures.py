"""How pictures are shown, from the recipe to whoever loads the student."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.recipes import Checkpoints, Outcome, picture_rows, write_jsonl, write_recipe
from transformers import AutoProcessor

from taid_vlm.benchmarks.candidates import LocalModel
from taid_vlm.config.model import ModelSpec

Cli = Callable[..., Outcome]


@pytest.fixture
def tree(checkpoints: Checkpoints, tmp_path: Path) -> dict[str, Any]:
    data = write_jsonl(tmp_path / "train.jsonl", picture_rows(tmp_path, 8))
    return {
        "teacher": {"model_name_or_path": checkpoints("internvl"),
                    "processor_kwargs": {"max_patches": 1}},
        "student": {"model_name_or_path": checkpoints("qwen3_vl", "permuted", seed=1),
                    "processor_kwargs": {"max_pixels": 2048}},
        "data": {"train": str(data), "eval": str(data)}, "objective": "taid",
        "train": {"use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 2},
        "evaluate": {"examples": 1, "max_new_tokens": 2}, "output_dir": str(tmp_path / "out"),
    }


def test_the_students_processor_is_as_in_training(
    tree: dict[str, Any], cli: Cli, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tree)
    inspected = cli("inspect", recipe, "--json")
    assert inspected.status == 0, inspected.err
    facts = json.loads(inspected.out)["facts"]
    assert set(facts["teacher"]["images"]["tokens"].values()) == {6}
    assert max(facts["student"]["images"]["tokens"].values()) <= 8
    assert cli("distill", recipe).status == 0
    student = tmp_path / "out" / "student"
    assert AutoProcessor.from_pretrained(student).image_processor.size["longest_edge"] == 2048
    plain, other = (LocalModel(ModelSpec(model_name_or_path=str(student), processor_kwargs=more))
                    for more in ({}, {"max_pixels": 4096}))
    assert plain.identity["pictures_sha256"] != other.identity["pictures_sha256"]


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_mistake_shows_before_weights(
    tree: dict[str, Any], side: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("taid_vlm.models.loading.load_model", refuse)
    tree[side]["processor_kwargs"] = {"max_pixls": 2048, "max_patchs": 1}
    outcome = cli("distill", write_recipe(tmp_path, tree))
    assert (outcome.status, len(outcome.errors)) == (2, 1)
    assert f"{side}.processor_kwargs: " in outcome.errors[0]
    assert "Did you mean 'max_p" in outcome.errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["max_pixels=3", "[1]", "{"])
def test_evaluates_option_is_json(text: str, cli: Cli, tmp_path: Path) -> None:
    outcome = cli("evaluate", "--model", "m", "--tasks", "pope", "--output-dir", tmp_path,
                  "--processor-kwargs", text)
    assert outcome.status == 2
    assert "--processor-kwargs = " in outcome.err
