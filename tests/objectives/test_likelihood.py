"""Likelihoods of chunks against textbook float64: log-probabilities, two outcomes, every loss."""

from __future__ import annotations

import pytest
import torch
from objectives import reference
from torch import Tensor

from taid_vlm.config.objective import MOVING
from taid_vlm.objectives import (
    LOSSES,
    chunk_logits,
    diagnose,
    divergence,
    divergences,
    label_log_prob,
)

ROWS, WIDTH = 12, 9
CHUNK = torch.tensor([0, 0, -1, 1, 2, 2, 2, -1, 3, 4, 4, -1])  # of ROWS tokens
AGAINST_TEACHER = sorted(name for name, loss in LOSSES.items() if loss.needs_teacher)


def draw(scale: float = 2.0, seed: int = 0, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Logits in float64 and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    return logits, torch.randint(WIDTH, (rows,), generator=generator)


def confident(gap: float, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Every label's logit stands `gap` above the highest other."""
    logits, labels = draw(rows=rows)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(-1, keepdim=True)
    return logits.scatter(1, labels[:, None], others + gap), labels


def naive_log_prob(logits: Tensor, labels: Tensor) -> Tensor:
    """-log(1 + sum of e^(s_j - s_y) over the others): keeps its digits where p is nearly 1."""
    rows = []
    for s, y in zip(logits, labels.tolist(), strict=True):
        others = [s[j] - s[y] for j in range(len(s)) if j != y]
        rows.append(-torch.log1p(torch.stack(others).exp().sum()))
    return torch.stack(rows)


def value_and_gradient(function, logits: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad((value * weight.to(value.dtype)).sum(), leaf)
    return value.detach(), gradient


def check_log_prob(logits: Tensor, labels: Tensor, rtol: float) -> None:
    """Value and gradient of `logits` (any dtype) against the same numbers in float64."""
    weight = torch.linspace(-1.0, 2.0, len(logits))
    got, gradient = value_and_gradient(lambda x: label_log_prob(x, labels), logits, weight)
    want, expected = value_and_gradient(
        lambda x: naive_log_prob(x, labels), logits.double(), weight.double())
    assert torch.allclose(got.double(), want, rtol=rtol, atol=0)
    assert gradient.dtype == logits.dtype
    assert torch.allclose(gradient.double(), expected, rtol=max(
        rtol, 2 * torch.finfo(logits.dtype).eps), atol=0)


@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
@pytest.mark.parametrize(("dtype", "rtol"), [
    (torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-5)])
def test_log_prob(dtype: torch.dtype, rtol: float, scale: float) -> None:
    logits, labels = draw(scale)
    before = logits.to(dtype)
    given = before.clone()
    check_log_prob(given, labels, rtol)
    assert torch.equal(given, before)


@pytest.mark.parametrize("gap", [10.0, 27.7, 60.0])  # 1 - p of about 1e-4, 1e-12 and 1e-26
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_log_prob_of_confident_models(dtype: torch.dtype, gap: float) -> None:
    logits, labels = confident(gap)
    check_log_prob(logits.to(dtype), labels, 1e-12 if dtype == torch.float64 else 2e-5)
    plain = logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert gap < 20 or (plain > -1e-6).all()  # there the usual form knows nothing


def test_log_prob_of_impossible_labels() -> None:
    logits, labels = draw()
    logits[::2] = logits[::2].scatter(1, labels[::2, None], -torch.inf)
    got, gradient = value_and_gradient(
        lambda x: label_log_prob(x, labels), logits, torch.ones(ROWS))
    assert (got[::2] == -torch.inf).all()
    p = logits.softmax(-1)
    assert torch.allclose(gradient[::2].scatter(1, labels[::2, None], 0.0), -p[::2])
    assert torch.isfinite(gradient).all()


def test_log_prob_where_nothing_else_is_possible() -> None:
    logits, labels = draw()
    only = torch.full_like(logits, -torch.inf).scatter(1, labels[:, None], 1.0)
    got, gradient = value_and_gradient(lambda x: label_log_prob(x, labels), only, torch.ones(ROWS))
    assert (got == 0).all()
    assert (gradient == 0).all()


def test_log_prob_with_some_tokens_ruled_out() -> None:
    logits, labels = draw()
    free = (labels + 1) % WIDTH
    logits.scatter_(1, free[:, None], -torch.inf)
    check_log_prob(logits, labels, 1e-12)


def test_log_prob_passes_gradcheck() -> None:
    logits, labels = draw()
    assert torch.autograd.gradcheck(
        lambda x: label_log_prob(x, labels), logits.requires_grad_())


def test_log_prob_of_no_rows() -> None:
    logits = torch.zeros(0, WIDTH, requires_grad=True)
    found = label_log_prob(logits, torch.zeros(0, dtype=torch.long))
    assert found.shape == (0,)
    found.sum().backward()
    assert logits.grad.shape == (0, WIDTH)


@pytest.mark.parametrize("rows_at_once", [1, 5])
def test_log_prob_in_slices_of_rows(
    rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels = draw()
    weight = torch.linspace(-1.0, 2.0, ROWS)
    whole = value_and_gradient(lambda x: label_log_prob(x, labels), logits, weight)
    monkeypatch.setattr(divergences, "CHUNK_ELEMENTS", rows_at_once * WIDTH)
    sliced = value_and_gradient(lambda x: label_log_prob(x, labels), logits, weight)
    assert all(torch.equal(a, b) for a, b in zip(whole, sliced, strict=True))


# ----- chunks ------------------------------------------------------------------------------------


def naive_chunks(logits: Tensor, labels: Tensor, chunk: Tensor = CHUNK) -> Tensor:
    """log p and log(1 - p) of every chunk by a loop, in the precision of the logits."""
    log_p, rows = naive_log_prob(logits, labels), []
    for index in range(int(chunk.max()) + 1):
        total = log_p[chunk == index].sum()
        small = float(total.detach()) < -1.0  # p itself is small: 1 - p must not be rounded to 1
        other = torch.log1p(-total.exp()) if small else torch.log(-torch.expm1(total))
        rows.append(torch.stack([total, other]))
    return torch.stack(rows)


def chunks(logits: Tensor, labels: Tensor, chunk: Tensor = CHUNK) -> Tensor:
    return chunk_logits(label_log_prob(logits, labels), chunk, int(chunk.max()) + 1)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("gap", [None, 0.5, 27.7, 60.0])
def test_chunk_logits(gap: float | None, dtype: torch.dtype, rtol: float) -> None:
    logits, labels = draw() if gap is None else confident(gap)
    logits = logits.to(dtype)
    found, expected = chunks(logits, labels), naive_chunks(logits.double(), labels)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected, rtol=rtol, atol=0)
    assert torch.allclose(found.exp().sum(-1), torch.ones(5, dtype=dtype), atol=rtol)


def test_tokens_of_a_chunk_need_not_stand_together() -> None:
    logits, labels = draw()
    shuffled = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(chunks(logits[shuffled], labels[shuffled], CHUNK[shuffled]),
                          chunks(logits, labels), rtol=1e-12)


@pytest.mark.parametrize("chunk", [[], [-1, -1]])
def test_no_chunks(chunk: list[int]) -> None:
    logits, labels = draw(rows=len(chunk))
    logits.requires_grad_()
    index = torch.tensor(chunk, dtype=torch.long)
    found = chunk_logits(label_log_prob(logits, labels), index, 0)
    assert found.shape == (0, 2)
    for name in AGAINST_TEACHER:
        parameters = {"t": 0.5} if name in MOVING else {}
        loss = divergence(name, found, found.detach(), **parameters)
        assert loss.shape == (0,)
        loss.sum().backward(retain_graph=True)
    assert (logits.grad == 0).all()
    assert diagnose(found, found)["kl"].shape == (0,)


def ways_to_be_certain() -> dict[str, Tensor]:
    logits, labels = confident(0.0)
    label = torch.zeros_like(logits, dtype=torch.bool).scatter(1, labels[:, None], True)
    return {"only one": logits.masked_fill(~label, -torch.inf),
            "far ahead": logits.masked_fill(label, 1000.0),
            "subnormal": logits.masked_fill(label, 95.0),
            "impossible": logits.masked_fill(label, -torch.inf),
            "far behind": logits.masked_fill(label, -1000.0)}


@pytest.mark.parametrize("name", AGAINST_TEACHER)
@pytest.mark.parametrize("way", ways_to_be_certain())
def test_certain_chunks_have_finite_losses_and_gradients(way: str, name: str) -> None:
    _, labels = confident(0.0)
    teacher, _ = draw(seed=5)
    certain = ways_to_be_certain()[way].float()
    for ours, theirs in ((certain, teacher.float()), (teacher.float(), certain),
                         (certain, certain)):
        student = ours.clone().requires_grad_()
        parameters = {"t": 0.5} if name in MOVING else {}
        loss = divergence(name, chunks(student, labels), chunks(theirs, labels), **parameters)
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert torch.isfinite(student.grad).all()
        assert ours is not theirs or loss.abs().max() < 1e-6


# ----- every loss on two outcomes ----------------------------------------------------------------


def bernoulli(name: str, temperature: float, labels: Tensor, theirs: Tensor):
    """The loss of `name` as its paper writes it, from the student's whole logits."""
    parameters = {"t": 0.3} if name in MOVING else {}

    def loss(student: Tensor) -> Tensor:
        return reference.loss_of(name, naive_chunks(student, labels), naive_chunks(theirs, labels),
                                 labels, temperature, **parameters)

    return loss


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", AGAINST_TEACHER)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_every_loss_on_chunks(
    name: str, temperature: float, dtype: torch.dtype, rtol: float
) -> None:
    (ours, labels), (theirs, _) = draw(), draw(seed=5)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0])
    parameters = {"t": 0.3} if name in MOVING else {}

    def loss(student: Tensor) -> Tensor:
        return divergence(name, chunks(student, labels), chunks(theirs, labels),
                          kd_temperature=temperature, **parameters)

    got, gradient = value_and_gradient(loss, ours, weight)
    want, expected = value_and_gradient(
        bernoulli(name, temperature, labels, theirs.double()), ours.double(), weight)
    assert torch.allclose(got.double(), want, rtol=rtol, atol=rtol * float(want.abs().max()))
    assert torch.allclose(gradient.double(), expected, rtol=0,
                          atol=rtol * float(expected.abs().max()))
    assert (gradient[CHUNK < 0] == 0).all()


@pytest.mark.parametrize("name", ["taid", "forward_kl", "jsd", "skew_kl"])
@pytest.mark.parametrize("gap", [12.0, 27.7, 50.0])
def test_an_overconfident_student_is_still_corrected(name: str, gap: float) -> None:
    """1 - p is 1e-5 ... 1e-22 in float32, the teacher is unsure: the gradient has its digits."""
    (ours, labels), (theirs, _) = confident(gap), draw(seed=5)
    parameters = {"t": 0.3} if name in MOVING else {}
    _, gradient = value_and_gradient(
        lambda x: divergence(name, chunks(x, labels), chunks(theirs.float(), labels), **parameters),
        ours.float(), torch.ones(5))
    _, expected = value_and_gradient(
        bernoulli(name, 1.0, labels, theirs), ours.float().double(), torch.ones(5))
    assert torch.allclose(gradient.double(), expected, rtol=0,
                          atol=2e-4 * float(expected.abs().max()))
