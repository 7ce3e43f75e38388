"""Per-token divergences between a teacher and a student, in closed form.

Shapes: N tokens, V vocabulary entries. s, u are student and teacher logits [N, V];
q = softmax(s), p = softmax(u). Losses are nats per token, float32 (float64 stays float64),
unreduced. No gradient reaches the teacher.

Every loss is one function `Pair -> (loss [N], a [N, V])` with `a = q * dL/dq`, up to a multiple
of q; the gradient in the student's logits is then always `a - q * sum(a)`. All of them are
written in the log ratio `r = log p - log q`, with expm1 or a series where q is near p, because
the textbook forms lose all their digits exactly where distillation ends: at agreement.

A logit of -inf has probability 0, and its logarithm counts as that of the smallest float32, so
that losses stay finite instead of turning into 0 * inf.

To add a loss: write its function, name it in `LOSSES`, and say in `config/objective.py` what a
recipe calls it and its parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from taid_vlm.config.kinds import Share
from taid_vlm.config.objective import MOVING, TERMS, canonical_name, scheduled_keys
from taid_vlm.config.objective import Term as TermSpec
from taid_vlm.config.section import Section, check
from taid_vlm.errors import RecipeError, nearest
from taid_vlm.objectives.arithmetic import expm1, log1p, row_logsumexp, row_sum

LOG_SMALLEST = -149 * math.log(2)  # log of the smallest positive float32
# where |r| is smaller, a series of five terms is exact to the dtype's digits
SERIES_BELOW = {torch.float32: 0.1, torch.float64: 1e-3}
MOST_EXPONENT = 80.0  # beyond, e^r swamps everything beside it, and nears the end of float32
CACHED = 2**19  # logits on which a thread of a CPU works at a time, pass after pass
CHUNK_ELEMENTS = 2**24  # rows are worked on in chunks of about this many logits (64 MiB float32)


@dataclass(frozen=True)
class Pair:
    """Student against target: log q (floored) and the log ratio r = log p - log q, both [N, V]."""

    log_q: Tensor
    r: Tensor
    labels: Tensor | None = None  # [N], only for losses on the data

    @property
    def q(self) -> Tensor:
        """The student's probabilities; 0, and so without gradient, where it rules a token out."""
        return torch.where(self.log_q > LOG_SMALLEST, self.log_q.exp(), 0.0)

    @property
    def log_p(self) -> Tensor:
        return self.log_q + self.r


def make_pair(
    s: Tensor, u: Tensor, labels: Tensor | None = None, difference: Tensor | None = None
) -> Pair:
    """Pair of student logits `s` and target logits `u`, both [N, V] in working precision.

    `difference` is u - s where the caller knows it without the rounding of u.
    """
    z_s, z_u = row_logsumexp(s), row_logsumexp(u)
    log_q, d = s - z_s, u - s if difference is None else difference
    r = d - _normaliser_difference(log_q, d, z_u - z_s)
    # where a logit is -inf, the difference above is infinite or NaN
    floored = _floored(log_q)
    return Pair(floored, torch.where(r.abs() < torch.inf, r, _floored(u - z_u) - floored), labels)


def _alone(s: Tensor, labels: Tensor | None) -> Pair:
    """For losses on the data, which look at no ratio."""
    return Pair(_floored(s - row_logsumexp(s)), s, labels)


def _normaliser_difference(log_q: Tensor, d: Tensor, plain: Tensor) -> Tensor:
    """logsumexp(u) - logsumexp(s) [N, 1], as log E_q[e^d] where d = u - s is small.

    Two logsumexps of size 10 leave an error of 1e-6 in every log ratio, which is what the ratios
    themselves are worth near agreement.
    """
    near = torch.log1p(row_sum(log_q.exp() * expm1(d.clamp(max=1.0)))[:, None])
    return torch.where(d.abs().amax(-1, keepdim=True) < 1.0, near, plain)


def _floored(log_p: Tensor) -> Tensor:
    """Log-probabilities with -inf as the log of the smallest float32."""
    return log_p.masked_fill(log_p == -torch.inf, LOG_SMALLEST)


def interpolate(s: Tensor, u: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """TAID's intermediate logits (1 - t) s + t u (paper, section 3), and their distance from s.

    A token that either model rules out (-inf) is ruled out for 0 < t < 1; t = 0 is the student
    and t = 1 the teacher, without 0 * inf.
    """
    if t == 0.0:
        return s, torch.zeros_like(s)
    if t == 1.0:
        return u, u - s
    difference = t * (u - s)
    # comparisons, which compiled loops have in vectors, unlike isinf and isfinite
    ruled_out = (s.abs() == torch.inf) | (u.abs() == torch.inf)
    return torch.where(ruled_out, -torch.inf, s + difference), difference


def alpha_mixture(s: Tensor, u: Tensor, t: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Logits of AMiD's assistant, and their distance from s: the means of order c = (1 - alpha) / 2
    of both laws, ((1 - t) q^c + t p^c)^(1/c), in logarithms. alpha = 1 (c = 0) is `interpolate`.
    """
    c = (1 - alpha) / 2
    if c == 0 or t in (0.0, 1.0):
        return interpolate(s, u, t)
    pair = make_pair(s, u)
    distance = _log_mixture(c * pair.r, t) / c
    return s + distance, distance


# ----- terms that vanish to second order at r = 0 -------------------------------------------


def _scaled_expm1(log_w: Tensor, x: Tensor) -> Tensor:
    """exp(log_w) * expm1(x), also where the weight underflows while expm1 overflows."""
    small = log_w.exp() * expm1(x.clamp(max=1.0))
    return torch.where(x > 1.0, (log_w + x).exp() - log_w.exp(), small)


def _forward_terms(log_q: Tensor, r: Tensor) -> Tensor:
    """q (r e^r - e^r + 1): sums to KL(p || q), and every term is >= 0."""
    near = r * r * (1 / 2 + r * (1 / 3 + r * (1 / 8 + r * (1 / 30 + r / 144))))
    e = expm1(r.clamp(max=1.0))
    middle = torch.where(r.abs() < SERIES_BELOW[r.dtype], near, (1 + e) * r - e)
    q = log_q.exp()
    return torch.where(r > 1.0, (log_q + r).exp() * (r - 1) + q, q * middle)


def _reverse_terms(log_q: Tensor, r: Tensor) -> Tensor:
    """q (e^r - 1 - r): sums to KL(q || p), and every term is >= 0."""
    near = r * r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + r * (1 / 120 + r / 720))))
    middle = torch.where(r.abs() < SERIES_BELOW[r.dtype], near, expm1(r.clamp(max=1.0)) - r)
    q = log_q.exp()
    return torch.where(r > 1.0, (log_q + r).exp() - q * (1 + r), q * middle)


def _log_mixture(r: Tensor, weight: float) -> Tensor:
    """log((1 - weight) q + weight p) - log q."""
    log_weight = math.log(weight) if weight > 0 else -math.inf
    near = log1p(weight * expm1(r.clamp(max=MOST_EXPONENT)))
    return torch.where(r < MOST_EXPONENT, near, (r + log_weight).clamp(min=0.0))


# ----- the losses ---------------------------------------------------------------------------

Result = tuple[Tensor, Tensor]


def forward_kl(pair: Pair) -> Result:
    """KL(p || q), the classic distillation loss (Hinton et al., 2015)."""
    return row_sum(_forward_terms(pair.log_q, pair.r)), -_scaled_expm1(pair.log_q, pair.r)


def taid(pair: Pair) -> Result:
    """KL(p_t || q) with p_t = softmax((1 - t) sg(s) + t u) (TAID, ICLR 2025).

    The pair's target is already the interpolation; q stays attached only in the second place.
    """
    return forward_kl(pair)


def amid(pair: Pair) -> Result:
    """KL(r || q) with r the alpha-mixture of sg(q) and p (AMiD, Shin et al., 2026), as `taid`."""
    return forward_kl(pair)


def reverse_kl(pair: Pair) -> Result:
    """KL(q || p) (MiniLLM, Gu et al., 2024)."""
    return row_sum(_reverse_terms(pair.log_q, pair.r)), -pair.q * pair.r


def jsd(pair: Pair, beta: float = 0.5) -> Result:
    """Generalised Jensen-Shannon divergence (GKD, Agarwal et al., 2024).

    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q; beta = 0 is the
    forward and beta = 1 the reverse KL, the convention users know.
    """
    if beta == 0.0:
        return forward_kl(pair)
    if beta == 1.0:
        return reverse_kl(pair)
    d = _log_mixture(pair.r, beta)
    from_p = row_sum(_forward_terms(pair.log_q + d, pair.r - d))
    from_q = row_sum(_reverse_terms(pair.log_q, d))
    return beta * from_p + (1 - beta) * from_q, -(1 - beta) * pair.q * d


def skew_kl(pair: Pair, lam: float = 0.1) -> Result:
    """KL(p || lam p + (1 - lam) q) (DistiLLM, Ko et al., 2024)."""
    d = _log_mixture(pair.r, lam)
    loss = row_sum(_forward_terms(pair.log_q + d, pair.r - d))
    return loss, -(1 - lam) * _scaled_expm1(pair.log_q, pair.r - d)


def skew_rkl(pair: Pair, lam: float = 0.1) -> Result:
    """KL(q || lam q + (1 - lam) p) (DistiLLM, Ko et al., 2024)."""
    if lam == 0.0:
        return reverse_kl(pair)
    d = _log_mixture(pair.r, 1 - lam)
    return row_sum(_reverse_terms(pair.log_q, d)), -pair.q * (d + lam * expm1(-d))


def tvd(pair: Pair) -> Result:
    """Total variation distance, half the L1 distance (f-distill, Wen et al., 2023)."""
    distance = 0.5 * row_sum(_scaled_expm1(pair.log_q, pair.r).abs())
    return distance, -0.5 * pair.q * pair.r.sign()


def _head_mask(log_p: Tensor, mu: float) -> Tensor:
    """The top teacher tokens whose joint mass stays below mu, at least the first one, [N, V] bool.

    This is the public TAID code's head; the paper of the loss adds the token that crosses mu.
    """
    mass, order = log_p.exp().sort(-1, descending=True)
    in_head = mass.cumsum(-1) < mu
    in_head[..., 0] = True
    return torch.zeros_like(in_head).scatter_(-1, order, in_head)


def adaptive_kl(pair: Pair, mu: float = 0.5) -> Result:
    """Forward and reverse KL weighted by the gap in the teacher's head and tail (Wu et al., 2024).

    The weights are detached, as in the paper.
    """
    gap = _scaled_expm1(pair.log_q, pair.r).abs()
    head = row_sum(gap * _head_mask(pair.log_p, mu))[:, None]
    total = row_sum(gap)[:, None]
    w = torch.where(total > 0, head / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5)
    (forward, a_forward), (reverse, a_reverse) = forward_kl(pair), reverse_kl(pair)
    # the reverse KL's `a` sums to its loss, so the two may be mixed before centring
    return w[:, 0] * forward + (1 - w[:, 0]) * reverse, w * a_forward + (1 - w) * a_reverse


def _power_difference(log_w: Tensor, r: Tensor, k: float) -> Tensor:
    """exp(log_w) * (e^(k r) - 1) / k, and its limit at k = 0."""
    return log_w.exp() * r if k == 0 else _scaled_expm1(log_w, k * r) / k


def alpha_beta(pair: Pair, alpha: float = 0.2, beta: float = 0.7) -> Result:
    """alpha-beta divergence (ABKD, Wang et al., 2025), all limits included.

    (1, 0) is the forward KL, (0, 1) the reverse KL.
    """
    c = alpha + beta
    log_w = c * pair.log_q
    power = _power_difference(log_w, pair.r, alpha)
    if beta != 0:
        terms = (_power_difference(log_w, pair.r, c) - power) / beta
    elif alpha != 0:
        terms = ((log_w + alpha * pair.r).exp() * pair.r - power) / alpha
    else:
        terms = 0.5 * pair.r.square()
    return row_sum(terms), -power


def todi(pair: Pair) -> Result:
    """Sum of w p r - (1 - w) q r with w = sigmoid(r), detached (ToDi, Jung et al., 2025).

    Its value is that of Jeffreys' divergence, sum of (p - q) r; its gradient is not.
    """
    surplus, w = _scaled_expm1(pair.log_q, pair.r), pair.r.sigmoid()  # p - q
    a = -(w * surplus + pair.q * ((1 - w) * pair.r + (pair.r / 2).tanh()))
    return row_sum(surplus * pair.r), a


def entropy_switch(pair: Pair, threshold: float = 0.8) -> Result:
    """Forward KL of tokens at which the teacher's entropy is at least `threshold` nats, reverse KL
    of the others (after EOPD, 2026)."""
    unsure = -row_sum(pair.log_p.exp() * pair.log_p) >= threshold
    (forward, a_forward), (reverse, a_reverse) = forward_kl(pair), reverse_kl(pair)
    return (torch.where(unsure, forward, reverse),
            torch.where(unsure[:, None], a_forward, a_reverse))


def ce(pair: Pair) -> Result:
    """Cross-entropy with the data's own next token (SFT, the term without a teacher)."""
    assert pair.labels is not None
    index = pair.labels[:, None]
    is_label = torch.arange(pair.log_q.shape[-1], device=index.device) == index
    return -pair.log_q.gather(-1, index)[:, 0], -is_label.to(pair.log_q.dtype)


# ----- their names --------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """A loss's function, and what a recipe can say of it."""

    function: Callable[..., Result]
    spec: type[TermSpec]

    @property
    def aliases(self) -> tuple[str, ...]:
        return self.spec.names()[1:]

    @property
    def needs_teacher(self) -> bool:
        return self.spec.compares


LOSSES: dict[str, Loss] = {function.__name__: Loss(function, TERMS[function.__name__])
                           for function in (taid, amid, forward_kl, reverse_kl, jsd, skew_kl,
                                            skew_rkl, tvd, adaptive_kl, alpha_beta, todi,
                                            entropy_switch, ce)}
_NAMES = {alias: name for name, loss in LOSSES.items() for alias in (name, *loss.aliases)}


class _Interpolation(Section):
    t: Share


def check_parameters(name: str, parameters: dict[str, float]) -> None:
    """Raise RecipeError if a parameter of the loss `name` is unknown or out of range."""
    spec = LOSSES[name].spec
    moving = name in MOVING
    allowed = [*(["t"] if moving else []),
               *(key for key in spec.parameters() if key not in scheduled_keys(name))]
    for key in parameters:
        if key not in allowed:
            raise RecipeError(f"loss '{name}' has no parameter '{key}'.{nearest(key, allowed)}")
    if moving and "t" not in parameters:
        raise RecipeError(f"loss '{name}' needs t, the interpolation parameter in [0, 1].")
    own = dict(parameters)
    if moving:
        check(_Interpolation, {"t": own.pop("t")})
    check(spec, {"name": name, **own})


# ----- the public function ------------------------------------------------------------------


def divergence(
    name: str,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    *,
    labels: Tensor | None = None,
    kd_temperature: float = 1.0,
    **parameters: float,
) -> Tensor:
    """Loss per token, differentiable in the student's logits.

    Args:
        name: a name or alias of `LOSSES`: "taid", "amid", "fkl", "rkl", "jsd", "skew_kl",
            "skew_rkl", "tvd", "adaptive_kl", "alpha_beta", "todi", "entropy_switch", "ce".
        student_logits: [N, V] (or [..., V]; the result then has the leading shape).
        teacher_logits: the same shape; not used by "ce". No gradient flows into it.
        labels: [N] token ids, for "ce" only.
        kd_temperature: divides both logits; the loss is multiplied by its square (Hinton et al.,
            2015). Not applied to "ce".
        parameters: the loss's own: `t` (taid), `t` and `alpha` (amid), `beta` (jsd), `lam`
            (skew_kl, skew_rkl), `mu` (adaptive_kl), `alpha` and `beta` (alpha_beta), `threshold`
            (entropy_switch); and `focus` and `clip` of any (`config/objective.TokenTerm`).

    Returns:
        Nats per token [N], float32 whatever the logits' type (float64 for float64 logits).

    Raises:
        RecipeError: unknown name or parameter, value out of range, shapes that do not match.

    Example:
        >>> import torch
        >>> from taid_vlm import divergence
        >>> teacher = torch.tensor([[0.8, 0.2]]).log()  # one token, a vocabulary of two
        >>> divergence("forward_kl", torch.zeros(1, 2), teacher)  # .8 log(.8/.5) + .2 log(.2/.5)
        tensor([0.1927])
        >>> divergence("taid", torch.zeros(1, 2), teacher, t=0.5)  # half the way to the teacher
        tensor([0.0566])
    """
    name = canonical_name(name, _NAMES)
    parameters = {key: getattr(x, "item", lambda x=x: x)() for key, x in parameters.items()}
    check_parameters(name, parameters)
    if not kd_temperature > 0:
        raise RecipeError(f"kd_temperature = {kd_temperature!r}, but it must be positive.")
    needs_teacher = LOSSES[name].needs_teacher
    _check_shapes(name, student_logits, teacher_logits if needs_teacher else None, labels)
    leading, width = student_logits.shape[:-1], student_logits.shape[-1]
    s = student_logits.reshape(-1, width)
    u = None if teacher_logits is None else teacher_logits.detach().reshape(-1, width)
    y = None if labels is None else labels.reshape(-1)
    temperature = float(kd_temperature) if needs_teacher else 1.0
    loss = _ClosedForm.apply(s, u if needs_teacher else None, y, name, temperature, parameters)
    return loss.reshape(leading)


def _check_shapes(name: str, s: Tensor, u: Tensor | None, labels: Tensor | None) -> None:
    if LOSSES[name].needs_teacher:
        if u is None or u.shape != s.shape:
            got = None if u is None else tuple(u.shape)
            raise RecipeError(
                f"loss '{name}' compares logits of one shape, got student {tuple(s.shape)} and "
                f"teacher {got}. Map different vocabularies first (VocabularyMap)."
            )
    elif labels is None or labels.shape != s.shape[:-1]:
        raise RecipeError(f"loss '{name}' needs labels of shape {tuple(s.shape[:-1])}.")


def row_chunks(rows: int, width: int, device: str = "") -> Iterator[slice]:
    """Slices of about CHUNK_ELEMENTS at most, or as many as a "cpu"'s caches hold."""
    cached = CACHED * torch.get_num_threads() if device == "cpu" else CHUNK_ELEMENTS
    step = max(1, min(CHUNK_ELEMENTS, cached) // max(1, width))
    yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def upcast(x: Tensor) -> Tensor:
    """float32 for half precisions; float32 and float64 stay."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class _ClosedForm(torch.autograd.Function):
    """Loss and gradient in one pass; only the gradient is kept for backward."""

    @staticmethod
    def forward(ctx, s, u, labels, name, temperature, parameters):  # type: ignore[no-untyped-def]
        loss = s.new_zeros(s.shape[0], dtype=upcast(s[:0]).dtype)
        needs_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(s) if needs_grad else None
        for rows in row_chunks(*s.shape):
            y = None if labels is None else labels[rows]
            value, g = closed_form(s[rows], None if u is None else u[rows], y, name, temperature,
                             parameters)
            loss[rows] = value
            if grad is not None:
                grad[rows] = g.to(grad.dtype)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        (grad,) = ctx.saved_tensors
        return (grad * upstream[:, None]).to(grad.dtype), None, None, None, None, None


def closed_form(
    s: Tensor, u: Tensor | None, labels: Tensor | None, name: str, temperature: float,
    parameters: dict[str, float],
) -> Result:
    """Loss [n] and its gradient [n, V] in the student's logits, for one chunk of rows."""
    s = upcast(s) / temperature
    target = s if u is None else u.to(s.dtype) / temperature
    rest, difference = dict(parameters), None
    focus, clip = rest.pop("focus", 0.0), rest.pop("clip", None)
    if name == "taid":
        target, difference = interpolate(s, target, rest.pop("t"))
    elif name == "amid":
        target, difference = alpha_mixture(s, target, rest.pop("t"), rest.pop("alpha", 1.0))
    pair = _alone(s, labels) if u is None else make_pair(s, target, labels, difference)
    loss, a = LOSSES[name].function(pair, **rest)
    gradient = a - pair.q * row_sum(a)[:, None]
    return _shaped(loss * temperature**2, gradient * temperature, focus, clip)


def _shaped(loss: Tensor, gradient: Tensor, focus: float, clip: float | None) -> Result:
    """A loss per token [n] and its gradient with hard tokens weighed up, and a bound."""
    if focus:
        weight = (-torch.expm1(-loss)).clamp(min=0.0) ** focus  # a constant for the gradient
        loss, gradient = loss * weight, gradient * weight[:, None]
    if clip is None:
        return loss, gradient
    return loss.clamp(max=clip), gradient * (loss < clip)[:, None]
