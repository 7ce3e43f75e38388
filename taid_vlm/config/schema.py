"""JSON Schema of the files users write, for editors.

At the head of a file, `# yaml-language-server: $schema=recipe.schema.json` lets an editor complete
its keys, explain them and mark mistakes.
"""

from __future__ import annotations

from typing import Any

from taid_vlm.config.benchmark import BenchmarkSpec
from taid_vlm.config.recipe import Recipe
from taid_vlm.config.section import Section


def recipe_schema() -> dict[str, Any]:
    """Of a recipe; `train` has every key of the installed transformers."""
    return _schema(Recipe, "A recipe of taid-vlm")


def benchmark_schema() -> dict[str, Any]:
    """Of a file that describes a benchmark."""
    return _schema(BenchmarkSpec, "A benchmark of your own for taid-vlm")


def _schema(kind: type[Section], title: str) -> dict[str, Any]:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema",
            **kind.model_json_schema(), "title": title}
