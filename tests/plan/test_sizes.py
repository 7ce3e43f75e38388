"""What can be counted, against what torch allocates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from taid_vlm.errors import TaidError
from taid_vlm.models.quantization import bytes_of
from taid_vlm.plan.sizes import OPTIMIZERS, optimizer_bytes, parse_bytes


@pytest.mark.parametrize(("text", "size"), [
    ("24GB", 24e9), ("24 GB", 24e9), ("24gb", 24e9), ("24G", 24e9), ("24GiB", 24 * 2**30),
    ("24Gi", 24 * 2**30), ("80e9", 80e9), ("1.5 TB", 1.5e12), (".5MB", 5e5), ("512", 512),
    ("12 KiB", 12288), ("7B", 7),
])
def test_sizes_that_are_understood(text: str, size: float) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24 apples", "-1GB", "0", "0.1", "24GBB", "1,5GB",
                                  "iB", "24 G B", "nan", "1e400", "24ib"])
def test_sizes_that_are_not(text: str) -> None:
    with pytest.raises(TaidError, match=re.escape(f"--memory = '{text}'")):
        parse_bytes(text)


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(300, 40), nn.Linear(40, 500), nn.Linear(500, 8, bias=False))


def test_tied_weights_count_once() -> None:
    layers = model()
    first = bytes_of(layers.parameters())
    assert first == 4 * (300 * 40 + 40 * 500 + 500 + 500 * 8)
    head = nn.Linear(40, 300, bias=False)
    head.weight = layers[0].weight
    assert bytes_of([*layers.parameters(), *head.parameters()]) == first
    assert bytes_of([layers[0].weight, layers[0].weight[3:]]) == 4 * 300 * 40


@pytest.mark.parametrize(("optim", "arguments"), [
    ("adamw_torch", {}), ("adamw_torch_fused", {}), ("sgd", {}),
    ("sgd", {"optim_args": "momentum=0.9"}), ("adagrad", {}), ("rmsprop", {}), ("adafactor", {}),
])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_that_an_optimizer_keeps(
    optim: str, arguments: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    """Its counters of steps aside, which are a few bytes per tensor."""
    layers = model().to(dtype)
    args = TrainingArguments(str(tmp_path), optim=optim, use_cpu=True, **arguments)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, layers)
    if optim == "sgd" and arguments:
        options["momentum"] = 0.9
    optimizer = kind(layers.parameters(), **options)
    for p in layers.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = sum(value.nbytes for state in optimizer.state.values() for value in state.values()
               if isinstance(value, torch.Tensor) and value.numel() > 1)
    planned, _ = optimizer_bytes(optim, layers.parameters(), momentum=bool(arguments))
    assert planned == kept


def test_states_of_8_bits() -> None:
    """One byte per number and a float32 scale per 256; small tensors and embeddings in float32."""
    layers = model()
    embedding, weight, bias, last = layers.parameters()
    large = weight.numel() * 2 * (1 + 4 / 256)
    small = (bias.numel() + last.numel()) * 8
    for optim, embedded in (("adamw_bnb_8bit", 8), ("adamw_torch_8bit", 2 * (1 + 4 / 256))):
        planned, _ = optimizer_bytes(optim, layers.parameters(), embeddings=[embedding])
        assert planned == int(large + small + embedding.numel() * embedded)


def test_what_a_step_needs_beside_that() -> None:
    sizes = [4 * p.numel() for p in model().parameters()]
    for gpu, expected in ((True, sum(sizes)), (False, max(sizes))):
        assert optimizer_bytes("adamw_torch", model().parameters(), gpu=gpu)[1] == expected
    assert optimizer_bytes("adamw_torch_fused", model().parameters())[1] == 0


def test_every_optimizer_is_one_of_transformers() -> None:
    from transformers.training_args import OptimizerNames

    assert OPTIMIZERS.keys() <= {name.value for name in OptimizerNames}
