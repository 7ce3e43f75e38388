"""The Triton body: interpreted against float64, and compiled for a GPU that is not there.

Whether Triton interprets is settled when it is imported, so a process of its own (this file, run
as a script) computes every run of `RUNS` and leaves the results in a safetensors file.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from taid_vlm.errors import TaidError
from taid_vlm.fused.bodies import eager
from taid_vlm.fused.terms import BodyTerm
from taid_vlm.objectives.divergences import LOG_SMALLEST

kernels = pytest.importorskip(
    "taid_vlm.fused.kernels", reason="triton is not installed", exc_type=ImportError)

WIDTH, BLOCK = 27, 16  # two blocks, the second one not full; four for sums
INF = math.inf


# ----- rows of every kind, and what is run on them ------------------------------------------


def rows() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)

    def normal(scale):
        return scale * torch.randn(WIDTH, generator=generator)

    def without(x, *tokens):
        return x.index_fill(0, torch.tensor(tokens), -INF)

    near = normal(3)
    return {
        "plain": (normal(1), normal(1)),
        "wide": (normal(8), normal(8)),
        "rms 0.1": (near, near + normal(0.1)),
        "rms 0.001": (near, near + normal(1e-3)),
        "agreement": (near, near.clone()),
        "far shift": (near, normal(1) + 100),
        "extreme": (torch.linspace(-1e4, 1e4, WIDTH), torch.linspace(1e4, -1e4, WIDTH)),
        "teacher rules out": (normal(2), without(normal(2), 0, 17, 26)),
        "student rules out": (without(normal(2), 3, 20), normal(2)),
        "both rule out": (without(near, *range(BLOCK)),
                          without(near + normal(1e-3), *range(BLOCK))),
        "each rules out": (without(normal(2), 1, 8, 25), without(normal(2), 2, 8)),
        "not a number": (normal(1).index_fill(0, torch.tensor([20]), math.nan), normal(1)),
        "teacher not a number": (normal(1), normal(1).index_fill(0, torch.tensor([2]), math.nan)),
    }


ROWS = rows()
FEW = ("plain", "rms 0.001", "each rules out")
SINGLE = {
    "taid": BodyTerm("taid", 1.0, 1.0, {"t": 0.4}),
    "forward_kl": BodyTerm("forward_kl"),
    "reverse_kl": BodyTerm("reverse_kl"),
    "jsd": BodyTerm("jsd", 1.0, 1.0, {"beta": 0.3}),
    "skew_kl": BodyTerm("skew_kl"),
    "skew_rkl": BodyTerm("skew_rkl"),
    "ce": BodyTerm("ce"),
}
LIMITS = {
    "taid at 0": BodyTerm("taid", 1.0, 1.0, {"t": 0.0}),
    "taid at 1": BodyTerm("taid", 1.0, 1.0, {"t": 1.0}),
    "jsd at 0": BodyTerm("jsd", 1.0, 1.0, {"beta": 0.0}),
    "jsd at 1": BodyTerm("jsd", 1.0, 1.0, {"beta": 1.0}),
    "skew_kl at 0": BodyTerm("skew_kl", 1.0, 1.0, {"lam": 0.0}),
    "skew_rkl at 0": BodyTerm("skew_rkl", 1.0, 1.0, {"lam": 0.0}),
}


def weighted(temperature):
    """All kinds at once, and one of them twice, each with a weight of its own."""
    terms = [*SINGLE.values(), BodyTerm("jsd", 1.0, 1.0, {"beta": 0.9})]
    return [BodyTerm(term.name, 0.25 + i, 1.0 if term.name == "ce" else temperature,
                     term.parameters) for i, term in enumerate(terms)]


TAID_AND_CE = [weighted(2.5)[0], weighted(2.5)[6]]
# name: terms, rows, dtype of the logits
RUNS = {
    **{name: ([term], tuple(ROWS), torch.float32) for name, term in SINGLE.items()},
    **{name: ([term], FEW, torch.float32) for name, term in LIMITS.items()},
    "all": (weighted(2.5), FEW, torch.float32),
    "float16": (TAID_AND_CE, FEW, torch.float16),
    "bfloat16": (TAID_AND_CE, FEW, torch.bfloat16),
    "bfloat16 throughout": (TAID_AND_CE, FEW, torch.bfloat16),
    "a whole vocabulary": (TAID_AND_CE, (), torch.float32),
}


def inputs(run):
    """Student, teacher, labels and terms; in views whose rows and columns lie apart."""
    terms, names, dtype = RUNS[run]
    if not names:
        generator = torch.Generator().manual_seed(0)
        s, u = 3 * torch.randn(2, 1, 2**18 - 3, generator=generator)
    else:
        s, u = (torch.stack(x) for x in zip(*(ROWS[name] for name in names), strict=True))
    labels = (7 * torch.arange(len(s)) + 1) % WIDTH
    apart = torch.full((2 * len(s), s.shape[1] + 3), math.nan, dtype=dtype)
    apart[::2, 3:] = s
    return apart[::2, 3:], u.T.contiguous().T.to(dtype), labels, terms


def body(run):
    """What the process of its own runs: only what the terms need is given."""
    s, u, labels, terms = inputs(run)
    kernels.BLOCK = 4096 if s.shape[1] > WIDTH else BLOCK
    names = {term.name for term in terms}
    return kernels.triton_body(
        s, None if names == {"ce"} else u, labels if "ce" in names else None, terms,
        torch.bfloat16 if "throughout" in run else torch.float32)


def interpret(target):
    results = {}
    for run in RUNS:
        results[f"{run}/gradient"], results[f"{run}/losses"] = body(run)
    s, u, labels, terms = inputs("all")
    outside = torch.tensor([1, -100, WIDTH])
    results["outside/losses"] = kernels.triton_body(s, None, outside, [SINGLE["ce"]])[1]
    results["empty/gradient"], results["empty/losses"] = kernels.triton_body(
        s[:0], u[:0], labels[:0], terms)
    save_file(results, target)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    target = tmp_path_factory.mktemp("interpreted") / "results.safetensors"
    path = [str(Path(__file__).parents[2]), *sys.path]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
                   "PYTHONWARNINGS": "ignore", "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run([sys.executable, __file__, str(target)], env=environment,
                          capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stderr:
        pytest.skip("the interpreter of this Triton (3.6, say) does not run with numpy 2.4")
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(target)


# ----- against float64 ----------------------------------------------------------------------


def floored(x, temperature):
    """Ruled-out tokens with the logit whose log-probability is that of the smallest float32."""
    x = x.double()
    floor = (x / temperature).logsumexp(-1, keepdim=True) + LOG_SMALLEST
    return torch.where(x == -INF, temperature * floor, x)


def wanted(run):
    """The weighted gradient and the losses from `eager` in float64.

    TAID gives no mass to what either rules out, which is more than a small logit says.
    """
    s, u, labels, terms = inputs(run)
    gradient, losses = 0, []
    for term in terms:
        as_it_is = term.name == "taid" and term.parameters["t"] < 1
        pair = (x.double() if as_it_is else floored(x, term.kd_temperature) for x in (s, u))
        g, loss = eager(*pair, labels, [term], torch.float64)
        gradient, losses = gradient + g, [*losses, loss[0]]
    return gradient, torch.stack(losses)


def error(got, want):
    """Largest error, measured by the row's largest entry."""
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


@pytest.fixture(scope="module")
def results(interpreted):
    """{run: (gradient, losses), the same in float64, the same of eager in float32}."""
    found = {}
    for run in RUNS:
        s, u, labels, terms = inputs(run)
        got = interpreted[f"{run}/gradient"], interpreted[f"{run}/losses"]
        found[run] = got, wanted(run), eager(s, u, labels, terms)
    return found


NUMBERS = [name for name in ROWS if "number" not in name]
CASES = [(run, name) for run, (_, names, _) in RUNS.items() for name in names or ("whole",)
         if name not in ROWS or name in NUMBERS]


@pytest.mark.parametrize(("run", "name"), CASES)
def test_float32_keeps_six_digits(results, run, name):
    """For half-precision logits too. A saturated row has a gradient below its rounding, in the
    eager body as well, which then is the measure."""
    index = RUNS[run][1].index(name) if name in ROWS else 0
    (gradient, losses), (want, want_losses), (theirs, _) = results[run]
    allowed = max(2e-6, 2 * error(theirs[index], want[index]))
    if gradient.dtype == torch.bfloat16:
        allowed = 2**-7  # the interpreter cuts the last digits off, where the GPU rounds
    assert error(gradient[index], want[index]) < allowed
    for loss, expected in zip(losses[:, index].tolist(), want_losses[:, index].tolist(),
                              strict=True):
        assert loss == pytest.approx(expected, rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("run", [name for name in SINGLE if name != "ce"])
def test_nothing_is_left_at_agreement(results, run):
    (gradient, losses), _, _ = results[run]
    index = list(ROWS).index("agreement")
    assert not gradient[index].any()
    assert not losses[:, index].any()


def test_reverse_kl_of_logits_far_apart_stays_centred(results):
    """The one gradient whose centre comes from the first pass, as a mean of differences."""
    (gradient, _), _, _ = results["reverse_kl"]
    row = gradient[list(ROWS).index("far shift")].double()
    assert row.sum().abs() < 2e-6 * row.abs().max()


@pytest.mark.parametrize("run", SINGLE)
def test_losses_are_not_negative(results, run):
    (_, losses), _, _ = results[run]
    assert all(losses[0, list(ROWS).index(name)] >= 0 for name in NUMBERS)


@pytest.mark.parametrize("run", SINGLE)
def test_logits_that_are_no_numbers_are_not_hidden(results, run):
    (gradient, losses), _, _ = results[run]
    for name in set(ROWS) - set(NUMBERS):
        index = list(ROWS).index(name)
        seen = "teacher" not in name or run != "ce"
        assert losses[0, index].isnan() == gradient[index].isnan().any() == seen


def test_labels_outside_the_row_make_their_loss_not_a_number(interpreted):
    assert interpreted["outside/losses"].isnan().tolist() == [[False, True, True]]


def test_no_rows(interpreted):
    assert interpreted["empty/gradient"].shape == (0, WIDTH)
    assert interpreted["empty/losses"].shape == (8, 0)


# ----- which sums it takes ------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_sums_it_takes(run):
    assert kernels.supports(RUNS[run][0])


UNSUPPORTED = {
    "nothing": [],
    "other loss": [BodyTerm("tvd")],
    "two TAIDs": [SINGLE["taid"]] * 2,
    "two temperatures": [BodyTerm("forward_kl"), BodyTerm("reverse_kl", 1.0, 2.0)],
    "data with a temperature": [BodyTerm("ce", 1.0, 2.0)],
    "a bound": [BodyTerm("forward_kl", parameters={"clip": 1.0})],
    "hard tokens": [BodyTerm("ce", parameters={"focus": 1.0})],
    "too many": [SINGLE["jsd"]] * 9,
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_sums_it_does_not_take(case):
    assert not kernels.supports(UNSUPPORTED[case])


@pytest.mark.parametrize(("dtype", "message"), [
    (torch.float64, "float32, bfloat16 or float16 logits, got torch.float64 and torch.float64"),
    (torch.float32, "runs on CUDA, but the logits are on the CPU"),
])
def test_what_it_cannot_run_is_refused(dtype, message):
    s, u, labels, terms = inputs("all")
    with pytest.raises(TaidError, match=message):
        kernels.triton_body(s.to(dtype), u.to(dtype), labels, terms)


def test_the_package_does_without_triton():
    code = ("import sys; sys.modules['triton'] = None; "
            "import taid_vlm, taid_vlm.cli, taid_vlm.fused.bodies")
    subprocess.run([sys.executable, "-c", code], check=True)


# ----- compiled for sm_90 -------------------------------------------------------------------


@pytest.fixture
def compiled_for_hopper(monkeypatch, tmp_path):
    """Compiles the kernel as `triton_body` would launch it on that GPU; nothing is run."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(driver, "_active", SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32)))

    def build(terms, dtype=torch.float32):
        s, u = torch.zeros(2, 3, 64, dtype=dtype)
        results = torch.empty(3, 64, dtype=dtype), torch.empty(len(terms), 3)
        arguments, options = kernels.launch_arguments(
            s, u, torch.zeros(3, dtype=torch.long), terms, *results)
        return kernels.row_kernel.warmup(*arguments, grid=(3,), **options)

    return build


def resources(kernel, tmp_path):
    """{"REG": per thread, "STACK": bytes, "SHARED": bytes, "LOCAL": bytes} of a compiled kernel."""
    from triton import knobs

    path = tmp_path / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    listed = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", str(path)], check=True,
                            capture_output=True, text=True).stdout
    return {key: int(number) for key, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)",
                                                           listed)}


COMPILED = {
    **{name: [term] for name, term in SINGLE.items()},
    "forward and reverse": [SINGLE["forward_kl"], SINGLE["reverse_kl"]],
    "skews": [SINGLE["skew_kl"], SINGLE["skew_rkl"]],
    "taid and ce": TAID_AND_CE,
    "three": [SINGLE["jsd"], SINGLE["skew_kl"], SINGLE["reverse_kl"]],
    "all": weighted(2.5),
}


@pytest.mark.parametrize("case", COMPILED)
def test_registers_do_not_spill(compiled_for_hopper, tmp_path, case):
    dtype = torch.bfloat16 if case == "taid and ce" else torch.float32
    kernel = compiled_for_hopper(COMPILED[case], dtype)
    used = resources(kernel, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert 0 < used["REG"] <= 128
    assert re.search(r"ld\.global\.v[24]", kernel.asm["ptx"])
    # where a row lies may be more than 32 bits count
    assert set(re.findall(r"arith\.muli %.* : (i\d+)", kernel.asm["ttir"])) == {"i64"}
    if dtype == torch.bfloat16:
        assert "cvt.rn.bf16" in kernel.asm["ptx"]


def test_wider_blocks_would_spill(compiled_for_hopper, tmp_path, monkeypatch):
    """A test of the test above: 128 logits of each model in a thread that has 128 registers, which
    no compiler can keep there (at what width it gives up differs between Triton 3.6 and 3.8)."""
    monkeypatch.setattr(kernels, "BLOCK", 2**17)
    assert resources(compiled_for_hopper(TAID_AND_CE), tmp_path)["STACK"] > 0


if __name__ == "__main__":
    interpret(sys.argv[1])
