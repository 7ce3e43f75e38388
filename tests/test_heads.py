"""Heads of every kind under the fused objective, autocast, and what a call has in memory."""

import pytest
import torch
from fusing import (
    MAPS,
    TEACHER_ROWS,
    Watched,
    cast,
    error,
    errors,
    fuse,
    gradients,
    logits,
    naive,
    norm_errors,
    problem,
    textbook,
    total,
)
from torch import nn
from torch.nn.functional import linear

from taid_vlm.fused.divergence import FusedDivergence
from taid_vlm.fused.heads import Head, ModuleHead
from taid_vlm.models.head import IDENTITY, LogitTransform
from taid_vlm.objectives import parse_objective

SUM = parse_objective({"terms": [{"name": "taid"}, {"name": "reverse_kl", "weight": 0.5},
                                 {"name": "ce", "weight": 0.1}], "kd_temperature": 2.0})
ROWS, WIDTH = 11, 23


def fused(p, head, teacher_head=None, memory_budget=2000, hidden=None, **more):
    """With an own head of the student's."""
    return FusedDivergence(SUM, memory_budget=memory_budget, body="eager")(
        p.hidden if hidden is None else hidden, head, p.teacher_hidden,
        teacher_head or Head(p.teacher_weight), p.labels, t=0.3, **more).loss


# ----- the matrix -------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [
    LogitTransform(scale=0.25), LogitTransform(softcap=2.0), LogitTransform(3.0, 1.5)], ids=str)
@pytest.mark.parametrize("memory_budget", [1, 2**20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scale_then_softcap_then_temperature(transform, memory_budget, dtype):
    p = problem(dtype=dtype)
    want, want_gradients = naive(SUM, p, transform=transform)
    loss = fuse(SUM, p, t=0.3, transform=transform, memory_budget=memory_budget).loss
    limit = 1e-12 if dtype == torch.float64 else 2e-6
    assert error(loss.detach(), want) < limit
    assert max(errors(gradients(p, loss), want_gradients).values()) < limit


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(3.0, 1.5)], ids=str)
@pytest.mark.parametrize("name", ["rest", "cells"])
def test_bent_logits_through_a_map(transform, name):
    p = problem(teacher_width=TEACHER_ROWS, dtype=torch.float64)
    loss = fuse(SUM, p, t=0.3, transform=transform, maps=(MAPS[name],), memory_budget=3000).loss
    s, u = logits(p, transform)
    losses = SUM.per_token(MAPS[name].map_student(s), MAPS[name].map_teacher(u), p.labels,
                           own_logits=s, t=0.3)
    want = SUM.weighted(losses).sum()
    assert error(loss.detach(), want.detach()) < 1e-12
    assert max(errors(gradients(p, loss), gradients(p, want)).values()) < 1e-12


def test_half_precision_is_bent_in_float32():
    p = problem(rows=40, width=300, dtype=torch.bfloat16)
    transform = LogitTransform(0.5, 4.0)
    got = gradients(p, fuse(SUM, p, t=0.3, transform=transform, memory_budget=10**6).loss)
    z = linear(p.hidden, p.weight, p.bias).detach().double().requires_grad_()
    u = (p.teacher_hidden @ p.teacher_weight.T).double()
    s, u = (4 * torch.tanh(x * 0.5 / 4) for x in (z, u))
    (g,) = torch.autograd.grad(total(SUM, textbook(SUM, s, u, p.labels)), z)
    want = {"hidden": g @ p.weight.double(), "weight": g.T @ p.hidden.double(), "bias": g.sum(0)}
    assert max(norm_errors(got, want).values()) < torch.finfo(torch.bfloat16).eps / 2


def test_many_chunks_of_half_precision_are_added_up_in_float32():
    """Six hundred equal rows, one per chunk: a sum in bfloat16 stops at about 256 of them."""
    p = problem(rows=1, dtype=torch.bfloat16)
    one = gradients(p, fuse(SUM, p, t=0.3).loss)
    for name in ("hidden", "teacher_hidden"):
        x = getattr(p, name)
        setattr(p, name, x.detach().repeat(600, 1).requires_grad_(x.requires_grad))
    p.labels = p.labels.repeat(600)
    many = gradients(p, fuse(SUM, p, t=0.3, memory_budget=1).loss)
    for name in ("weight", "bias"):
        assert error(many[name], 600 * one[name].double()) < 1e-2


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(2.0)], ids=str)
def test_tokens_ruled_out_by_the_bias(transform):
    p = problem(dtype=torch.float64)
    with torch.no_grad():
        p.bias[[2, 5]] = -torch.inf
        p.labels.clamp_(min=6)
    loss = fuse(SUM, p, t=0.3, transform=transform, memory_budget=1500).loss
    s, u = logits(p, transform)
    want = SUM.weighted(SUM.per_token(s, u, p.labels, t=0.3)).sum()
    got, want_gradients = gradients(p, loss), gradients(p, want)
    assert loss.isfinite()
    assert error(loss.detach(), want.detach()) < 1e-12
    for name, gradient in got.items():
        assert gradient.isfinite().all()
        assert error(gradient, want_gradients[name]) < 1e-12


# ----- what is frozen costs nothing -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["matrix", "module"])
def test_frozen_head_gets_no_gradient_and_no_buffer(kind, dtype):
    p = problem(dtype=dtype)
    want = gradients(p, fuse(SUM, p, t=0.3, memory_budget=2000).loss)["hidden"]
    weight, bias = p.weight.detach(), p.bias.detach()
    head = Head(weight, bias) if kind == "matrix" else ModuleHead(as_linear(p, frozen=True), WIDTH)
    with Watched() as watched:
        loss = fused(p, head)
        (got,) = torch.autograd.grad(loss, p.hidden)
    assert (ROWS, 7) in watched.made
    assert not {(WIDTH, 7), (7, WIDTH)} & watched.made
    assert error(got, want.double()) < 1e-6


@pytest.mark.parametrize("kind", ["matrix", "module"])
def test_frozen_hidden_states(kind):
    p = problem(dtype=torch.float64)
    want = gradients(p, fuse(SUM, p, t=0.3).loss)
    p.hidden = p.hidden.detach()
    module = as_linear(p)
    leaves = [p.weight, p.bias] if kind == "matrix" else list(module.parameters())
    with Watched() as watched:
        loss = fused(p, Head(p.weight, p.bias) if kind == "matrix" else ModuleHead(module, WIDTH))
        got = torch.autograd.grad(loss, leaves)
    assert (ROWS, 7) not in watched.made
    assert error(got[0], want["weight"]) < 1e-12
    assert error(got[1], want["bias"]) < 1e-12


def test_frozen_weight_with_a_bias_that_learns():
    p = problem(dtype=torch.float64)
    want = gradients(p, fuse(SUM, p, t=0.3).loss)
    loss = fused(p, Head(p.weight.detach(), p.bias))
    hidden, bias = torch.autograd.grad(loss, [p.hidden, p.bias])
    assert error(hidden, want["hidden"]) < 1e-12
    assert error(bias, want["bias"]) < 1e-12


def test_nothing_learns():
    p = problem()
    loss = fused(p, Head(p.weight.detach()), hidden=p.hidden.detach())
    assert not loss.requires_grad
    assert loss > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tied_embeddings(dtype):
    """One parameter below and above: both of its gradients add up."""
    p = problem(dtype=dtype)
    ids = torch.arange(ROWS) % 5

    def loss_of(p, make):
        p.hidden = (p.weight[ids] * 2).tanh()
        return make(p)

    got = torch.autograd.grad(loss_of(p, lambda p: fused(p, Head(p.weight))), p.weight)
    q = cast(p, torch.float64)
    q.bias = None
    want = torch.autograd.grad(loss_of(q, lambda q: total(SUM, textbook(
        SUM, *logits(q), q.labels))), q.weight)
    assert error(got[0], want[0]) < (1e-12 if dtype == torch.float64 else 2e-2)


# ----- modules ----------------------------------------------------------------------------------


class Sum(nn.Module):
    """Two matrices that are added before the product: autograd gives both one gradient tensor."""

    def __init__(self, weight):
        super().__init__()
        self.a = nn.Parameter(weight * 0.25)
        self.b = nn.Parameter(weight * 0.75)

    def forward(self, x):
        return linear(x, self.a + self.b)


class LowRank(nn.Module):
    """A frozen matrix and an update of rank 2, as LoRA's."""

    def __init__(self, weight, scale=0.5):
        super().__init__()
        self.base = nn.Parameter(weight, requires_grad=False)
        generator = torch.Generator().manual_seed(9)
        self.down, self.up = (nn.Parameter(torch.randn(*shape, generator=generator,
                                                       dtype=torch.float64).to(weight.dtype))
                              for shape in ((2, weight.shape[1]), (len(weight), 2)))
        self.scale = nn.Parameter(torch.tensor(scale, dtype=weight.dtype))  # 0-dimensional

    def forward(self, x):
        return linear(x, self.base) + linear(linear(x, self.down), self.up) * self.scale


def as_linear(p, frozen=False):
    module = nn.Linear(7, WIDTH, dtype=p.weight.dtype).requires_grad_(not frozen)
    with torch.no_grad():
        module.weight.copy_(p.weight)
        module.bias.copy_(p.bias)
    return module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_budget", [1, 2000, 2**20])
def test_linear_module_is_the_matrix(dtype, memory_budget):
    p = problem(dtype=dtype)
    module = as_linear(p)
    want = fuse(SUM, p, t=0.3, memory_budget=memory_budget).loss
    loss = fused(p, ModuleHead(module, WIDTH), memory_budget=memory_budget)
    assert torch.equal(loss, want)
    got = torch.autograd.grad(loss, [p.hidden, module.weight, module.bias])
    limit = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for one, other in zip(got, gradients(p, want).values(), strict=True):
        assert one.dtype == dtype
        assert error(one, other.double()) < limit


@pytest.mark.parametrize("make", [Sum, LowRank])
@pytest.mark.parametrize("memory_budget", [1, 5000, 2**20])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 2.0)], ids=str)
def test_any_module(make, memory_budget, transform):
    p = problem(dtype=torch.float64)
    module = make(p.weight.detach())
    leaves = [p.hidden, *(x for x in module.parameters() if x.requires_grad)]
    loss = fused(p, ModuleHead(module, WIDTH, transform), memory_budget=memory_budget)
    got = torch.autograd.grad(0.37 * loss, leaves)
    s = module(p.hidden) * transform.scale
    s = s if transform.softcap is None else transform.softcap * torch.tanh(s / transform.softcap)
    u = p.teacher_hidden @ p.teacher_weight.T
    want = total(SUM, textbook(SUM, s, u, p.labels))
    assert error(loss.detach(), want.detach()) < 1e-12
    for one, other in zip(got, torch.autograd.grad(0.37 * want, leaves), strict=True):
        assert error(one, other) < 1e-12


def test_parameters_that_the_rows_do_not_reach():
    class Gated(LowRank):
        def forward(self, x):
            return linear(x, self.base)

    p = problem(rows=4)
    module = Gated(p.weight.detach())
    loss = fused(p, ModuleHead(module, WIDTH))
    for gradient in torch.autograd.grad(loss, [module.down, module.up, module.scale]):
        assert not gradient.any()
    p = problem(rows=0)
    module = LowRank(p.weight.detach())
    for gradient in torch.autograd.grad(fused(p, ModuleHead(module, WIDTH)),
                                        [p.hidden, module.down, module.up, module.scale]):
        assert not gradient.any()


def test_teacher_with_a_module_gets_no_gradient():
    p = problem()
    teacher = nn.Linear(9, WIDTH, bias=False)
    with torch.no_grad():
        teacher.weight.copy_(p.teacher_weight)
    p.teacher_hidden.requires_grad_()
    loss = fused(p, Head(p.weight, p.bias), ModuleHead(teacher, WIDTH))
    want = fused(p, Head(p.weight, p.bias))
    assert torch.equal(loss, want)
    loss.backward()
    assert teacher.weight.grad is None
    assert p.teacher_hidden.grad is None


@pytest.mark.parametrize("kind", ["matrix", "module"])
def test_inference_mode(kind):
    p = problem()
    head = Head(p.weight, p.bias) if kind == "matrix" else ModuleHead(as_linear(p), WIDTH)
    want = fused(p, head)
    with torch.inference_mode():
        assert torch.allclose(fused(p, head), want)
        assert torch.allclose(fused(p, head, hidden=p.hidden * 1), want)


# ----- autocast ---------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["matrix", "module"])
@pytest.mark.parametrize("maps", [(), (MAPS["cells"],)], ids=["same", "cells"])
def test_autocast_is_as_exact_as_unfused(hidden_dtype, kind, maps):
    """float32 master weights, products in bfloat16, the rest in float32."""
    p = problem(rows=60, dtype=torch.float32, teacher_width=TEACHER_ROWS if maps else None)
    for name in ("hidden", "teacher_hidden"):
        x = getattr(p, name)
        setattr(p, name, x.detach().to(hidden_dtype).requires_grad_(name == "hidden"))
    module = as_linear(p)
    own = kind == "module"
    head = ModuleHead(module, WIDTH) if own else Head(p.weight, p.bias)
    names, leaves = ("hidden", "weight", "bias"), [p.hidden, *(
        module.parameters() if own else (p.weight, p.bias))]

    def compared(s, u):
        vocabulary = maps[0] if maps else None
        one, two = (s, u) if vocabulary is None else (
            vocabulary.map_student(s), vocabulary.map_teacher(u))
        return SUM.weighted(SUM.per_token(one, two, p.labels, own_logits=s, t=0.3)).sum()

    with torch.autocast("cpu", torch.bfloat16):
        loss = FusedDivergence(SUM, maps, memory_budget=4000, body="eager")(
            p.hidden, head, p.teacher_hidden, Head(p.teacher_weight), p.labels, t=0.3).loss
        plain = compared(linear(p.hidden, p.weight, p.bias),
                         linear(p.teacher_hidden, p.teacher_weight))
    assert torch.is_autocast_enabled("cpu") is False
    exact = cast(p, torch.float64)
    want = compared(*logits(exact))
    want_gradients = gradients(exact, want)
    got = dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))
    assert loss.dtype == got["weight"].dtype == torch.float32
    assert got["hidden"].dtype == hidden_dtype
    assert error(loss.detach(), want.detach()) < max(
        1e-5, 1.1 * error(plain.detach(), want.detach()))
    limits = norm_errors(gradients(p, plain), want_gradients)
    for name, missed in norm_errors(got, want_gradients).items():
        assert missed < 1.2 * limits[name] < 0.03, name


# ----- memory -----------------------------------------------------------------------------------

TIMES = 10
WIDE = 23 * TIMES
SCRATCH = 2**14  # what stands for 2**24 numbers in these tests


def peak(dtype, rows, memory_budget, maps=(), transform=None):
    """Bytes beside the gradients, losses and figures that a call leaves."""
    p = problem(rows=rows, width=WIDE, dtype=dtype, bias=False,
                teacher_width=TEACHER_ROWS * TIMES if maps else WIDE)
    with Watched() as watched:
        result = fuse(SUM, p, t=0.3, maps=maps, transform=transform, memory_budget=memory_budget,
                      figures=True)
        gradients(p, result.loss)
    size = p.hidden.element_size()
    # a half-precision head's gradient is summed up in float32 first
    left = p.weight.numel() * (size if size >= 4 else size + 4) + p.hidden.numel() * size
    return watched.peak - left - 4 * rows * len(result.per_token | result.figures)


def widened(vocabulary):
    """The same map with every id and every cell `TIMES` times."""
    def spread(side, rows):
        ids = {name: torch.cat([x + rows * i for i in range(TIMES)])
               for name, x in vars(side).items()}
        ids["cell"] = torch.cat([side.cell + vocabulary.cells * i for i in range(TIMES)])
        return type(side)(**ids)

    return type(vocabulary)(spread(vocabulary.teacher, TEACHER_ROWS), spread(
        vocabulary.student, WIDTH), False, vocabulary.has_rest, vocabulary.cells * TIMES)


CAPPED = LogitTransform(2.0, 5.0)


@pytest.mark.parametrize(("dtype", "name", "transform", "memory_budget"), [
    (torch.float32, None, IDENTITY, 120_000), (torch.float32, None, IDENTITY, 300_000),
    (torch.bfloat16, None, CAPPED, 120_000), (torch.float32, "cells", IDENTITY, 120_000),
    (torch.bfloat16, "cells", CAPPED, 300_000), (torch.float32, "rest", IDENTITY, 300_000),
])
def test_memory_stays_within_the_budget(dtype, name, transform, memory_budget, monkeypatch):
    """However many tokens there are; and the arithmetic on a chunk has `CHUNK_ELEMENTS` float32
    beside it, or a row's own."""
    monkeypatch.setattr("taid_vlm.objectives.divergences.CHUNK_ELEMENTS", SCRATCH)
    monkeypatch.setattr("taid_vlm.objectives.compiling.CACHED",
                        SCRATCH // (16 * torch.get_num_threads()))
    assert SCRATCH > 16 * WIDE
    maps = () if name is None else (widened(MAPS[name]),)
    few, many = (peak(dtype, rows, memory_budget, maps, transform) for rows in (60, 180))
    assert few < memory_budget + 4 * SCRATCH
    assert 0.4 * memory_budget < many < memory_budget + 4 * SCRATCH


def test_all_rows_at_once_would_not_fit():
    """The bound can fail: without a budget, student and teacher of every row are held."""
    assert peak(torch.float32, 240, 2**40) > 2 * 240 * WIDE * 4 > 300_000 + 4 * SCRATCH
