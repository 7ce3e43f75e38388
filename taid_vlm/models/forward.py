"""The one place where a model's forward is called."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn
from transformers import PreTrainedModel

Autocast: TypeAlias = Callable[[], contextlib.AbstractContextManager[Any]]


def unwrap(model: Any) -> Any:
    """The transformers model inside DDP, PEFT and torch.compile wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def head_rows(model: nn.Module) -> int:
    """Rows of the output head: the width of the model's logits."""
    head = unwrap(model).get_output_embeddings()
    return int(head.weight.shape[0])


def forward_names(kind: Any) -> frozenset[str]:
    """Names of forward's arguments; processors give more, and `generate` refuses what is more."""
    return frozenset(inspect.signature(kind.forward).parameters)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout inside; after it every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _accepted(kind: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `kind`'s forward names of a processor's inputs, and no cache."""
    names = forward_names(kind)
    accepted: dict[str, Any] = {key: value for key, value in inputs.items() if key in names}
    return {**accepted, "use_cache": False} if "use_cache" in names else accepted


def answer_logits(model: nn.Module, inputs: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """Logits at the predicting positions only; the head never runs on the others.

    The model's own forward is called, so scaling and softcapping behind the head are its own.

    Args:
        model: a transformers model, wrapped or not.
        inputs: what the processor gave; keys the model does not name are left out.
        mask: [B, T] bool, True where the next token is to be predicted.

    Returns:
        [number of True, V], rows in row-major order of the mask.
    """
    kind = type(unwrap(model))
    accepted = _accepted(kind, inputs)
    if "logits_to_keep" in forward_names(kind):
        return model(**accepted, logits_to_keep=mask).logits
    return model(**accepted).logits[mask]


def answer_hidden(model: PreTrainedModel, inputs: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """What the head would be given at the predicting positions: [number of True, H].

    Args:
        model: a transformers model without wrappers.
        inputs, mask: as for `answer_logits`.
    """
    accepted = _accepted(type(model.base_model), inputs)
    return model.base_model(**accepted).last_hidden_state[mask]
