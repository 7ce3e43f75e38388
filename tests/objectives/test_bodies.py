"""The bodies of the fused objective: compiled against eager, and which one is taken."""

import importlib.util

import pytest
import torch
from torch._dynamo.utils import counters

from taid_vlm.errors import TaidError
from taid_vlm.fused import bodies
from taid_vlm.fused.bodies import choose_body, compiled, eager
from taid_vlm.fused.terms import BodyTerm
from taid_vlm.objectives import compiling

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TERMS = [BodyTerm("taid", 1.0, 2.0, {"t": 0.3}), BodyTerm("ce", 0.5)]
needs_compiler = pytest.mark.skipif(not compiling.can_compile("cpu"), reason="no C++ compiler")


def chunk(rows: int, width: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    s, u = 2 * torch.randn(2, rows, width, generator=generator)
    return s, u, torch.randint(width, (rows,), generator=generator)


@needs_compiler
def test_compiled_is_eager_and_compiles_once():
    """Neither t nor the number of rows compiles the sum again."""
    torch._dynamo.reset()
    counters.clear()
    bodies._compiled.cache_clear()
    for t, rows, width in ((0.3, 6, 300), (0.31, 6, 300), (0.9, 11, 300), (0.5, 3, 300)):
        s, u, labels = chunk(rows, width)
        terms = [BodyTerm("taid", 1.0, 2.0, {"t": t}), TERMS[1]]
        gradient, losses = compiled(s, u, labels, terms)
        want, want_losses = eager(s, u, labels, terms)
        assert torch.allclose(gradient, want, rtol=1e-5, atol=1e-7)
        assert torch.allclose(losses, want_losses, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompiles"] and not counters["graph_break"]


def test_every_sum_has_a_code_object_of_its_own(monkeypatch):
    """torch.compile gives up on a code object after 8 compilations, whichever function they are of.
    """
    monkeypatch.setattr(torch, "compile", lambda body, **options: body)
    made = {bodies._compiled(f'[["ce", {i}.0, 1.0, {{}}]]', torch.float32).__code__
            for i in range(12)}
    bodies._compiled.cache_clear()  # these are not compiled
    assert len(made) == 12


@pytest.mark.parametrize("elements", [1, 100, 2**24])
def test_rows_are_worked_on_in_blocks(elements, monkeypatch):
    s, u, labels = chunk(9, 20)
    want, want_losses = eager(s, u, labels, TERMS)
    monkeypatch.setattr(compiling, "CACHED", elements)
    gradient, losses = eager(s, u, labels, TERMS, torch.bfloat16)
    assert torch.equal(gradient, want.bfloat16())
    assert torch.equal(losses, want_losses)


@pytest.mark.parametrize("body", [eager, pytest.param(compiled, marks=needs_compiler)])
def test_the_gradient_in_the_logits_place(body):
    s, u, labels = chunk(9, 20)
    want, want_losses = body(s, u, labels, TERMS)
    gradient, losses = body(s, u, labels, TERMS, in_place=True)
    assert gradient.data_ptr() == s.data_ptr()
    assert torch.equal(gradient, want)
    assert torch.equal(losses, want_losses)


@needs_compiler
@pytest.mark.parametrize("terms", [
    [BodyTerm("taid", parameters={"t": 0.4})], [BodyTerm("jsd", parameters={"beta": 0.5})],
    [BodyTerm("amid", parameters={"t": 0.4, "alpha": -1.0})], [BodyTerm("todi")],
    [BodyTerm("entropy_switch", parameters={"threshold": 5.0})]])
@pytest.mark.parametrize("apart", [1e-4, 1e-2, 1.0, 10.0, 60.0])
def test_compiled_is_exact_at_any_distance(terms, apart):
    """Its own expm1: as near float64 as eager float32 is; at distance 60 ratios pass e^80."""
    generator = torch.Generator().manual_seed(0)
    s = 4 * torch.randn(6, 4001, generator=generator)
    u = s + apart * torch.randn(6, 4001, generator=generator)
    want, want_losses = eager(s.double(), u.double(), None, terms, torch.float64)
    missed, limits = ([((gradient - want).abs().max() / want.abs().max()).item(),
                       ((losses - want_losses) / want_losses).abs().max().item()]
                      for gradient, losses in (body(s, u, None, terms)
                                               for body in (compiled, eager)))
    assert all(miss < max(1e-6, 2 * limit)
               for miss, limit in zip(missed, limits, strict=True)), (missed, limits)


@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16])
def test_types_and_no_rows(given):
    s, u, labels = chunk(0, 20)
    gradient, losses = eager(s.to(given), u.to(given), labels, TERMS, torch.float16)
    assert (gradient.shape, gradient.dtype) == ((0, 20), torch.float16)
    assert losses.shape == (2, 0)
    assert losses.dtype == (torch.float64 if given == torch.float64 else torch.float32)


# ----- which one is taken -------------------------------------------------------------------


def test_auto_on_cpu_goes_by_size(monkeypatch):
    monkeypatch.setattr(compiling, "can_compile", lambda device: True)
    assert choose_body("auto", CPU, TERMS, compiling.WORTH_COMPILING - 1) is eager
    assert choose_body("auto", CPU, TERMS, compiling.WORTH_COMPILING) is compiled
    assert choose_body("eager", CPU, TERMS, compiling.WORTH_COMPILING) is eager
    assert choose_body("compiled", CPU, TERMS, 1) is compiled


def test_without_a_compiler(monkeypatch):
    for module in (bodies, compiling):
        monkeypatch.setattr(module, "can_compile", lambda device: False)
    assert choose_body("auto", CPU, TERMS, compiling.WORTH_COMPILING) is eager
    with pytest.raises(TaidError, match=r"compiled.*no compiler for cpu.*body: eager"):
        choose_body("compiled", CPU, TERMS, 1)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_auto_on_cuda_takes_triton_where_it_can():
    from taid_vlm.fused.kernels import triton_body

    big = compiling.WORTH_COMPILING
    assert choose_body("auto", CUDA, TERMS, 1) is triton_body
    assert choose_body("triton", CUDA, TERMS, 1) is triton_body
    assert choose_body("auto", CUDA, TERMS, 1, torch.float64) is eager
    other = [BodyTerm("adaptive_kl"), *TERMS]
    assert choose_body("auto", CUDA, other, 1) is eager
    assert choose_body("auto", CUDA, other, big) is compiled
    with pytest.raises(TaidError, match=r"triton.*adaptive_kl"):
        choose_body("triton", CUDA, other, big)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    compiling.can_compile.cache_clear()
    assert choose_body("auto", CUDA, TERMS, compiling.WORTH_COMPILING) is eager
    with pytest.raises(TaidError, match="needs the package triton"):
        choose_body("triton", CUDA, TERMS, 1)
    with pytest.raises(TaidError, match="no compiler for cuda"):
        choose_body("compiled", CUDA, TERMS, 1)
    compiling.can_compile.cache_clear()


def test_unknown_body():
    with pytest.raises(TaidError, match=r"'compile'.*Did you mean 'compiled'"):
        choose_body("compile", CPU, TERMS, 1)
