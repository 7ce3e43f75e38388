"""The figures of evaluation, against their definitions in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from taid_vlm.objectives import (
    CLOSE_DIAGNOSTICS,
    DIAGNOSTICS,
    best_guess,
    compiling,
    data_nll,
    diagnose,
    diagnostics,
    divergence,
    divergences,
)
from taid_vlm.objectives.diagnostics import _masses, rank_limits

INF = float("inf")


def logits(rows: int = 30, width: int = 37, seed: int = 0, scale: float = 3.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(rows, width, generator=generator, dtype=torch.float64)
            for _ in range(2)]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def naive(s: np.ndarray, u: np.ndarray) -> dict[str, float]:
    """One row, by sorting."""
    q, p = softmax(s), softmax(u)
    middle = (p + q) / 2
    order = np.argsort(-u)
    head, tail = order[:10], order[math.ceil(0.8 * len(u)):]
    return {
        "jsd": float((p * np.log(p / middle)).sum() + (q * np.log(q / middle)).sum()) / 2,
        "head_mass": q[head].sum(), "tail_mass": q[tail].sum(),
        "teacher_head_mass": p[head].sum(), "teacher_tail_mass": p[tail].sum(),
    }


@pytest.mark.parametrize("width", [37, 40, 100])
@pytest.mark.parametrize("scale", [0.3, 3.0, 8.0])
def test_close_figures_are_their_definitions(width: int, scale: float) -> None:
    s, u = logits(width=width, scale=scale)
    found = diagnose(s, u, closely=True)
    assert tuple(found) == CLOSE_DIAGNOSTICS
    for row in range(len(s)):
        for name, want in naive(s[row].numpy(), u[row].numpy()).items():
            assert float(found[name][row]) == pytest.approx(want, rel=1e-5, abs=1e-9), name


def test_the_plain_figures_stay_what_they_are() -> None:
    s, u = logits()
    plain, close = diagnose(s, u), diagnose(s, u, closely=True)
    assert tuple(plain) == DIAGNOSTICS
    for name in DIAGNOSTICS:
        assert torch.equal(plain[name], close[name])


def test_rows_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    s, u = logits()
    whole = diagnose(s, u, closely=True)
    monkeypatch.setattr(divergences, "CHUNK_ELEMENTS", 100)
    for name, values in diagnose(s, u, closely=True).items():
        assert torch.equal(values, whole[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_are_shared_whatever_the_order(dtype: torch.dtype) -> None:
    """bfloat16 logits tie often, and sorting breaks ties by place."""
    s, u = (x.to(dtype) for x in logits(width=60, scale=0.4))
    u = (4 * u).round() / 4
    found = diagnose(s, u, closely=True)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    turned = diagnose(s[:, order], u[:, order], closely=True)
    for name in ("head_mass", "tail_mass", "teacher_head_mass", "teacher_tail_mass"):
        torch.testing.assert_close(found[name], turned[name], rtol=1e-5, atol=1e-7)


def test_shares_of_places_add_up() -> None:
    """Of every entry's weight 1, as many as there are places."""
    _, u = logits(width=53)
    for x in (u, u.round(), torch.zeros_like(u)):
        ones = torch.ones_like(x)
        for values, limit in zip((x, -x), rank_limits(x), strict=True):
            found = _masses("tail", values, limit, 10, ones, values)
            assert found["tail_mass"] == pytest.approx(torch.full((len(x),), 10.0))
    assert found["teacher_tail_mass"].tolist() == [0.0] * len(u)


def test_limits_are_those_of_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's on a CPU, torch's elsewhere."""
    for width in (2, 7, 11, 60):
        _, u = logits(width=width)
        found = rank_limits(u)
        monkeypatch.setattr(diagnostics, "_is_on_cpu", lambda x: False)
        assert all(map(torch.equal, found, rank_limits(u)))
        monkeypatch.undo()


@pytest.mark.skipif(not compiling.can_compile("cpu"), reason="no C++ compiler")
def test_compiled_figures_are_as_near_as_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """At any distance of the models, with ties and with tokens that are ruled out; more rows are
    not compiled for again."""
    torch._dynamo.reset()
    counters.clear()
    s, _ = logits(12, 1000)
    far = torch.tensor([0.0, 1e-4, 1e-2, 1.0, 10.0, 60.0] * 2)[:, None]
    u = s + far * torch.randn(12, 1000, generator=torch.Generator().manual_seed(3))
    s[3, :4], u[5, 2:9], u[7] = -INF, -INF, u[7].round()
    want, eager = (diagnose(*x, closely=True) for x in ((s, u), (s.float(), u.float())))
    monkeypatch.setattr(compiling, "WORTH_COMPILING", 1)
    for rows in (12, 7):
        found = diagnose(s[:rows].float(), u[:rows].float(), closely=True)
        for name, values in found.items():
            missed, limit = ((x - want[name])[:rows].abs() for x in (
                torch.cat([values, want[name][rows:]]), eager[name]))
            assert (missed <= 2 * limit + 1e-6 * (want[name][:rows] + 1e-2)).all(), name
    assert counters["stats"]["unique_graphs"] == 1


def test_small_vocabularies_and_ruled_out_tokens() -> None:
    two = torch.tensor([[0.3, -0.2]])
    found = diagnose(two, -two, closely=True)
    assert float(found["head_mass"]) == pytest.approx(1.0)
    assert float(found["tail_mass"]) == 0.0
    u = torch.full((1, 40), -INF)
    u[0, :3] = 1.0
    found = diagnose(torch.zeros(1, 40), u, closely=True)
    assert all(value.isfinite().all() for value in found.values())
    # the three, and seven shares of the 37 that tie behind them
    assert float(found["head_mass"]) == pytest.approx(10 / 40)
    assert float(found["tail_mass"]) == pytest.approx(8 / 40)
    assert float(found["teacher_head_mass"]) == pytest.approx(1.0)
    assert float(found["teacher_tail_mass"]) < 1e-40


def test_no_numbers_stay_none() -> None:
    s, u = logits(rows=2)
    u[0, 3] = math.nan
    found = diagnose(s, u, closely=True)
    for name in ("kl", "reverse_kl", "teacher_entropy", "jsd", "teacher_head_mass"):
        assert found[name].isnan().tolist() == [True, False], name


def test_agreement_and_opposition() -> None:
    s, _ = logits()
    same = diagnose(s, s.clone(), closely=True)
    assert not same["jsd"].any()
    assert torch.equal(same["head_mass"], same["teacher_head_mass"])
    far = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]])
    assert diagnose(far, far.flip(0), closely=True)["jsd"].tolist() == pytest.approx(
        [math.log(2)] * 2)


def test_no_rows() -> None:
    s, u = logits(rows=0)
    assert all(value.shape == (0,) for value in diagnose(s, u, closely=True).values())
    assert all(value.shape == (0,) for value in
               best_guess(s, torch.empty(0, dtype=torch.long)).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_likelihood_of_the_data_is_cross_entropy(dtype: torch.dtype) -> None:
    s, _ = (30 * x.to(dtype) for x in logits())
    labels = torch.arange(len(s))
    s[3, 3] = -INF
    found = data_nll(s, labels)
    assert found.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert torch.equal(found, divergence("ce", s, None, labels=labels))
    assert found[3].isfinite()


def test_the_best_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    s, _ = logits()
    labels = s.argmax(-1)
    labels[::2] = (labels[::2] + 1) % s.shape[1]
    found = best_guess(s, labels)
    want = [softmax(row).max() for row in s.numpy()]
    assert found["confidence"].tolist() == pytest.approx(want, rel=1e-6)
    assert found["token_accuracy"].tolist() == [0.0, 1.0] * 15
    monkeypatch.setattr(divergences, "CHUNK_ELEMENTS", 100)
    assert torch.equal(best_guess(s, labels)["confidence"], found["confidence"])
