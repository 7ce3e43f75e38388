"""A model's own head as the fused objective takes it, and whether that says what the model says."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from taid_vlm.fused.heads import Head, ModuleHead
from taid_vlm.models.forward import answer_hidden, answer_logits, evaluation_mode, head_rows
from taid_vlm.models.head import LogitTransform, known_logit_transforms

CHECKED_POSITIONS = 8  # at which head(hidden) must be the model's own logits
ALLOWED = {torch.float64: 1e-3, torch.float32: 1e-3}  # of the largest logit; half precisions: below
ALLOWED_HALF = 2.0**-6  # two roundings of bfloat16


def output_head(model: PreTrainedModel, transform: LogitTransform) -> Head | ModuleHead:
    """The model's head, and what stands behind it."""
    return head_of(model.get_output_embeddings(), head_rows(model), transform)


def head_of(module: nn.Module, rows: int, transform: LogitTransform) -> Head | ModuleHead:
    """A module as a head with so many rows."""
    if type(module) is nn.Linear:
        return Head(module.weight, module.bias, transform)
    return ModuleHead(module, rows, transform)


@torch.no_grad()
def find_logit_transform(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], mask: Tensor
) -> LogitTransform | None:
    """What the model does between its head and its logits; None if it is not known here.

    Of what its configuration may mean, that which comes nearest to the model's own logits at a few
    positions. Under autocast both are computed in its type: the caller opens it around the call,
    and a forward that accelerate has wrapped opens the same. Moves no random state.

    Args:
        inputs, mask: as for `answer_logits`, on any device.
    """
    device = model.device
    mask = mask.clone()
    places = mask.nonzero()[CHECKED_POSITIONS:]
    mask[places[:, 0], places[:, 1]] = False
    inputs, mask = {key: x.to(device) for key, x in inputs.items()}, mask.to(device)
    with evaluation_mode(model):
        own = answer_logits(model, inputs, mask)
        hidden = answer_hidden(model, inputs, mask)
    kind = device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    allowed = ALLOWED.get(dtype or hidden.dtype, ALLOWED_HALF)
    errors: dict[LogitTransform, float] = {}
    for transform in known_logit_transforms(model.config.get_text_config()):
        with torch.autocast(kind, enabled=False):
            logits = output_head(model, transform).open(dtype=dtype).logits(hidden)
        errors[transform] = _error(logits.float(), own.float())
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] <= allowed else None


def _error(logits: Tensor, own: Tensor) -> float:
    """The largest difference over the largest logit; where both are the same infinity or no
    numbers, there is none."""
    if not own.numel():
        return 0.0
    same = (logits == own) | (logits.isnan() & own.isnan())
    largest = own.nan_to_num(0.0, 0.0, 0.0).abs().max()
    return float((logits - own).masked_fill(same, 0.0).abs().max() / largest)
