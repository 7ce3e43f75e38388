"""The load of a student's experts as a term: what it is, and that no split of a step changes it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training.runs import make_trainer, weights
from training.test_invariance import in_processes, relative
from zoo import build

from taid_vlm.errors import TaidError
from taid_vlm.models.experts import chosen_experts, parameters_per_token, routers_of
from taid_vlm.training.router import LOAD_FILE, check_router

TERMS = {"terms": [{"name": "taid"}, {"name": "router", "weight": 0.5}]}
# Two steps, for the first has even shares and so no gradient; plain descent, so that what is left
# of the weights shows both gradients.
RUN: dict[str, Any] = {
    "objective": TERMS, "student": "qwen3_moe", "teacher": "qwen2", "max_steps": 2,
    "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
    "kinds": ["text"]}
TOLERANCE = 1e-5
MOE = {"qwen3_moe": 2, "mixtral": 2, "gpt_oss": 2, "deepseek_v3": 1, "qwen3_vl_moe": 2}


def trained(output: Path, **options: Any) -> dict[str, Tensor]:
    trainer = make_trainer(output, **{**RUN, **options})
    before = weights(trainer)
    trainer.train()
    return {name: before[name] - after for name, after in weights(trainer).items()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return trained(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("family", MOE)
def test_every_router_is_known(family: str) -> None:
    model = build(family).model
    routers = routers_of(model)
    assert len(routers) == MOE[family]
    inputs = {"input_ids": torch.arange(12).reshape(2, 6) + 20}
    outputs: list[Tensor] = []
    for module, index in routers:
        module.register_forward_hook(lambda m, a, out, i=index: outputs.append(out[i]))
    experts = {"qwen3_moe": 4, "deepseek_v3": 8}.get(family, 4)
    with torch.no_grad():
        model(**inputs)
    assert [tuple(x.shape) for x in outputs] == [(12, experts)] * MOE[family]


def test_the_term_is_what_its_formula_says(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **{**RUN, "max_steps": 1})
    term, model = trainer.router, trainer.model
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(5)])
    inputs = batch["student_inputs"]
    with term.watch():
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    term.load = torch.tensor([[1.0, 0.5, 0.25, 0.25], [0.0, 1.5, 0.5, 0.0]])
    found = term.losses(batch)
    out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                output_router_logits=True)
    mask = inputs["attention_mask"].bool().flatten()
    wanted, counts = torch.zeros(int(mask.sum()), dtype=torch.float64), torch.zeros(2, 4)
    for layer, logits in enumerate(out.router_logits):
        law = logits.detach().double()[mask].softmax(-1)
        wanted += 4 / 2 * (law * term.load[layer].double()).sum(-1)
        for row in law:
            counts[layer, row.topk(2).indices] += 1
    torch.testing.assert_close(found.detach().double(), wanted, rtol=1e-5, atol=1e-6)
    assert not mask.all()  # padding is not counted
    term.finish_step(applied=True)
    torch.testing.assert_close(term.load, counts * 2 / counts.sum(-1, keepdim=True))
    with term.watch():
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    term.losses(batch)
    term.load = torch.full((2, 4), 0.5)
    term.finish_step(applied=False)  # a step that was not applied leaves no trace
    assert torch.equal(term.load, torch.full((2, 4), 0.5))


@pytest.mark.parametrize("options", [
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    {"padding_side": "left"},
    {"loss_implementation": "reference"},
    {"gradient_checkpointing": True,
     "gradient_checkpointing_kwargs": {"use_reentrant": False}},
], ids=["2 x 4", "1 x 8", "left", "reference", "checkpointing"])
def test_no_split_changes_the_gradient(
    options: dict[str, Any], reference: dict[str, Tensor], tmp_path: Path
) -> None:
    assert relative(reference, trained(tmp_path, **options)) < TOLERANCE


def test_two_processes_give_the_gradient_of_one(
    reference: dict[str, Tensor], tmp_path: Path
) -> None:
    options = {**RUN, "per_device_train_batch_size": 4}
    in_processes(2, tmp_path, pair=options)
    before = weights(make_trainer(tmp_path / "one", **RUN))
    after = load_file(tmp_path / "pair" / "final.safetensors")
    assert relative(reference, {key: before[key] - after[key] for key in before}) < TOLERANCE


def test_it_evens_the_load_and_is_logged(tmp_path: Path) -> None:
    def imbalance(weight: float) -> tuple[float, list[dict[str, float]]]:
        objective = {"terms": [{"name": "ce"}, {"name": "router", "weight": weight}]}
        trainer = make_trainer(tmp_path / str(weight), **{
            **RUN, "objective": objective, "max_steps": 100, "optim": "adamw_torch",
            "learning_rate": 3e-3, "logging_steps": 10})
        trainer.train()
        return float((trainer.router.load - 0.5).abs().mean()), trainer.state.log_history

    weak, _ = imbalance(1e-6)
    strong, history = imbalance(1.0)
    assert strong < 0.6 * weak
    logged = [entry["loss/router"] for entry in history if "loss/router" in entry]
    assert logged[-1] == pytest.approx(2.0, abs=0.1)  # top 2, evenly spread
    assert logged[-1] < logged[0]


def test_resuming_is_bit_for_bit(tmp_path: Path) -> None:
    options = {**RUN, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "dropout": 0.1}
    whole, resumed = (make_trainer(tmp_path / "whole", **options) for _ in range(2))
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    (checkpoint / LOAD_FILE).unlink()
    with pytest.raises(TaidError, match=f"holds no {LOAD_FILE}"):
        make_trainer(tmp_path / "again", **options).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(("student", "message"), [
    ("qwen2", "qwen2 has none"), ("deepseek_v3", "not for deepseek_v3, which balances")])
def test_a_student_without_such_routers_is_refused(
    student: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TaidError, match=message):
        make_trainer(tmp_path, **{**RUN, "student": student})


@pytest.mark.parametrize(("family", "hint"), [
    ("qwen3_moe", "2 of 4 experts.*weight: 0.001"), ("mixtral", "weight: 0.001"),
    ("qwen3_vl_moe", "2 of 4 experts"), ("deepseek_v3", ""), ("qwen2", "")])
def test_a_missing_term_is_named(family: str, hint: str) -> None:
    said = check_router(0.0, build(family).model)
    assert re.search(hint, said) if hint else said == ""


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3", "llama"])
def test_parameters_that_a_token_passes(family: str) -> None:
    """Counted by hand: those whose gradient one token moves."""
    model = build(family).model
    model(input_ids=torch.tensor([[30]])).logits.sum().backward()
    per_token, experts = 0, chosen_experts(model.config)
    for name, p in model.named_parameters():
        if ".experts." in name and experts and p.shape[0] == experts[1]:
            per_token += int(p.grad.flatten(1).any(-1).sum()) * p[0].numel()
        else:
            per_token += p.numel()
    assert parameters_per_token(model) == per_token
    assert (per_token < sum(p.numel() for p in model.parameters())) == (family != "llama")
