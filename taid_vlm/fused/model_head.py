"""A model's own head as the fused objective takes it, and whether that says what the model says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from taid_vlm.fused.heads import Head, ModuleHead
from taid_vlm.models.forward import (
    Autocast,
    answer_hidden,
    answer_logits,
    evaluation_mode,
    head_rows,
    unwrap,
)
from taid_vlm.models.head import LogitTransform, known_logit_transforms

CHECKED_POSITIONS = 8  # at which head(hidden) must be the model's own logits
ALLOWED = {torch.float64: 1e-3, torch.float32: 1e-3}  # of the largest logit; half precisions: below
ALLOWED_HALF = 2.0**-6  # two roundings of bfloat16


def output_head(model: PreTrainedModel, transform: LogitTransform) -> Head | ModuleHead:
    """The model's head, and what stands behind it."""
    return head_of(model.get_output_embeddings(), head_rows(model), transform)


def head_of(module: nn.Module, rows: int, transform: LogitTransform) -> Head | ModuleHead:
    """A module as a head with so many rows."""
    if is_plain(module):
        plain = cast(nn.Linear, module)
        return Head(plain.weight, plain.bias, transform)
    return ModuleHead(module, rows, transform)


def is_plain(module: nn.Module) -> bool:
    """Whether a head is a matrix and no more, perhaps one that FSDP shards."""
    return type(module) is nn.Linear or type(module).__bases__ == (FSDPModule, nn.Linear)


@torch.compiler.disable  # the fused loss has bodies that are compiled on their own
def at_head(
    model: PreTrainedModel, transform: LogitTransform, hidden: Tensor,
    function: Callable[[Tensor, Any], Any],
) -> Any:
    """`function(hidden, head)`, as the forward of the head where that is a plain matrix: FSDP and
    ZeRO-3 bring its weights there when it is called, and take their gradient afterwards."""
    module = model.get_output_embeddings()
    if not is_plain(module):
        return function(hidden, output_head(model, transform))
    own = module.__dict__.get("forward")
    module.forward = lambda hidden: function(hidden, output_head(model, transform))
    try:
        return module(hidden)
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def inside_forward(
    model: nn.Module, transform: LogitTransform, batch: Mapping[str, Any], autocast: Autocast,
    compute: Callable[[Tensor, Any], Any],
) -> Any:
    """What `compute` gives for the hidden states at a batch's positions and the head, inside the
    student's own forward: what wraps the model (DDP, FSDP) sees an ordinary one.

    Args:
        model: wrapped or not, with a forward that takes `distill`.
        transform: what it does behind its head.
    """
    def distill(student: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Any:
        with autocast():
            hidden = answer_hidden(student, inputs, batch["student_mask"])
            return at_head(student, transform, hidden, compute)

    return model(**batch["student_inputs"], distill=distill)


@torch.no_grad()
def find_logit_transform(
    model: Any, inputs: Mapping[str, Tensor], mask: Tensor
) -> LogitTransform | None:
    """What the model does between its head and its logits; None if it is not known here.

    Of what its configuration may mean, that which comes nearest to the model's own logits at a few
    positions. Under autocast both are computed in its type: the caller opens it around the call,
    and a forward that accelerate has wrapped opens the same. Moves no random state.

    Args:
        model: under FSDP as it is wrapped, with a forward that takes `distill`.
        inputs, mask: as for `answer_logits`, on any device.
    """
    plain = unwrap(model)
    device = next(plain.get_output_embeddings().parameters()).device
    mask = mask.clone()
    places = mask.nonzero()[CHECKED_POSITIONS:]
    mask[places[:, 0], places[:, 1]] = False
    inputs, mask = {key: x.to(device) for key, x in inputs.items()}, mask.to(device)
    kind = device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    allowed, errors = 0.0, dict[LogitTransform, float]()

    def compare(plain: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
        nonlocal allowed
        hidden = answer_hidden(plain, inputs, mask)
        allowed = ALLOWED.get(dtype or hidden.dtype, ALLOWED_HALF)
        for transform in known_logit_transforms(plain.config.get_text_config()):
            with torch.autocast(kind, enabled=False):
                logits = at_head(plain, transform, hidden,
                                 lambda hidden, head: head.open(dtype=dtype).logits(hidden))
            errors[transform] = _error(logits.float(), own.float())
        return hidden

    with evaluation_mode(model):
        own = answer_logits(model, inputs, mask)
        sharded = isinstance(model, FSDPModule)
        if sharded:  # its weights are there for its own forward alone
            model(**inputs, distill=compare)
        else:
            compare(plain, inputs)
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
