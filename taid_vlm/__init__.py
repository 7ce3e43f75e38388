"""taid_vlm: distil large vision-language models and LLMs into small ones.

Nothing is imported before it is used: torch and transformers take seconds, and a mistyped recipe is
refused without them.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taid_vlm.commands.compare import compare
    from taid_vlm.commands.distill import distill
    from taid_vlm.commands.evaluate import evaluate
    from taid_vlm.config.recipe import load_recipe
    from taid_vlm.errors import AlignmentError, RecipeError, RecordError, TaidError
    from taid_vlm.fused.divergence import FusedDivergence
    from taid_vlm.fused.heads import Head
    from taid_vlm.objectives import Objective, TaidSchedule, divergence, parse_objective
    from taid_vlm.training.config import DistillationConfig
    from taid_vlm.training.trainer import DistillationTrainer

__version__ = "0.1.0"

__all__ = [
    "AlignmentError",
    "DistillationConfig",
    "DistillationTrainer",
    "FusedDivergence",
    "Head",
    "Objective",
    "RecipeError",
    "RecordError",
    "TaidError",
    "TaidSchedule",
    "compare",
    "distill",
    "divergence",
    "evaluate",
    "load_recipe",
    "parse_objective",
]

_MODULES = {
    "commands.compare": ("compare",), "commands.distill": ("distill",),
    "commands.evaluate": ("evaluate",), "config.recipe": ("load_recipe",),
    "errors": ("AlignmentError", "RecipeError", "RecordError", "TaidError"),
    "fused.divergence": ("FusedDivergence",), "fused.heads": ("Head",),
    "objectives": ("Objective", "TaidSchedule", "divergence", "parse_objective"),
    "training.config": ("DistillationConfig",), "training.trainer": ("DistillationTrainer",),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}


class _Package(ModuleType):
    """`taid_vlm.compare` is the function; the room of that name is there for imports from it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'taid_vlm' has no attribute '{name}'")
    return getattr(importlib.import_module(f"taid_vlm.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
