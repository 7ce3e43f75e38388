"""What can be counted, against what torch allocates."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from zoo import build

from taid_vlm.config.recipe import parse_recipe
from taid_vlm.errors import TaidError
from taid_vlm.models.quantization import bytes_of
from taid_vlm.plan.shares import Shares, shares_of
from taid_vlm.plan.sizes import OPTIMIZERS, optimizer_bytes, parse_bytes, resident, sharded


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


def test_a_sharded_teacher_is_its_share_its_head_and_what_is_gathered() -> None:
    model = build("llama").model
    layer, head = bytes_of(model.model.layers[0].parameters()), bytes_of([model.lm_head.weight])
    base = bytes_of(model.parameters()) - head
    rest = base - layer * len(model.model.layers)
    buffers = resident(model) - base - head
    assert sharded(model, "fsdp", 4) == head + buffers + base // 4 + rest + 2 * layer
    norms = bytes_of(p for name, p in model.named_parameters() if "norm" in name)
    assert sharded(model, "tensor", 2) == head + buffers + norms + (base - norms) // 2


# ----- a sharded student --------------------------------------------------------------------


def of_zero(stage: int, **zero: Any) -> dict[str, Any]:
    return {"deepspeed": {"zero_optimization": {"stage": stage, **zero}}}


FEW = {"stage3_max_live_parameters": 0, "reduce_bucket_size": 1000}
# numbers that every parameter has on each of 4 devices, times bytes: weights, gradients, optimizer
STAGES = [
    ({"fsdp": True}, (1, 1, 2 * 1), 4), ({"fsdp": True, "bf16": True}, (1, 1, 2 * 1), 4),
    (of_zero(1), (4, 4, 3 * 1), 4), (of_zero(2), (4, 1, 3 * 1), 4), (of_zero(3), (1, 1, 3 * 1), 4),
    ({**of_zero(1), "bf16": True}, (4, 4, 6 * 1), 2),
    ({**of_zero(2), "bf16": True}, (4, 1, 6 * 1), 2),
    ({**of_zero(3), "bf16": True}, (1, 1, 6 * 1), 2),
]


def shares(processes: int = 4, **train: Any) -> Shares:
    return shares_of(parse_recipe({
        "student": "s", "data": {"train": "d.jsonl"}, "objective": "sft", "output_dir": "o",
        "train": train}), processes)


@pytest.mark.parametrize(("train", "quarters", "bytes_each"), STAGES)
def test_what_every_stage_leaves_of_a_student(
    train: dict[str, Any], quarters: tuple[int, ...], bytes_each: int
) -> None:
    own, spread = list(build("llama").model.parameters()), shares(**train)
    quarter = sum(p.numel() for p in own) // 4 * bytes_each
    state, _ = optimizer_bytes("adamw_torch", spread.updated(own))
    here = (bytes_of(spread.parameters(own)), bytes_of(spread.gradients(own)),
            state + spread.master(own))
    assert here == pytest.approx([n * quarter for n in quarters], rel=0.02)


@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_whole_for_as_long_as_it_is_computed_with(bf16: bool) -> None:
    model, each = build("llama").model, 2 if bf16 else 4
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    whole = sum(p.numel() for p in model.parameters())
    some = (whole - layer * (len(model.model.layers) - 2)) * each

    def both(**train: Any) -> tuple[int, int]:
        spread = shares(bf16=bf16, **train)
        return spread.gathered(model), spread.unreduced(model)

    assert both(fsdp=True) == (some, some)
    assert both(fsdp=True, fsdp_config={"reshard_after_forward": False}) == (whole * each, some)
    assert both(fsdp=True, gradient_accumulation_steps=2) == (some, whole * each)
    synced = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    assert both(fsdp=True, gradient_accumulation_steps=2, accelerator_config=synced) == (some, some)
    assert both(**of_zero(2, **FEW)) == (0, 1000 * each)
    assert both(**of_zero(2, **FEW, overlap_comm=True)) == (0, 2 * 1000 * each)
    assert both(**of_zero(3, **FEW)) == (some, 1000 * each)
    assert both(**of_zero(3)) == (whole * each, whole * each)  # smaller than what it may keep


def test_what_does_not_split_evenly_counts_as_where_most_is() -> None:
    odd = [nn.Parameter(torch.empty(5, 3)), nn.Parameter(torch.empty(2))]
    assert [tuple(p.shape) for p in shares(fsdp=True).parameters(odd)] == [(2, 3), (1,)]
    assert [p.numel() for p in shares(**of_zero(3)).parameters(odd)] == [4, 1]


def test_a_student_that_is_not_sharded(tmp_path: Path) -> None:
    assert shares() is None
    assert shares(1, fsdp=True) is None
    assert shares(2, parallelism_config={"tp_size": 2}) is None
    (tmp_path / "zero.json").write_text(json.dumps(of_zero(2)["deepspeed"]))
    assert shares(2, deepspeed=str(tmp_path / "zero.json")) == shares(2, **of_zero(2))
