"""The inside of the fused objective: logits of some rows in, gradient and losses out.

One signature, three bodies: `eager` (the reference, every loss), `compiled` (the same function
through torch.compile, so that the mathematics stands in one place) and, on CUDA, Triton
(`kernels.py`). Logits are [n, V] of one width; what brings them there stays outside.

The first two work a few rows at a time: on a CPU as many as its caches hold, which halves their
time, elsewhere so many that what they need beside their result is about 64 MiB, or that of one row.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from taid_vlm.config.objective import MOVING
from taid_vlm.errors import TaidError, nearest
from taid_vlm.fused.terms import BodyTerm
from taid_vlm.objectives.compiling import can_compile, row_groups, should_compile
from taid_vlm.objectives.divergences import closed_form, upcast

BODIES = ("auto", "eager", "compiled", "triton")
SCRATCH, SCRATCH_COMPILED = 16, 4  # float32 [n, V] that a sum of terms has in use at a time, about
# torch 2.11 compiles a sum that is written over its own logits so that later terms read gradients
WRITES_TOO_EARLY = torch.__version__ < (2, 14)  # type: ignore[operator]

Body = Callable[..., tuple[Tensor, Tensor]]


def eager(
    s: Tensor, u: Tensor | None, labels: Tensor | None, terms: Sequence[BodyTerm],
    dtype: torch.dtype = torch.float32, in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """All terms on one chunk of rows, through the package's own closed forms.

    Args:
        s: student logits [n, V]. u: teacher logits [n, V], or None if no term needs them.
        labels: [n], or None if no term needs them.
        terms: at least one.
        dtype: of the gradient; the mathematics is in float32 (float64 for float64 logits).
        in_place: write the gradient over s, which must then be of that dtype.

    Returns:
        The weighted sum's gradient in s [n, V], and every term's unweighted loss [len(terms), n].
    """
    inside = functools.partial(_sum_of_terms, terms=terms)
    return _by_rows(inside, s, u, labels, len(terms), None if in_place else dtype, SCRATCH)


def compiled(
    s: Tensor, u: Tensor | None, labels: Tensor | None, terms: Sequence[BodyTerm],
    dtype: torch.dtype = torch.float32, in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """`eager` as one fused loop per pass over the rows.

    Compiled once per sum of terms and width, and once more where t is exactly 0 or 1 or a chunk
    has one row.
    """
    key, t = _without_t(terms)
    body = _compiled(key, dtype)

    def inside(s: Tensor, u: Tensor | None, labels: Tensor | None, out: Tensor | None) -> Tensor:
        apart = torch.empty_like(s, dtype=dtype) if out is None and WRITES_TOO_EARLY else out
        for logits in (s, u, apart):
            if logits is not None:
                torch._dynamo.mark_static(logits, 1)
        losses = body(s, u, labels, apart, t)
        if apart is not out and apart is not None:
            s.copy_(apart)
        return losses

    return _by_rows(
        inside, s, u, labels, len(terms), None if in_place else dtype, SCRATCH_COMPILED)


def _by_rows(
    inside: Callable[..., Tensor], s: Tensor, u: Tensor | None, labels: Tensor | None, terms: int,
    dtype: torch.dtype | None, scratch: int,
) -> tuple[Tensor, Tensor]:
    """`inside` writes the gradient of its rows into its last argument, and gives their losses.

    Args:
        dtype: of the gradient; None to write it over s.
    """
    gradient = None if dtype is None else torch.empty(s.shape, dtype=dtype, device=s.device)
    losses = s.new_empty(terms, len(s), dtype=upcast(s[:0]).dtype)
    for rows in row_groups(len(s), s.shape[1], s.device.type, scratch):
        losses[:, rows] = inside(
            s[rows], None if u is None else u[rows], None if labels is None else labels[rows],
            None if gradient is None else gradient[rows])
    return s if gradient is None else gradient, losses


def _sum_of_terms(
    s: Tensor, u: Tensor | None, labels: Tensor | None, out: Tensor | None,
    terms: Sequence[BodyTerm],
) -> Tensor:
    gradient, losses = None, []
    for term in terms:
        loss, g = closed_form(
            s, None if term.name == "ce" else u, labels, term.name, term.kd_temperature,
            dict(term.parameters))
        g = g if term.weight == 1.0 else term.weight * g
        gradient = g if gradient is None else gradient + g
        losses.append(loss)
    assert gradient is not None
    (s if out is None else out).copy_(gradient)
    return torch.stack(losses)


def _without_t(terms: Sequence[BodyTerm]) -> tuple[str, float]:
    """The sum as a key, and the one number that changes from step to step."""
    t = next((term.parameters["t"] for term in terms if term.name in MOVING), 0.0)
    return json.dumps([
        [term.name, term.weight, term.kd_temperature,
         {name: x for name, x in term.parameters.items() if name != "t"}] for term in terms
    ]), float(t)


@functools.cache
def _compiled(key: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    plain = [BodyTerm(*fields) for fields in json.loads(key)]

    def body(
        s: Tensor, u: Tensor | None, labels: Tensor | None, out: Tensor | None, t: float
    ) -> Tensor:
        terms = [replace(term, parameters={**term.parameters, "t": t})
                 if term.name in MOVING else term for term in plain]
        return _sum_of_terms(s, u, labels, out, terms)

    # what is compiled is kept, and counted against a limit, per code object: one for every sum
    body.__code__ = body.__code__.replace(co_name=f"body_{_compiled.cache_info().misses}")
    return torch.compile(body, dynamic=True)  # neither rows nor t compile it again


def choose_body(
    name: str, device: torch.device, terms: Sequence[BodyTerm], elements: int,
    dtype: torch.dtype = torch.float32,
) -> Body:
    """The body of that name; "auto" takes the fastest for `elements` logits of that dtype there.

    Raises:
        TaidError: an unknown name, or one that cannot run here.
    """
    if name not in BODIES:
        raise TaidError(f"body = {name!r}.{nearest(name, BODIES)}")
    tried = name == "triton" or (
        name == "auto" and device.type == "cuda" and dtype != torch.float64)
    if tried and (found := _triton(name, terms)):
        return found
    if name == "compiled" and not can_compile(device.type):
        raise TaidError(f"body = 'compiled' finds no compiler for {device.type}; install a C++ "
                        "compiler (g++ or clang) or, on CUDA, triton, or take body: eager.")
    if name == "compiled" or (name == "auto" and should_compile(elements, device.type)):
        return compiled
    return eager


def _triton(name: str, terms: Sequence[BodyTerm]) -> Body | None:
    """The Triton body, if it is there and has all terms; an error where it was asked for."""
    if importlib.util.find_spec("triton") is None:
        if name == "triton":
            raise TaidError("body = 'triton' needs the package triton. Take body: auto.")
        return None
    from taid_vlm.fused import kernels

    if kernels.supports(terms):
        return kernels.triton_body
    if name == "triton":
        raise TaidError(f"body = 'triton' does not have all of {[t.name for t in terms]}.")
    return None
