"""How a student's own answers are sampled, and where."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from taid_vlm.config.kinds import Count, Positive, Rate, Share, wanted
from taid_vlm.config.section import Section
from taid_vlm.config.server import Server


class EngineSpec(Server):
    """A vLLM server that samples the student's answers (docs/on_policy.md says how it is started).

    Args:
        model: The name under which the server knows the student, or the base model of its adapter.
        sync_every (steps): The server gets the student's weights before so many optimizer steps;
            what it samples is as old as they are, so max_age has to allow for it.
        weights_dir: Folder for the weights, under one path for this run and the server; left out,
            engine_weights in the output folder.
    """

    concurrency: Positive = 64
    sync_every: Positive = 1
    weights_dir: str | None = None


class SamplingSpec(Section):
    """How answers are sampled from the student.

    Args:
        lmbda: Share of the records whose answer is sampled anew, each time they come round.
        max_new_tokens (tokens): Longest sampled answer; one that is cut there does not learn to
            end.
        temperature: Of sampling.
        top_p: Share of the student's mass that is sampled from.
        batch_size (records): Answers that are sampled at once; left out, all of an optimizer step.
            A server takes as many as it can.
        max_age (steps): A record's sampled answer is learned from again if it comes round within
            so many optimizer steps; 0 samples each time.
        stop_when_collapsed: End the run if most answers are empty, repeat themselves or are no
            text, instead of warning.
        engine: A vLLM server that samples, instead of the student in this process: {url:
            http://localhost:8000/v1, model: NAME}.
    """

    lmbda: Share = 0.5
    max_new_tokens: Positive = 128
    temperature: Rate = 1.0
    top_p: Annotated[float, Field(gt=0, le=1), wanted("above 0 and at most 1")] = 1.0
    batch_size: Positive | None = None
    max_age: Count = 0
    stop_when_collapsed: bool = False
    engine: EngineSpec | None = None

    @model_validator(mode="after")
    def _as_old_as_allowed(self) -> Self:
        if self.engine is not None and self.engine.sync_every > self.max_age + 1:
            age = self.engine.sync_every - 1
            raise ValueError(f".engine.sync_every = {self.engine.sync_every} samples from weights "
                             f"that are up to {age} steps old, and max_age = {self.max_age} allows "
                             f"less; set max_age: {age}.")
        return self
