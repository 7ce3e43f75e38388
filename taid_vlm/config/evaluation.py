"""`evaluate:` of a recipe."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from taid_vlm.config.kinds import Count, Positive
from taid_vlm.config.section import Section


class EvaluateSpec(Section):
    """What is done with the held-out records beside the figures.

    Args:
        examples (records): How many of them both models answer for the report's gallery.
        progress (examples): How many of these the student answers at every evaluation in training,
            too, so that the report shows it learn. Left out: 3, and none of a student that FSDP or
            DeepSpeed spreads over processes, where all weights are gathered for every token.
        max_new_tokens (tokens): Length of those answers.
        canary (records): At how many records with images it is asked whether the models look; 0
            asks nothing.
    """

    examples: Count = 12
    progress: Count | None = None
    max_new_tokens: Positive = 64
    canary: Count = 64

    @model_validator(mode="after")
    def _progress_of_examples(self) -> Self:
        if self.progress is not None and self.progress > self.examples:
            raise ValueError(f".progress = {self.progress}, but it is of .examples = "
                             f"{self.examples}; take at most as many.")
        return self
