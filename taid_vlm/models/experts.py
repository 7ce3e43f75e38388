"""Mixtures of experts: where a model's routers are, how they are balanced, what a token uses."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from taid_vlm.models.forward import unwrap

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def routers_of(model: Any) -> list[tuple[nn.Module, int]]:
    """Every router of a model in order of its layers, and where its logits stand in what it gives.

    Read off transformers' own record of what a model can hand out.
    """
    routers: dict[nn.Module, int] = {}
    for part in unwrap(model).modules():
        records = getattr(part, "_can_record_outputs", None) if isinstance(
            part, PreTrainedModel) else None
        listed = (records or {}).get("router_logits", ())
        for record in listed if isinstance(listed, (list, tuple)) else (listed,):
            kind: Any = getattr(record, "target_class", record)
            for name, module in part.named_modules():
                where = getattr(record, "layer_name", None) or ""
                if isinstance(module, kind) and where in name:
                    routers[module] = getattr(record, "index", 0)
    return list(routers.items())


def balance_weight(config: Any) -> float | None:
    """What a family's pre-training multiplies its router loss by; None where it has no such loss
    (dense models, and DeepSeek-V3, whose pre-training moves biases instead)."""
    return getattr(config.get_text_config(), "router_aux_loss_coef", None)


def chosen_experts(config: Any) -> tuple[int, int] | None:
    """How many experts a token is sent to, and of how many; None for dense models."""
    text = config.get_text_config()
    number = next((n for name in EXPERTS if (n := getattr(text, name, None))), None)
    chosen = getattr(text, "num_experts_per_tok", None)
    return None if number is None or chosen is None else (chosen, number)


def parameters_per_token(model: Any) -> int:
    """Parameters that one token passes: of the routed experts only those it is sent to."""
    plain = unwrap(model)
    total = sum(p.numel() for p in plain.parameters())
    experts = chosen_experts(plain.config)
    if experts is None:
        return total
    chosen, number = experts
    routed = sum(p.numel() for name, p in plain.named_parameters()
                 if ".experts." in name and p.ndim and p.shape[0] == number)
    return total - routed * (number - chosen) // number
