"""taid_vlm: distil large vision-language models and LLMs into small ones."""

import importlib
from typing import TYPE_CHECKING, Any

from taid_vlm.errors import AlignmentError, RecipeError, RecordError, TaidError

if TYPE_CHECKING:
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
    "divergence",
    "parse_objective",
]


_LATER = {"DistillationConfig": "training.config", "DistillationTrainer": "training.trainer",
          "FusedDivergence": "fused.divergence", "Head": "fused.heads",
          **dict.fromkeys(("Objective", "TaidSchedule", "divergence", "parse_objective"),
                          "objectives")}


def __getattr__(name: str) -> Any:
    """Import only where it is used what brings in transformers, which takes seconds."""
    if name in _LATER:
        return getattr(importlib.import_module(f"taid_vlm.{_LATER[name]}"), name)
    raise AttributeError(f"module 'taid_vlm' has no attribute '{name}'")
