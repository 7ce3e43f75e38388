"""taid_vlm: distil large vision-language models and LLMs into small ones."""

from typing import TYPE_CHECKING, Any

from taid_vlm.errors import AlignmentError, RecipeError, RecordError, TaidError
from taid_vlm.objectives import Objective, TaidSchedule, divergence, parse_objective

if TYPE_CHECKING:
    from taid_vlm.trainer import DistillationConfig, DistillationTrainer

__version__ = "0.1.0"

__all__ = [
    "AlignmentError",
    "DistillationConfig",
    "DistillationTrainer",
    "Objective",
    "RecipeError",
    "RecordError",
    "TaidError",
    "TaidSchedule",
    "divergence",
    "parse_objective",
]


def __getattr__(name: str) -> Any:
    """Import the trainer only where it is used: it brings in transformers, which takes seconds."""
    if name in ("DistillationConfig", "DistillationTrainer"):
        from taid_vlm import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'taid_vlm' has no attribute '{name}'")
