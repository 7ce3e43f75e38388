"""Every shipped recipe, planned with small models of its models' families."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cli.recipes import Checkpoints, pairs, picture_rows, write_jsonl
from cli.test_shipped_recipes import family

from taid_vlm.commands.recipes import shipped_recipes
from taid_vlm.config.recipe import Recipe, load_recipe
from taid_vlm.plan import ledger as kinds
from taid_vlm.plan.plan import plan_recipe

DEVICES = ("_24gb", "_80gb", "_8x80gb", "_64x80gb")


def lookalike(recipe: Recipe, path: Path, folder: Path, checkpoints: Checkpoints) -> Recipe:
    """The recipe with models of its models' families, and records to look at."""
    overrides, families = list[str](), set[str]()
    for role, spec in (*recipe.teacher_specs.items(), ("student", recipe.student)):
        key = "processor_name_or_path" if getattr(spec, "server", None) else "model_name_or_path"
        name = str(spec.model_name_or_path)
        kind = "llava" if name.startswith("runs/") else family(name)  # what `compose` made
        families.add(kind)
        overrides.append(f"{role}.{key}={checkpoints(kind, seed=int(role == 'student'))}")
    seeing = {"qwen2_5_vl", "qwen3_vl", "internvl", "llava", "llava_onevision"}
    rows: Any = picture_rows(folder) if families & seeing else pairs(16)
    data = write_jsonl(folder / "train.jsonl", rows)
    if recipe.teachers:  # the first sees pictures, the others read
        first = next(iter(recipe.teachers))
        sources = [{"teacher": name, "path": str(write_jsonl(folder / f"{name}.jsonl", picture_rows(
            folder) if name == first else pairs(16)))} for name in recipe.teachers]
        return load_recipe(path, [*overrides, f"data={json.dumps({'train': sources})}"])
    return load_recipe(path, [*overrides, f"data={{train: {data}, eval: {data}}}"])


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_planned(
    name: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    path = shipped_recipes()[name]
    recipe = lookalike(load_recipe(path), path, tmp_path, checkpoints)
    plans = plan_recipe(recipe, 2)
    assert len(plans) == max(len(recipe.stages or ()), 1)
    served = recipe.teacher is not None and recipe.teacher.server is not None
    for plan in plans:
        parts = {part.name for part in plan.components}
        alone = not recipe.teacher_specs  # sequence-level: its teacher has written the data
        assert (kinds.TEACHER in parts) != (served or alone) and kinds.STUDENT in parts
        assert (plan.cache is None) == (served or alone or recipe.teachers is not None)
        assert plan.device == "gpu" and plan.peak > 0


@pytest.mark.parametrize("devices", DEVICES)
def test_a_recipe_for_a_card_says_what_it_needs(devices: str) -> None:
    paths = [path for name, path in shipped_recipes().items()
             if name.removesuffix("_fsdp").endswith(devices)]
    assert paths
    for path in paths:
        said = re.search(r"^# Memory \(planned\): ([\d.]+) GB", path.read_text(), re.MULTILINE)
        assert said is not None, path
        assert float(said[1]) < (24 if "24gb" in devices else 80) * 2**30 / 1e9
