"""The one place where a model's forward is called."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

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
    """What `kind`'s forward names of a processor's inputs, and no cache: with one, records in one
    row are not told apart, and so it is said to forwards that only pass it on, too."""
    names = forward_names(kind)
    accepted: dict[str, Any] = {key: value for key, value in inputs.items() if key in names}
    packed = "position_ids" in inputs and inputs.get("attention_mask") is None
    return {**accepted, "use_cache": False} if packed or "use_cache" in names else accepted


class Answered(NamedTuple):
    """What a forward has given already, as {"answered": this} in the place of a model's inputs.

    hidden: [N, H] at the predicting positions, if it is known. logits: makes [N, V] of it.
    """

    hidden: Tensor | None
    logits: Callable[[], Tensor]


def answer_logits(model: nn.Module, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
    """Logits at the predicting positions only; the head never runs on the others.

    The model's own forward is called, so scaling and softcapping behind the head are its own.

    Args:
        model: a transformers model, wrapped or not.
        inputs: what the processor gave; keys the model does not name are left out. Or an Answered.
        mask: [B, T] bool, True where the next token is to be predicted.

    Returns:
        [number of True, V], rows in row-major order of the mask.
    """
    if isinstance(answered := inputs.get("answered"), Answered):
        return answered.logits()
    kind = type(unwrap(model))
    accepted = _accepted(kind, inputs)
    if "logits_to_keep" in forward_names(kind):
        return model(**accepted, logits_to_keep=mask).logits
    return model(**accepted).logits[mask]


def ending_logits(
    model: nn.Module, inputs: Mapping[str, Tensor], mask: Tensor, start: int, endings: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of one conversation and at other endings of it, which go on from its cache.

    Args:
        inputs, mask: of the one conversation, as for `answer_logits`.
        start: how many of its tokens all endings share.
        endings: [K, W] tokens from there on, padded on the right, where nothing looks at.

    Returns:
        What `answer_logits` gives, and [K, W, V]. Not every family can go on from a cache with
        several rows: its own ending should be among them, and be compared.
    """
    names = forward_names(type(unwrap(model)))
    accepted = {key: value for key, value in inputs.items() if key in names}
    some = {"logits_to_keep": mask} if "logits_to_keep" in names else {}
    kept = "cache" if "cache" in names else "past_key_values"  # until transformers 5.24
    given = model(**accepted, **some, use_cache=True)
    cache = given[kept]
    cache.crop(start - inputs["input_ids"].shape[1])  # so many fewer
    cache.batch_repeat_interleave(len(endings))
    ended = model(input_ids=endings, use_cache=True, **{kept: cache}).logits
    return given.logits if some else given.logits[mask], ended


def answer_hidden(model: PreTrainedModel, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
    """What the head would be given at the predicting positions: [number of True, H].

    Args:
        model: a transformers model without wrappers.
        inputs, mask: as for `answer_logits`.
    """
    if isinstance(answered := inputs.get("answered"), Answered):
        assert answered.hidden is not None
        return answered.hidden
    accepted = _accepted(type(model.base_model), inputs)
    return model.base_model(**accepted).last_hidden_state[mask]


def accept_distill(model: PreTrainedModel) -> None:
    """Let this instance's forward take `distill`, a function of the model and its inputs.

    With it, forward returns what the function returns; without, it is what it was (`generate` and
    saving do not notice). Calling it twice changes nothing.
    """
    original = model.forward
    if getattr(original, "accepts_distill", False):
        return

    @functools.wraps(original)
    def forward(*args: Any, distill: Any = None, **inputs: Any) -> Any:
        return original(*args, **inputs) if distill is None else distill(model, inputs)

    forward.accepts_distill = True  # type: ignore[attr-defined]
    model.forward = forward  # type: ignore[method-assign]
