"""Bytes that can be counted: parameters, gradients and what an optimizer keeps of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from taid_vlm.errors import TaidError

# bitsandbytes and torchao keep small tensors in 32 bits, the others in blocks with a scale each
SMALL, BLOCK = 4096, 256
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
          "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes of "24GB" (10^9), "24GiB" (2^30), "24 g" or "80e9".

    Raises:
        TaidError: anything else, or nothing above 0.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]{1,2})?)\s*([kmgt]?|[kmgt]i)b?\s*",
                         text.lower())
    size = 0 if match is None else int(float(match[1]) * _UNITS[match[2]])
    if size < 1:
        raise TaidError(f"--memory = '{text}', but it must be a size like 24GB, 24GiB or 80e9.")
    return size


# ----- optimizers ---------------------------------------------------------------------------

Size = Callable[[Tensor], float]


def _own(states: float) -> Size:
    """So many tensors like the parameter, in its dtype."""
    return lambda p: states * p.numel() * p.element_size()


def _full(states: float) -> Size:
    """So many tensors like the parameter, in float32."""
    return lambda p: states * p.numel() * 4


def _blocks(states: int, bits: int = 8, block: int = BLOCK) -> Size:
    return lambda p: states * (p.numel() * (bits / 8 + 4 / block) if p.numel() >= SMALL
                               else p.numel() * 4)


def _factored(p: Tensor) -> float:
    """Adafactor: a row and a column of second moments per matrix."""
    if p.ndim < 2:
        return p.numel() * 4
    return 4 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2])


_NOTHING = _own(0)


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer keeps per parameter, and needs beside it while it steps.

    state: bytes kept. scratch: bytes of one tensor while it is updated.
    all_at_once: on a GPU all tensors are updated together, so scratch counts for all of them.
    embedding: bytes kept of parameters that embed tokens, where that is not the same (transformers
        asks bitsandbytes for 32 bits there).
    """

    state: Size
    scratch: Size = _NOTHING
    all_at_once: bool = False
    embedding: Size | None = None


_ADAM_8BIT = Optimizer(_blocks(2), embedding=_full(2))
_LION_8BIT = Optimizer(_blocks(1), embedding=_full(1))
_ADEMAMIX_8BIT = Optimizer(_blocks(3), embedding=_full(3))
OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw_torch": Optimizer(_own(2), _own(1), all_at_once=True),
    "adamw_torch_fused": Optimizer(_own(2)),
    "adamw_torch_xla": Optimizer(_own(2)),
    "adamw_torch_npu_fused": Optimizer(_own(2)),
    "adamw_torch_8bit": Optimizer(_blocks(2)),
    "adamw_torch_4bit": Optimizer(_blocks(2, bits=4, block=128)),
    "adamw_bnb_8bit": _ADAM_8BIT, "adamw_8bit": _ADAM_8BIT, "paged_adamw_8bit": _ADAM_8BIT,
    "paged_adamw_32bit": Optimizer(_full(2)),
    "adafactor": Optimizer(_factored, _full(2)),
    "sgd": Optimizer(_NOTHING),
    "adagrad": Optimizer(_own(1), _own(1), all_at_once=True),
    "rmsprop": Optimizer(_own(1), _own(1), all_at_once=True),
    "rmsprop_bnb": Optimizer(_full(1)), "rmsprop_bnb_32bit": Optimizer(_full(1)),
    "rmsprop_bnb_8bit": _LION_8BIT,
    "lion_32bit": Optimizer(_full(1)), "paged_lion_32bit": Optimizer(_full(1)),
    "lion_8bit": _LION_8BIT, "paged_lion_8bit": _LION_8BIT,
    "ademamix": Optimizer(_full(3)), "paged_ademamix_32bit": Optimizer(_full(3)),
    "ademamix_8bit": _ADEMAMIX_8BIT, "paged_ademamix_8bit": _ADEMAMIX_8BIT,
    "schedule_free_adamw": Optimizer(_own(2)), "schedule_free_sgd": Optimizer(_own(1)),
    "stable_adamw": Optimizer(_own(2)),
}
UNKNOWN = OPTIMIZERS["adamw_torch"]


def optimizer_bytes(
    name: str, parameters: Iterable[Tensor], embeddings: Iterable[Tensor] = (), gpu: bool = True,
    momentum: bool = False,
) -> tuple[int, int]:
    """What an optimizer of transformers' `optim` keeps, and what it needs beside that in a step.

    Args:
        parameters: that are trained.
        embeddings: those among them that embed tokens.
        gpu: whether tensors are updated together, as on a GPU, or one after the other.
        momentum: of "sgd".
    """
    kind, embedding = OPTIMIZERS.get(name, UNKNOWN), {id(p) for p in embeddings}
    parameters = list(parameters)
    state = sum((kind.embedding if kind.embedding and id(p) in embedding else kind.state)(p)
                for p in parameters)
    if name == "sgd" and momentum:
        state += sum(_own(1)(p) for p in parameters)
    scratch = [kind.scratch(p) for p in parameters]
    together = kind.all_at_once and gpu
    return int(state), int((sum if together else max)(scratch) if scratch else 0)

