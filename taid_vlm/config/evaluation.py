"""`evaluate:` of a recipe."""

from __future__ import annotations

from taid_vlm.config.kinds import Count, Positive
from taid_vlm.config.section import Section


class EvaluateSpec(Section):
    """What is done with the held-out records beside the figures.

    Args:
        examples (records): How many of them both models answer for the report's gallery.
        max_new_tokens (tokens): Length of those answers.
        canary (records): At how many records with images it is asked whether the models look; 0
            asks nothing.
    """

    examples: Count = 12
    max_new_tokens: Positive = 64
    canary: Count = 64
