"""A teacher in two processes, however it lies there and however its student is trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from training.placed import run
from zoo import build, save

from taid_vlm.config.model import TeacherSpec
from taid_vlm.errors import TaidError
from taid_vlm.models.loading import load_model
from taid_vlm.models.quantization import bytes_of
from taid_vlm.plan.shares import Shares
from taid_vlm.plan.sizes import optimizer_bytes
from taid_vlm.teachers import LocalTeacher
from taid_vlm.teachers.placement import begins_on, check_sharding

TOLERANCE = 1e-5
NOT_FIGURES = ("runtime", "second", "total_flos", "train_loss")  # the last: of one process
ZERO = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
# nothing stays whole between two uses, as little as a small model's weights otherwise do
LEAN = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


def in_two(folder: Path, **runs: dict[str, Any]) -> Path:
    """Carry out runs with batches of 4 in two processes, one run after the other."""
    listed = {name: {"per_device_train_batch_size": 4, **options} for name, options in runs.items()}
    (folder / "runs.json").write_text(json.dumps(listed))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(Path(__file__).with_name("placed.py")), str(folder / "runs.json")],
        capture_output=True, text=True, timeout=500, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Batches of 8 in this process, records with and without images."""
    folder = tmp_path_factory.mktemp("one")
    run(folder, "mixed", {})
    return folder


def assert_same(one: Path, two: Path) -> dict[str, Any]:
    """The same weights, losses, held-out figures and canaries; returns what lay where."""
    whole, other = (load_file(path.with_suffix(".safetensors")) for path in (one, two))
    assert whole.keys() == other.keys()
    assert max(float((whole[key] - other[key]).abs().max()) for key in whole) < TOLERANCE
    first, second = (json.loads(path.with_suffix(".json").read_text()) for path in (one, two))
    assert second["processes"] == 2
    assert second["loss"] == "fused"
    for a, b in zip(first["log"], second["log"], strict=True):
        figures = {key: value for key, value in a.items() if isinstance(value, int | float)
                   and not any(part in key for part in NOT_FIGURES)}
        assert figures
        assert {key: b[key] for key in figures} == pytest.approx(figures, rel=1e-4, abs=1e-5)
    return second


def assert_half_here(lies: dict[str, Any], mesh: str) -> None:
    assert lies["meshes"] == [f"{mesh} 2"]
    assert lies["numbers"] / 2 <= lies["here"] < lies["numbers"] * 0.52


def assert_teacher_sharded(lies: dict[str, Any]) -> None:
    """Over a mesh of its own, its head whole."""
    assert lies["whole"] == ["lm_head.weight"]
    assert lies["head"] == "Linear Parameter"
    assert lies["trained"] == 0
    assert_half_here(lies, "('teacher',)")


def test_under_ddp(one: Path, tmp_path: Path) -> None:
    """Some batches have images and some have none, and processes evaluate unequal numbers."""
    two = in_two(tmp_path, fsdp={"teacher_sharding": "fsdp"}, tensor={"teacher_sharding": "tensor"})
    assert_teacher_sharded(assert_same(one / "mixed", two / "fsdp")["teacher"])
    split = assert_same(one / "mixed", two / "tensor")["teacher"]
    assert {name.rpartition("_proj")[0].rpartition(".")[2] for name in split["spread"]} == {
        "", "q", "k", "v", "o", "gate", "up", "down"}  # "": the embeddings
    assert split["head"] == "Linear Parameter"
    assert split["here"] == split["numbers"] / 2


def test_under_fsdp(one: Path, tmp_path: Path) -> None:
    half = {"fsdp": True, "bf16": True, "optim": "adamw_torch", "learning_rate": 1e-3}
    two = in_two(tmp_path, run={"fsdp": True, "teacher_sharding": "fsdp"}, half=half)
    found = assert_same(one / "mixed", two / "run")
    assert found["kind"] == "FSDP"
    assert_teacher_sharded(found["teacher"])
    assert_half_here(found["student"], "None")
    assert_planned(json.loads((two / "half.json").read_text())["bytes"])


def assert_planned(weighed: dict[str, int]) -> None:
    """What a plan counts of the student on each of two devices, in bf16."""
    model, shares = build("llava", seed=1).model, Shares(2, 3, half=True)
    own = list(model.parameters())
    state, _ = optimizer_bytes("adamw_torch", shares.updated(own))
    planned = {"parameters": bytes_of(shares.parameters(own)), "optimizer": state,
               "gradients": bytes_of(shares.gradients(own))}
    assert weighed == pytest.approx(planned, rel=0.02)
    assert planned["parameters"] == pytest.approx(bytes_of(own) / 2, rel=0.02)


@pytest.mark.slow
def test_whole_under_fsdp(one: Path, tmp_path: Path) -> None:
    found = assert_same(one / "mixed", in_two(tmp_path, run={"fsdp": True}) / "run")
    assert found["kind"] == "FSDP"
    assert found["teacher"]["spread"] == []
    assert_half_here(found["student"], "None")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["replicate", "fsdp", "tensor"])
@pytest.mark.parametrize("stage", [2, 3])
def test_under_zero(stage: int, sharding: str, one: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    zero = {**ZERO, "zero_optimization": LEAN if stage == 3 else {"stage": stage}}
    found = assert_same(one / "mixed", in_two(tmp_path, run={
        "deepspeed": zero, "teacher_sharding": sharding}) / "run")
    assert found["kind"] == "DEEPSPEED"
    assert bool(found["teacher"]["spread"]) == (sharding != "replicate")


# ----- one process --------------------------------------------------------------------------

PARTS = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")


@pytest.mark.parametrize("place", ["cpu", "auto", "disk"])
def test_a_teacher_elsewhere_says_the_same(place: str, tmp_path: Path) -> None:
    folder = str(save(build("llama"), tmp_path / "llama"))
    plain = load_model(TeacherSpec(model_name_or_path=folder), "teacher")
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"teacher_inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
             "teacher_mask": torch.ones_like(ids, dtype=torch.bool), "teacher_labels": ids.view(-1)}
    if place == "disk":  # layer and head are fetched where they are used, as offloaded ones are
        device_map = dict.fromkeys([*PARTS, "model.layers.1"], "cpu")
        device_map |= {"model.layers.0": "disk", "lm_head": "disk"}
        spec = TeacherSpec(model_name_or_path=folder, init_kwargs={
            "device_map": device_map, "offload_folder": str(tmp_path / "offloaded")})
    else:
        spec = TeacherSpec(model_name_or_path=folder, devices=place)
    model = load_model(spec, "teacher")
    offloaded = {name for name, p in model.named_parameters() if p.device.type == "meta"}
    assert ("lm_head.weight" in offloaded) == (place == "disk")
    here, there = LocalTeacher(plain), LocalTeacher(model, Accelerator(cpu=True))
    assert torch.equal(there.logits(batch), here.logits(batch))
    signal, expected = there.hidden(batch), here.hidden(batch)
    assert signal is not None and expected is not None
    assert torch.equal(signal.hidden, expected.hidden)
    assert torch.equal(signal.head.weight, expected.head.weight)
    assert begins_on(model) == torch.device("cpu")
    assert model.generate(ids, max_new_tokens=3).equal(plain.generate(ids, max_new_tokens=3))


@pytest.mark.parametrize(("family", "sharding", "processes", "problem"), [
    ("gpt2", "tensor", 2, "has no plan"), ("llama", "tensor", 7, "cannot share evenly"),
])
def test_what_cannot_be_sharded_is_refused_by_name(
    family: str, sharding: str, processes: int, problem: str
) -> None:
    model = build(family).model
    with pytest.raises(TaidError, match=problem) as refused:
        check_sharding(model, sharding, processes)
    assert family in str(refused.value)
    assert "fsdp" in str(refused.value)
