"""Names of weights as published checkpoints have them.

`save_pretrained` writes most families under the names of their checkpoints on the hub, whatever a
model calls its modules inside. One name depends on where the weights came from: transformers 5 has
no `vision_model` in CLIP's and SigLIP's towers, and writes it only for a model that was loaded with
it. A model that was put together from parts would be written as `vision_tower.embeddings...`, which
vLLM and transformers 4 do not load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange

PUBLISHED = ("vision_model",)  # parts of names that every published checkpoint has


def save_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """`save_pretrained` under published names."""
    use_published_names(model)
    model.save_pretrained(str(folder))


def use_published_names(model: Any) -> None:
    """Let the model's `save_pretrained` write published names; inside, all stays as it is.

    A PeftModel writes an adapter, whose names are peft's, and is left alone.
    """
    if not isinstance(model, PreTrainedModel):
        return
    known = get_model_conversion_mapping(model, add_legacy=False)
    used = getattr(model, "_weight_conversions", None)  # what loading it took, if it was loaded
    if used is None:  # as `save_pretrained` would have it
        used = [change for change in known if not isinstance(change, PrefixChange)]
    there = {_place(change) for change in used}
    missing = [change for change in known
               if _place(change)[0] in PUBLISHED and _place(change) not in there]
    if missing:  # at the end: saving goes through them backwards, innermost modules first
        model._weight_conversions = [*used, *missing]


def _place(change: Any) -> tuple[str | None, str | None]:
    """What a change of names takes out, and of which module's names."""
    return getattr(change, "prefix_to_remove", None), change.scope_prefix
