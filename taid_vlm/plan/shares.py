"""What lies on each device of a student that is sharded over processes: FSDP2, or ZeRO's stages.

FSDP2 splits every tensor along its first dimension; ZeRO flattens them. Sizes are those of a
device that has most, where they cannot be split evenly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taid_vlm.config.recipe import Recipe
from taid_vlm.models.parts import decoder_layers
from taid_vlm.models.quantization import bytes_of

OPTIMIZER, GRADIENTS, PARAMETERS = 1, 2, 3  # ZeRO's stages by what each is the first to split
BUCKET, LIVE = 500_000_000, 1_000_000_000  # DeepSpeed's defaults, in numbers


@dataclass(frozen=True)
class Shares:
    """How a student is spread.

    stage: as ZeRO counts them; FSDP splits all three. half: what is computed with is in 16 bits.
    keeps: gathered weights stay until backward. accumulates: whole gradients stay until the last
    micro-batch. zero: DeepSpeed's `zero_optimization`, None under FSDP.
    """

    processes: int
    stage: int
    half: bool
    keeps: bool = False
    accumulates: bool = False
    zero: Mapping[str, Any] | None = None

    def parameters(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Of each parameter what stays here, without values. accelerate has FSDP keep what is
        trained in float32; DeepSpeed's own copies in float32 belong to its optimizer."""
        return self._pieces(parameters, PARAMETERS, float32=self.zero is None and self.half)

    def gradients(self, trained: Iterable[Tensor]) -> list[Tensor]:
        return self._pieces(trained, GRADIENTS, float32=self.zero is None and self.half)

    def updated(self, trained: Iterable[Tensor]) -> list[Tensor]:
        """What the optimizer here updates: under DeepSpeed a copy in float32."""
        return self._pieces(trained, OPTIMIZER, float32=self.zero is not None or self.half)

    def master(self, trained: Iterable[Tensor]) -> int:
        """Bytes of DeepSpeed's copy of what is trained, which it keeps with the optimizer's."""
        return 0 if self.zero is None else bytes_of(self.updated(trained))

    def gathered(self, model: nn.Module) -> int:
        """Bytes of weights that are whole while they are computed with: all that is no layer, a
        layer and the next one; under ZeRO-3 as many as it may keep alive, if that is more."""
        if self.stage < PARAMETERS:
            return 0
        whole, some = self._computed(model, list(model.parameters()))
        if self.zero is not None:
            live = _number(self.zero.get("stage3_max_live_parameters"), LIVE)
            return min(whole, max(some, live * (2 if self.half else 4)))
        return whole if self.keeps else some

    def unreduced(self, model: nn.Module) -> int:
        """Bytes of gradients that are not yet those of all processes: under ZeRO a bucket (two
        where they overlap), under FSDP of the same as is gathered, or of everything."""
        trained = [p for p in model.parameters() if p.requires_grad]
        whole, some = self._computed(model, trained)
        if self.zero is not None:
            bucket = _number(self.zero.get("reduce_bucket_size"), BUCKET)
            return min(whole, bucket * (2 if self.half else 4)) * (
                2 if self.zero.get("overlap_comm") else 1)
        return whole if self.accumulates else some

    def _computed(self, model: nn.Module, parameters: Sequence[Tensor]) -> tuple[int, int]:
        """Bytes of parameters as they are computed with: of all, and of those at a time."""
        known = {id(p) for p in parameters}

        def size(of: Iterable[Tensor]) -> int:
            return sum(p.numel() * (2 if self.half else p.element_size())
                       for p in of if id(p) in known)

        layers = [size(layer.parameters()) for layer in decoder_layers(model)] or [0]
        whole = size(parameters)
        return whole, min(whole, whole - sum(layers) + 2 * max(layers))

    def _pieces(self, parameters: Iterable[Tensor], stage: int, float32: bool) -> list[Tensor]:
        number = self.processes if self.stage >= stage else 1
        shapes = [(p, p.shape if self.zero is None else (p.numel(),)) for p in parameters]
        return [torch.empty((-(-shape[0] // number), *shape[1:]), device="meta",
                            dtype=self._dtype(p, float32)) for p, shape in shapes]

    def _dtype(self, p: Tensor, float32: bool) -> torch.dtype:
        if float32 and p.requires_grad:
            return torch.float32
        return torch.bfloat16 if self.half and self.zero is not None else p.dtype


def shares_of(recipe: Recipe, processes: int) -> Shares | None:
    """How `train.fsdp` or `train.deepspeed` spread the recipe's student; None: they do not."""
    train = recipe.train
    half = bool(train.get("bf16") or train.get("fp16"))
    if train.get("deepspeed"):
        zero = _settings(train["deepspeed"]).get("zero_optimization") or {}
        return Shares(processes, int(zero.get("stage", 0)), half, zero=zero)
    if not train.get("fsdp") or processes == 1:
        return None
    fsdp = _settings(train.get("fsdp_config"))
    reshards = fsdp.get("reshard_after_forward", True)
    synced = _settings(train.get("accelerator_config")).get("gradient_accumulation_kwargs") or {}
    return Shares(
        processes, PARAMETERS, half,
        keeps=str(reshards).lower() == "false" or "shard_grad_op" in str(train["fsdp"]),
        accumulates=train.get("gradient_accumulation_steps", 1) > 1
        and not synced.get("sync_each_batch"))


def offloads(recipe: Recipe) -> bool:
    """Whether shares lie in the memory of the host."""
    train = recipe.train
    zero = _settings(train.get("deepspeed")).get("zero_optimization") or {}
    return "offload" in str(train.get("fsdp")) or bool(
        _settings(train.get("fsdp_config")).get("cpu_offload")) or any(
        (zero.get(key) or {}).get("device", "none") != "none"
        for key in ("offload_optimizer", "offload_param"))


def _settings(value: Any) -> Mapping[str, Any]:
    """A mapping, or a file (or text) of one; transformers takes keys with `fsdp_` before, too."""
    if isinstance(value, str):
        value = json.loads(value if value.startswith("{") else Path(value).read_text("utf-8"))
    return {key.removeprefix("fsdp_"): one for key, one in (value or {}).items()}


def _number(value: Any, default: int) -> int:
    return int(value) if isinstance(value, int | float) else default
