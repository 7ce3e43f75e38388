"""DistillationConfig: transformers' TrainingArguments and what distillation adds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import (
    TrainingArguments,
)

from taid_vlm.errors import TaidError
from taid_vlm.fused.divergence import MEMORY_BUDGET
from taid_vlm.models.parts import check_parts
from taid_vlm.objectives import parse_objective


@dataclass
class DistillationConfig(TrainingArguments):
    """TrainingArguments and what distillation adds.

    Args:
        objective: a name ("taid") or a mapping as in a recipe's `objective`.
        supervise: "answers" (the assistant's texts) or "all".
        max_length: tokens per row after image expansion; None takes each model's own limit.
        padding_side: of both models' inputs in training.
        canary_records: records with images at which every evaluation asks whether the models look
            (`taid_vlm.evaluation.canary`); 0 asks nothing.
        loss_implementation: "fused" (never all logits in memory), "reference", or "auto": fused
            where it gives the same, which is checked at the first batch.
        loss_memory_budget: bytes that the fused loss may take for logits and their gradient.
        freeze: parts of the student that stay as they are (`taid_vlm.models.parts`).
        learning_rates: {part: learning rate}; the others take `learning_rate`.
        model_init_kwargs, teacher_model_init_kwargs: for `from_pretrained`, where a model is
            given by name.
    """

    objective: str | dict[str, Any] = field(default="taid")
    supervise: str = field(default="answers")
    max_length: int | None = field(default=None)
    padding_side: str = field(default="right")
    canary_records: int = field(default=64)
    loss_implementation: str = field(default="auto")
    loss_memory_budget: int = field(default=MEMORY_BUDGET)
    freeze: list[str] | None = field(default=None)
    learning_rates: dict[str, float] | None = field(default=None)
    model_init_kwargs: dict[str, Any] | None = field(default=None)
    teacher_model_init_kwargs: dict[str, Any] | None = field(default=None)
    remove_unused_columns: bool = field(default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        # every process makes its own batches: a batch of aligned tokens cannot be cut in two
        self.accelerator_config.dispatch_batches = False
        for key, value, valid in (("supervise", self.supervise, ("answers", "all")),
                                  ("padding_side", self.padding_side, ("left", "right")),
                                  ("loss_implementation", self.loss_implementation,
                                   IMPLEMENTATIONS)):
            if value not in valid:
                raise TaidError(f"{key} = '{value}', but it must be one of {', '.join(valid)}.")
        if self.max_length is not None and self.max_length < 2:
            raise TaidError(f"max_length = {self.max_length}, but it must be at least 2.")
        if self.loss_memory_budget < 1:
            raise TaidError(f"loss_memory_budget = {self.loss_memory_budget}, but it must be "
                            "positive.")
        if self.canary_records < 0:
            raise TaidError(f"canary_records = {self.canary_records}, but it must be at least 0.")
        check_parts(self.freeze, self.learning_rates)
        parse_objective(self.objective)


IMPLEMENTATIONS = ("auto", "fused", "reference")
