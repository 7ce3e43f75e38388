"""The inside of the fused objective in Triton: one program per row, nothing stored but results.

The first pass over a row takes its maxima and sums online; the last writes losses and gradient.
TAID, the forward and reverse KL and the cross-entropy need no more. Losses with a mixture of
probabilities (JSD, skew KLs), and the reverse KL of a row with an infinite logit, have a pass
between them, for `sum(a)` of `divergences.py`.

The mathematics is that of `divergences.py` in float32. Its log ratio is `r = d - c`, where d is
teacher minus student logit and `c = log E_q[e^d]` comes from expm1 where every |d| < 1, and from
differences of maxima and the logarithm of a quotient of sums elsewhere, never from two
logsumexps; e^r - 1 - r has a series up to |r| = 1.

Importing this file needs the package `triton`; it runs on CUDA, and on CPU with TRITON_INTERPRET=1.
"""
# mypy: allow-untyped-defs
# (a function of the device is not called with what its Python signature would say)

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from taid_vlm.errors import TaidError
from taid_vlm.fused.terms import BodyTerm
from taid_vlm.objectives.divergences import LOG_SMALLEST, LOSSES

# Logits of a row in flight for one term. A sum needs more registers for each logit, so that two
# terms take half as many and more a quarter: with that, no sum of these losses spills registers.
BLOCK = 4096
WARPS = 16
MOST_TERMS = 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

FLOOR = tl.constexpr(LOG_SMALLEST)
INF = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # a first maximum that can be subtracted

# kind of a mixture: (its parameter, whether that is the teacher's share in it)
MIXTURES = {"jsd": ("beta", True), "skew_kl": ("lam", True), "skew_rkl": ("lam", False)}
KINDS = ("taid", "forward_kl", "reverse_kl", *MIXTURES, "ce")
COMPARED = tl.constexpr(("taid", "forward_kl", "reverse_kl", *MIXTURES))
WITH_TEACHER = tl.constexpr(("forward_kl", "reverse_kl", *MIXTURES))
WITH_MEAN = tl.constexpr(("reverse_kl",))
WITH_TARGET = tl.constexpr(("taid",))
WITH_MIXTURE = tl.constexpr(tuple(MIXTURES))
DATA = tl.constexpr(("ce",))

# weight of the gradient, factor of the loss, shares of teacher and student in a mixture, their logs
Numbers = tuple[float, float, float, float, float, float]


# ----- what the host does -------------------------------------------------------------------


def supports(terms: Sequence[BodyTerm]) -> bool:
    """Whether `triton_body` can do this weighted sum.

    It can for up to eight of TAID, forward, reverse and skew KLs, JSD and cross-entropy, with
    one TAID term, one kd_temperature and a cross-entropy without one; without focus and clip.
    """
    compared = [term for term in terms if term.name != "ce"]
    return (0 < len(terms) <= MOST_TERMS
            and all(term.name in KINDS and not {"focus", "clip"} & term.parameters.keys()
                    for term in terms)
            and sum(term.name == "taid" for term in terms) <= 1
            and len({term.kd_temperature for term in compared}) <= 1
            and all(term.kd_temperature == 1 for term in terms if term.name == "ce"))


def triton_body(
    s: Tensor, u: Tensor | None, labels: Tensor | None, terms: Sequence[BodyTerm],
    dtype: torch.dtype = torch.float32, in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """All terms on some rows, as `bodies.eager`, for terms that `supports` accepts.

    Args:
        s: student logits [n, V], float32, bfloat16 or float16; rows may be a view.
        u: teacher logits [n, V], or None if no term needs them.
        labels: [n], or None if no term needs them. A label outside the row makes its loss NaN.
        dtype: of the gradient.
        in_place: refused. The gradient has a buffer of its own: narrowing in the logits' place
            would overwrite what other threads still read.

    Returns:
        The weighted sum's gradient in s [n, V] in `dtype`, and every term's unweighted loss
        [len(terms), n], float32.
    """
    if s.dtype not in DTYPES or (u is not None and u.dtype not in DTYPES):
        raise TaidError(f"body = 'triton' takes float32, bfloat16 or float16 logits, got {s.dtype}"
                        f"{'' if u is None else f' and {u.dtype}'}. Take body: eager.")
    if s.device.type == "cpu" and isinstance(row_kernel, triton.JITFunction):
        raise TaidError("body = 'triton' runs on CUDA, but the logits are on the CPU. Take body: "
                        "auto.")
    assert not in_place
    gradient = torch.empty(s.shape, dtype=dtype, device=s.device)
    losses = torch.empty(len(terms), len(s), dtype=torch.float32, device=s.device)
    if len(s):
        arguments, options = launch_arguments(s, u, labels, terms, gradient, losses)
        with torch.cuda.device_of(s):
            row_kernel[(len(s),)](*arguments, **options)
    return gradient, losses


def launch_arguments(
    s: Tensor, u: Tensor | None, labels: Tensor | None, terms: Sequence[BodyTerm],
    gradient: Tensor, losses: Tensor,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `row_kernel` is called with: arguments, and what it is compiled for."""
    compared = [term for term in terms if term.name != "ce"]
    assert not compared or (u is not None and u.shape == s.shape)
    assert len(compared) == len(terms) or labels is not None
    temperature = float(compared[0].kd_temperature) if compared else 1.0
    kinds, numbers = zip(*(_planned(term) for term in terms), strict=True)
    t = next((float(term.parameters["t"]) for term in terms if term.name == "taid"), 0.0)
    s = _rows(s)
    u = s if u is None else _rows(u)
    labels = losses if labels is None else labels.contiguous()
    arguments = (s, u, gradient, losses, labels, s.stride(0), u.stride(0), *s.shape,
                 1 / temperature, t, numbers)
    return arguments, {
        "KINDS": kinds, "SCALED": "ce" in kinds and temperature != 1, "SLOTS": MOST_TERMS,
        "BLOCK": BLOCK // {1: 1, 2: 2}.get(len(terms), 4), "num_warps": WARPS,
        "enable_fp_fusion": True}


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _planned(term: BodyTerm) -> tuple[str, Numbers]:
    """The kernel's name of a term, its limits resolved, and its numbers."""
    name, scale = term.name, float(term.kd_temperature)
    share, rest = 0.0, 1.0
    if name in MIXTURES:
        key, of_teacher = MIXTURES[name]
        default = inspect.signature(LOSSES[name].function).parameters[key].default
        share = float(term.parameters.get(key, default))
        share, rest = (share, 1 - share) if of_teacher else (1 - share, share)
        if share == 0:
            name = "forward_kl"  # the mixture is the student
        elif rest == 0:
            name = "reverse_kl"  # it is the teacher
    elif name == "taid" and term.parameters["t"] == 1:
        name = "forward_kl"
    log_share, log_rest = (math.log(x) if x > 0 else -math.inf for x in (share, rest))
    return name, (float(term.weight) * scale, scale**2, share, rest, log_share, log_rest)


@triton.constexpr_function
def _has(kinds, wanted):
    """Whether a term of the sum is one of those wanted; known when the kernel is compiled."""
    return any(kind in wanted for kind in kinds)


# ----- functions of one number --------------------------------------------------------------


@triton.jit
def _second_order(x):
    """e^x - 1 - x for |x| <= 1."""
    high = 1 / 5040 + x * (1 / 40320 + x * (1 / 362880 + x * (1 / 3628800 + x / 39916800)))
    return x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * high)))))


@triton.jit
def _expm1(x):
    return tl.where(tl.abs(x) <= 1.0, x + _second_order(x), tl.exp(x) - 1.0)


@triton.jit
def _log1p(x):
    """log(1 + x) for 1 + x between 1 / e and e, by the series of the inverse hyperbolic tangent."""
    z = x / (2.0 + x)
    y = z * z
    high = 1 / 11 + y * (1 / 13 + y * (1 / 15 + y * (1 / 17 + y / 19)))
    return 2 * z * (1 + y * (1 / 3 + y * (1 / 5 + y * (1 / 7 + y * (1 / 9 + y * high)))))


@triton.jit
def _log_mixture(r, share, log_share, log_rest):
    """log m - log q and log p - log m, where m = share p + rest q."""
    of_p, of_q = r + log_share, log_rest
    far = tl.abs(r) > 1.0
    near = share * (r + _second_order(r))
    log1p = _log1p(tl.where(far, tl.exp(-tl.abs(of_p - of_q)), near))
    d = log1p + tl.where(far, tl.maximum(of_p, of_q), 0.0)
    # where p fills the mixture, both r and d are large, and their difference has lost its digits
    return d, tl.where(far & (of_p > of_q), -log_share - log1p, r - d)


@triton.jit
def _orders(w, p, x):
    """p - w, where p = w e^x, and the terms of KL(p || w) and of KL(w || p), which are >= 0."""
    near, second = tl.abs(x) <= 1.0, _second_order(x)
    gap = tl.where(near, w * (x + second), p - w)
    forward = x * tl.where(near, gap, p) - tl.where(near, w * second, gap)
    return gap, forward, tl.where(near, w * second, gap - w * x)


# ----- one block of a row -------------------------------------------------------------------


@triton.jit
def _load(S, U, start, width, BLOCK: tl.constexpr):
    """Logits of student and teacher, and their difference; what both rule out does not differ.

    Behind the row's end both rule out every token, which therefore contributes nothing.
    """
    at = start + tl.arange(0, BLOCK)
    s = tl.load(S + at, mask=at < width, other=-INF).to(tl.float32)
    u = tl.load(U + at, mask=at < width, other=-INF).to(tl.float32)
    return s, u, tl.where(s == u, 0.0, u - s)


@triton.jit
def _interpolated(s, d, t):
    """TAID's logits and their distance from s; infinite d: ruled out, except at t = 0."""
    d = tl.where(t == 0.0, 0.0, t * d)
    return tl.where(tl.abs(d) == INF, -INF, s + d), d


@triton.jit
def _absorb(top, total, x, inverse):
    """One block of an online softmax: maximum, sum, this block's weights, factor of older sums."""
    new = tl.maximum(top, tl.max(x, 0))
    weights = tl.exp((x - new) * inverse)
    older = tl.exp((top - new) * inverse)
    return new, total * older + tl.sum(weights, 0), weights, older


@triton.jit
def _ratio(d, c, log_q, log_p):
    """log p - log q, the logarithm of a probability 0 being FLOOR."""
    ruled_out = tl.where(d < 0, FLOOR - log_q, tl.maximum(log_p, FLOOR) - FLOOR)
    return tl.where(tl.abs(d) == INF, ruled_out, d - c)


@triton.jit
def _term(q, p, r, p_t, r_t, numbers, KINDS: tl.constexpr, AT: tl.constexpr):
    """a = q dL/dq and the loss's summands, for one term that compares with the teacher.

    The kind comes as a place in KINDS: Triton 3.6 takes a string of a tuple for a tensor.
    """
    KIND: tl.constexpr = KINDS[AT]
    if KIND == "taid":
        gap, loss, _ = _orders(q, p_t, r_t)
        a = -gap
    elif KIND == "forward_kl":
        gap, loss, _ = _orders(q, p, r)
        a = -gap
    elif KIND == "reverse_kl":
        _, _, loss = _orders(q, p, r)
        a = -q * r
    else:
        _, _, share, rest, log_share, log_rest = numbers
        m = share * p + rest * q
        d, x = _log_mixture(r, share, log_share, log_rest)
        _, from_p, _ = _orders(m, p, x)
        _, _, from_q = _orders(q, m, d)
        if KIND == "jsd":
            a, loss = -rest * q * d, share * from_p + rest * from_q
        elif KIND == "skew_kl":
            a, loss = -rest * q * _expm1(x), from_p
        else:
            a, loss = -q * (d + rest * _expm1(-d)), from_q
    return a, loss


@triton.jit
def _compare(s, u, d, row, inverse, t, numbers, KINDS: tl.constexpr, SLOTS: tl.constexpr):
    """q, the weighted sum of all a, and every term's loss [SLOTS] on one block."""
    top, log_z, top_u, log_zu, c, top_m, log_zm, c_m = row
    log_q, log_p = (s - top) * inverse - log_z, (u - top_u) * inverse - log_zu
    m, d_m = _interpolated(s, d, t)
    log_p_t = (m - top_m) * inverse - log_zm
    q, p, p_t = tl.exp(log_q), tl.exp(log_p), tl.exp(log_p_t)
    r = _ratio(d * inverse, c, log_q, log_p)
    r_t = _ratio(d_m * inverse, c_m, log_q, log_p_t)
    total, slot = tl.zeros_like(q), tl.arange(0, SLOTS)
    losses = tl.zeros([SLOTS], tl.float32)
    for i in tl.static_range(len(KINDS)):
        if KINDS[i] != "ce":
            a, loss = _term(q, p, r, p_t, r_t, numbers[i], KINDS, i)
            total += numbers[i][0] * a
            losses += tl.where(slot == i, numbers[i][1] * tl.sum(loss, 0), 0.0)
    return q, total, losses


# ----- passes over a row --------------------------------------------------------------------


@triton.jit
def _constant(near, total, widest, far):
    """log E_q[e^d] from E_q[e^d - 1] where every |d| < 1."""
    return tl.where(widest < 1.0, _log1p(tl.div_rn(near, total)), far)


@triton.jit
def _small(weights, d):
    """The sum of weights times e^d - 1, of use only if every |d| < 1 (2 leaves room to round)."""
    return tl.sum(tl.where(tl.abs(d) < 2.0, weights * (d + _second_order(d)), 0.0), 0)


@triton.jit
def _statistics(S, U, width, inverse, t, KINDS: tl.constexpr, SCALED: tl.constexpr,
                BLOCK: tl.constexpr):
    """The row's normalisers, its reverse KL and largest |d|, and its log sum at temperature 1."""
    top = tl.full((), LOWEST, tl.float32)
    top_u, top_m, shift = top, top, top * 0.0
    z, z_data, z_u, z_m = 0.0, 0.0, 0.0, 0.0
    near, near_m, mean, widest = 0.0, 0.0, 0.0, 0.0
    for start in range(0, width, BLOCK):
        s, u, d = _load(S, U, start, width, BLOCK)
        m, d_m = _interpolated(s, d, t)
        d, d_m = d * inverse, d_m * inverse
        old_top, old_z, old_shift = top, z, shift
        top, z, weights, older = _absorb(top, z, s, inverse)
        if SCALED:
            z_data = z_data * tl.exp(old_top - top) + tl.sum(tl.exp(s - top), 0)
        if _has(KINDS, COMPARED):
            widest = tl.maximum(widest, tl.max(tl.where(tl.abs(d) < INF, tl.abs(d), INF), 0))
        if _has(KINDS, WITH_TEACHER):
            near = near * older + _small(weights, d)
            top_u, z_u, _, _ = _absorb(top_u, z_u, u, inverse)
        if _has(KINDS, WITH_MEAN):
            # from the difference of the maxima, so that logits far apart keep their digits
            shift = (top_u - top) * inverse
            mean = (mean + (old_shift - shift) * old_z) * older
            mean += tl.sum(tl.where(tl.abs(d) < INF, weights * (d - shift), 0.0), 0)
        if _has(KINDS, WITH_TARGET):
            near_m = near_m * older + _small(weights, d_m)
            top_m, z_m, _, _ = _absorb(top_m, z_m, m, inverse)
    c = _constant(near, z, widest, (top_u - top) * inverse + tl.log(tl.div_rn(z_u, z)))
    c_m = _constant(near_m, z, t * widest, (top_m - top) * inverse + tl.log(tl.div_rn(z_m, z)))
    row = (top, tl.log(z), top_u, tl.log(z_u), c, top_m, tl.log(z_m), c_m)
    return row, c - shift - mean / z, widest, tl.log(z_data if SCALED else z)


@triton.jit
def _pass_for_a(S, U, width, row, inverse, t, numbers, KINDS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of all a over the row."""
    total = 0.0
    for start in range(0, width, BLOCK):
        s, u, d = _load(S, U, start, width, BLOCK)
        _, a, _ = _compare(s, u, d, row, inverse, t, numbers, KINDS, 1)
        total += tl.sum(a, 0)
    return total


@triton.jit
def _sum_of_a(S, U, width, row, reverse, widest, inverse, t, numbers, KINDS: tl.constexpr,
              BLOCK: tl.constexpr):
    """The sum of all a: 0 for TAID and the forward KL, the reverse KL itself for that."""
    total = 0.0
    if _has(KINDS, WITH_MIXTURE):
        total = _pass_for_a(S, U, width, row, inverse, t, numbers, KINDS, BLOCK)
    elif _has(KINDS, WITH_MEAN):
        for i in tl.static_range(len(KINDS)):
            if KINDS[i] == "reverse_kl":
                total += numbers[i][0] * reverse
        if widest == INF:
            total = _pass_for_a(S, U, width, row, inverse, t, numbers, KINDS, BLOCK)
    return total


@triton.jit
def _on_data(S, label, top, log_z, numbers, KINDS: tl.constexpr, SLOTS: tl.constexpr):
    """Weight of the cross-entropy's gradient, and its loss in its slot [SLOTS]; label -1: NaN."""
    weight, losses = 0.0, tl.zeros([SLOTS], tl.float32)
    s = tl.load(S + label, mask=label >= 0, other=float("nan")).to(tl.float32)
    loss = tl.where(s == -INF, -FLOOR, log_z - (s - top))
    for i in tl.static_range(len(KINDS)):
        if KINDS[i] == "ce":
            weight += numbers[i][0]
            losses += tl.where(tl.arange(0, SLOTS) == i, loss, 0.0)
    return weight, losses


@triton.jit(do_not_specialize=["n"])
def row_kernel(S, U, G, L, labels, s_stride, u_stride, n, width, inverse, t, numbers,
               KINDS: tl.constexpr, SCALED: tl.constexpr, SLOTS: tl.constexpr,
               BLOCK: tl.constexpr):
    """Gradient [n, width] and losses [len(KINDS), n] of the program's row; rows of G are dense."""
    index = tl.program_id(0).to(tl.int64)
    S, U, G = S + index * s_stride, U + index * u_stride, G + index * width
    row, reverse, widest, log_z_data = _statistics(
        S, U, width, inverse, t, KINDS, SCALED, BLOCK)
    sum_a = _sum_of_a(S, U, width, row, reverse, widest, inverse, t, numbers, KINDS, BLOCK)
    losses, slot, label, weight = tl.zeros([SLOTS], tl.float32), tl.arange(0, SLOTS), 0, 0.0
    if _has(KINDS, DATA):
        label = tl.load(labels + index)
        label = tl.where((label >= 0) & (label < width), label, -1).to(tl.int32)
        weight, losses = _on_data(S, label, row[0], log_z_data, numbers, KINDS, SLOTS)
    for start in range(0, width, BLOCK):
        s, u, d = _load(S, U, start, width, BLOCK)
        at = start + tl.arange(0, BLOCK)
        q, a, summands = _compare(s, u, d, row, inverse, t, numbers, KINDS, SLOTS)
        gradient, losses = a - q * sum_a, losses + summands
        if _has(KINDS, DATA):
            on_data = tl.exp(s - row[0] - log_z_data)
            gradient += weight * (on_data - tl.where(at == label, 1.0, 0.0))
        tl.store(G + at, gradient.to(G.dtype.element_ty), mask=at < width)
    tl.store(L + slot * n + index, losses, mask=slot < len(KINDS))
