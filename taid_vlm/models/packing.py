"""Several records in one row, without padding, told apart by positions that start again.

transformers finds such rows by their positions where there is no attention mask and no cache, and
no record then sees another: in attention. What carries over from token to token otherwise (a
convolution, a state) knows of no positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from taid_vlm.adapters.encoded import PER_TOKEN
from taid_vlm.models.forward import evaluation_mode, forward_names, unwrap

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
# measured (transformers 5.23 and 5.24) where configurations say nothing of it
UNTOLD = {
    "gemma3": "its mask of images counts every record's tokens from the first record's",
    "gpt_oss": "its attention mask does not look at positions",
    "paligemma": "in transformers 5.23 its mask of prefixes mixes them",
}
CHECKED = 64  # predicting positions that are compared


def packed(
    model: nn.Module, inputs: Mapping[str, Tensor], mask: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Padded inputs of B rows as those of one row, and the mask of predicting positions [B, T] as
    [1, n], its True ones in the same order.

    Images stay as they are: every family takes them in the order of their tokens.
    """
    keep = inputs["attention_mask"].bool()
    row = {name: x[keep][None] if name in PER_TOKEN else x for name, x in inputs.items()
           if name != "attention_mask"}
    return {**row, "position_ids": _positions(model, inputs, keep)}, mask[keep][None]


def _positions(model: nn.Module, inputs: Mapping[str, Tensor], keep: Tensor) -> Tensor:
    """[1, n]; of a model with positions in images [4, 1, n], those in the text first."""
    text = (keep.cumsum(-1) - 1)[keep][None]
    find = getattr(unwrap(model).base_model, "get_rope_index", None)
    if find is None:
        return text
    names = inspect.signature(find).parameters
    known = {name: x for name, x in inputs.items() if name in names}
    if not any(name.endswith("grid_thw") for name in known):
        return text.expand(4, 1, -1)
    in_images, _ = find(**known)
    return torch.cat([text[None], in_images[:, keep][:, None].to(text)])


def fed_tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    """Which tokens of a model's inputs are no padding, [B, T]: of a packed row all."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]) if mask is None else mask


# ----- attention ----------------------------------------------------------------------------

BY_RECORD = "sdpa_by_record"


def attend_by_record(model: nn.Module) -> None:
    """Have the language model of a packed row compute attention record by record, where it has sdpa
    on a CPU: sdpa over the whole row computes all of its squares, and masks those between records.
    Rows that are not packed are computed as before."""
    decoder = unwrap(model).get_decoder()
    device = next(decoder.parameters()).device.type
    if device == "cpu" and decoder.config._attn_implementation == "sdpa":
        decoder.config._attn_implementation = BY_RECORD


def _by_record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa (heads [1, heads, n, d] in, [1, n, heads, d] out) of every record alone:
    its own part of the row's mask, whatever the model makes of that."""
    cuts = _cuts(options.get("position_ids"), query, key, attention_mask)
    if len(cuts) < 3 or options.get("position_bias") is not None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return out, None
    assert attention_mask is not None
    parts = [sdpa_attention_forward(
        module, *(x[:, :, start:end] for x in (query, key, value)),
        attention_mask[:, :, start:end, start:end], **options)[0] for start, end in pairwise(cuts)]
    return torch.cat(parts, 1), None


def _cuts(
    positions: Tensor | None, query: Tensor, key: Tensor, mask: Tensor | None
) -> list[int]:
    """Where a packed row's records begin, and its end; [] of anything else."""
    n = query.shape[2]
    if positions is None or mask is None or positions.shape != (1, n) or (
            mask.shape[-2:] != (n, n) or key.shape[2] != n):
        return []
    starts = (positions[0].diff() != 1).nonzero()[:, 0] + 1
    return [0, *starts.tolist(), n]


AttentionInterface.register(BY_RECORD, _by_record)
AttentionMaskInterface.register(BY_RECORD, sdpa_mask)


# ----- whether it is exact ------------------------------------------------------------------


def why_unpackable(model: Any) -> str:
    """What of a model, which may have no weights, is known to mix the records of a row, or not
    known to keep them apart; "" for nothing."""
    model = unwrap(model)
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - ATTENTION
    if kinds:
        return f"its layers of the kind '{min(kinds)}' may carry over from one record to the next"
    if any(isinstance(module, nn.Conv1d) for module in model.get_decoder().modules()):
        return "its convolutions carry over from one record to the next"
    if "position_ids" not in forward_names(type(model)):
        return "it takes no positions, by which the records of a row are told apart"
    return UNTOLD.get(model.config.model_type, "")


@torch.no_grad()
def packing_error(
    model: nn.Module, inputs: Mapping[str, Tensor], mask: Tensor,
    logits: Callable[[Mapping[str, Tensor], Tensor], Tensor],
) -> float:
    """The largest difference that packing makes to the logits at a few positions, over the largest
    logit. Moves no random state.

    Args:
        inputs, mask: padded, as for `answer_logits`, of at least two rows.
        logits: what gives [N, V] of inputs and mask.
    """
    places = mask.nonzero()
    some = places[:: -(-len(places) // CHECKED)]
    few = torch.zeros_like(mask)
    few[some[:, 0], some[:, 1]] = True
    with evaluation_mode(model):
        alone, together = logits(inputs, few).float(), logits(*packed(model, inputs, few)).float()
    return float((alone - together).abs().max() / alone.abs().max())
