"""`taid-vlm recipes`, and what all commands do with a recipe's name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from taid_vlm.commands.options import Many, Options, option, positional
from taid_vlm.errors import RecipeError, nearest, nearest_sibling

if TYPE_CHECKING:
    from taid_vlm.config.recipe import Recipe


class RecipeOptions(Options):
    """A recipe, and what is changed in it; overrides may stand before it, too."""

    recipe: str = positional("YAML file, or a name that `taid-vlm recipes` lists")
    overrides: Many = option(
        "for example train.max_steps=100", "KEY=VALUE", [], positional=True, many=True)

    @model_validator(mode="before")
    @classmethod
    def _recipe_first(cls, values: dict[str, Any]) -> dict[str, Any]:
        words = [str(values.get("recipe", "")), *values.get("overrides", ())]
        recipe = next((word for word in words if not is_override(word)), None)
        if recipe is None:
            raise ValueError(f"a recipe is missing; {', '.join(words)} overrides something in one.")
        words.remove(recipe)
        return {**values, "recipe": recipe, "overrides": words}

    def load(self, more: Sequence[str] = ()) -> Recipe:
        """The recipe under its overrides, and more of them."""
        from taid_vlm.config.recipe import load_recipe

        return load_recipe(recipe_path(self.recipe), [*self.overrides, *more])


class RecipesOptions(Options):
    """There are none."""


def run(options: RecipesOptions) -> None:
    from taid_vlm.io.terminal import table

    print(table([(name, path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# "))
                 for name, path in shipped_recipes().items()]))


def is_override(word: str) -> bool:
    """Whether a word is KEY=VALUE, not a file's path."""
    return bool(re.match(r"[^=/\\]+=", word)) and not Path(word).is_file()


def shipped_recipes() -> dict[str, Path]:
    """By name the recipes inside the installed package, or those of the checkout."""
    package = Path(__file__).parents[1]
    folders = (package / "recipes", package.parent / "recipes")
    folder = next((folder for folder in folders if folder.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_path(recipe: str | Path) -> Path:
    """A recipe's file, or the shipped one of that name where there is no such file."""
    path, shipped = Path(recipe).expanduser(), shipped_recipes()
    if path.exists() or path.suffix in (".yaml", ".yml") or path.name != str(path):
        return path
    if path.name not in shipped:
        raise RecipeError(f"recipe '{recipe}' does not exist, neither as a file nor among those "
                          f"that come with the package.{nearest(path.name, shipped)}"
                          f"{nearest_sibling(path, '*.y*ml')}")
    return shipped[path.name]
