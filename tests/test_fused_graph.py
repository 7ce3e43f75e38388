"""The fused objective as a node of a graph: what is around it, and what backward may do."""

import pytest
import torch
from fusing import (
    LEAVES,
    cast,
    error,
    errors,
    fuse,
    gradients,
    logits,
    naive,
    problem,
    textbook,
    total,
)
from torch.utils.checkpoint import checkpoint

from taid_vlm.errors import TaidError
from taid_vlm.objectives import parse_objective

SUM = {"terms": [{"name": "taid"}, {"name": "jsd", "weight": 0.4, "beta": 0.3},
                 {"name": "ce", "weight": 0.1}], "kd_temperature": 2.0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_upstream_gradient_multiplies_without_rounding(dtype, monkeypatch):
    """bfloat16 has no 0.37: rounding the factor would scale every gradient by 1.0012."""
    monkeypatch.setattr("taid_vlm.fused.divergence.SCALED_AT_ONCE", 20)
    objective, p = parse_objective(SUM), problem(dtype=dtype)
    plain = gradients(p, fuse(objective, p, t=0.3).loss)
    scaled = gradients(p, 0.37 * fuse(objective, p, t=0.3).loss)
    for name in LEAVES:
        factor = torch.tensor(0.37, dtype=torch.promote_types(dtype, torch.float32))
        assert torch.equal(scaled[name], (plain[name].to(factor.dtype) * factor).to(dtype))


def test_one_loss_in_two_places_of_a_sum():
    objective, p = parse_objective(SUM), problem(dtype=torch.float64)
    loss = fuse(objective, p, t=0.3).loss
    other = (p.hidden**2).sum() + p.weight.sum()
    got = gradients(p, 0.5 * loss + other * 2 + loss * 0.25 + 0 * p.bias.sum())
    _, want = naive(objective, p)
    assert error(got["hidden"], 0.75 * want["hidden"] + 4 * p.hidden.detach()) < 1e-12
    assert error(got["weight"], 0.75 * want["weight"] + 2) < 1e-12
    assert error(got["bias"], 0.75 * want["bias"]) < 1e-12


def test_two_calls_add_up():
    objective, p = parse_objective(SUM), problem(dtype=torch.float64)
    _, want = naive(objective, p)
    for _ in range(2):
        fuse(objective, p, t=0.3).loss.backward()
    assert max(errors({name: getattr(p, name).grad for name in LEAVES},
                      {name: 2 * want[name] for name in LEAVES}).values()) < 1e-12


def test_a_second_backward_is_an_error():
    p = problem()
    loss = fuse(parse_objective("taid"), p, t=0.3).loss
    loss.backward(retain_graph=True)
    before = p.weight.grad.clone()
    with pytest.raises(TaidError, match="differentiated once"):
        loss.backward()
    assert torch.equal(p.weight.grad, before)


def test_a_second_derivative_is_an_error():
    p = problem()
    loss = fuse(parse_objective("taid"), p, t=0.3).loss
    with pytest.raises(TaidError, match="second derivative"):
        torch.autograd.grad(loss, p.hidden, create_graph=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_computed_where_none_is_recorded(mode, monkeypatch):
    objective, p = parse_objective(SUM), problem()
    want = fuse(objective, p, t=0.3, figures=True)
    monkeypatch.setattr("taid_vlm.fused.heads._MatrixPass.backward", None)
    with mode():
        got = fuse(objective, p, t=0.3, figures=True, memory_budget=2000)
    assert not got.loss.requires_grad
    assert torch.allclose(got.loss, want.loss)
    for name, values in (want.per_token | want.figures).items():
        assert torch.allclose((got.per_token | got.figures)[name], values, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_it(reentrant):
    objective, p = parse_objective(SUM), problem(dtype=torch.float64)
    calls = []

    def inside(hidden):
        calls.append(1)
        q = type(p)(**{**vars(p), "hidden": hidden.tanh() * 2})
        return fuse(objective, q, t=0.3).loss

    loss = checkpoint(inside, p.hidden, use_reentrant=reentrant)
    loss.backward()
    q = cast(p, torch.float64)
    leaf, q.hidden = q.hidden, q.hidden.tanh() * 2
    want = total(objective, textbook(objective, *logits(q), q.labels))
    want.backward()
    assert len(calls) == 2
    assert error(loss.detach(), want.detach()) < 1e-12
    assert error(p.hidden.grad, leaf.grad) < 1e-12
    assert error(p.weight.grad, q.weight.grad) < 1e-12
