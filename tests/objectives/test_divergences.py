"""The losses against textbook float64, near agreement, at the edges, and what they must obey."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from objectives import reference
from torch.nn.functional import cosine_similarity

from taid_vlm.config.objective import MOVING
from taid_vlm.errors import RecipeError
from taid_vlm.objectives import LOSSES, divergence, divergences

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text())["cases"]
ROWS, WIDTH = 9, 17
ALPHA_BETA = [(0.2, 0.7), (1, 0), (0.5, 0), (0, 1), (0, 0.5), (0, 0), (0.5, -0.5), (-0.3, 0.3),
              (1.5, -0.2), (-0.4, 1.1)]
CASES = [
    *(("taid", {"t": t}) for t in (0.2, 0.4, 0.9, 1.0)),
    ("forward_kl", {}),
    ("reverse_kl", {}),
    *(("jsd", {"beta": beta}) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)),
    *((name, {"lam": lam}) for name in ("skew_kl", "skew_rkl") for lam in (0.0, 0.1, 0.9)),
    ("tvd", {}),
    # mu = 1 is left out: whether the last tokens count then depends on rounding alone
    *(("adaptive_kl", {"mu": mu}) for mu in (0.0, 0.5, 0.9)),
    *(("alpha_beta", {"alpha": alpha, "beta": beta}) for alpha, beta in ALPHA_BETA),
    *(("amid", {"t": t, "alpha": alpha})
      for t, alpha in ((0.4, 1.0), (0.4, -1.0), (0.2, 0.0), (0.9, -3.0), (0.5, 3.0), (1.0, -1.0))),
    ("todi", {}),
    *(("entropy_switch", {"threshold": threshold}) for threshold in (0.0, 1.5, 100.0)),
    ("ce", {}),
]
AGAINST_TEACHER = [case for case in CASES if case[0] != "ce"]
FORWARD = ("taid", "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl", "adaptive_kl")
KL_FAMILY = [case for case in CASES if case[0] in FORWARD]
# Powers of vanishing probabilities with a negative exponent are unbounded by definition.
BOUNDED = [case for case in CASES if min(case[1].get("alpha", 0), case[1].get("beta", 0)) >= 0]


def label(value):
    if isinstance(value, dict):
        return "-".join(f"{key}{number:g}" for key, number in value.items()) or "plain"
    return str(value)


def every(cases):
    return pytest.mark.parametrize(("name", "parameters"), cases, ids=label)


def random_logits(scale, seed=0, dtype=torch.float64, rows=ROWS, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    s, u = torch.randn(2, rows, width, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(width, (rows,), generator=generator)
    return s.to(dtype), u.to(dtype), labels


def near_logits(rms, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    s, noise = torch.randn(2, 32, 64, generator=generator)
    s = (3 * s).to(dtype)
    return s, s + rms * noise.to(dtype), torch.zeros(32, dtype=torch.long)


def run(name, s, u, labels, **parameters):
    """Loss and gradient from the package, the student being a fresh leaf."""
    s = s.detach().clone().requires_grad_()
    loss = divergence(name, s, None if name == "ce" else u,
                      labels=labels if name == "ce" else None, **parameters)
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    return loss.detach(), gradient


def relative(got, want, floor=0.0):
    """Largest relative error; `floor` where the reference itself has no more digits."""
    return ((got - want).abs() / (want.abs() + floor)).max().item()


def of_batch(got, want):
    """Largest error of a gradient, measured by the batch's largest entry: a row of a saturated
    student has a gradient far below the rounding of its loss."""
    return ((got - want).abs().max() / want.abs().max()).item()


# ----- against the textbook -----------------------------------------------------------------


@every(CASES)
@pytest.mark.parametrize("scale", [0.1, 1, 10])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_float64_is_the_textbook(name, parameters, scale, temperature):
    s, u, labels = random_logits(scale)
    loss, gradient = run(name, s, u, labels, kd_temperature=temperature, **parameters)
    want, want_gradient = reference.value_and_gradient(
        name, s, u, labels, temperature, **parameters)
    assert loss.dtype == torch.float64
    assert relative(loss, want, floor=1e-4) < 1e-10
    assert of_batch(gradient, want_gradient) < 1e-10


@every(CASES)
@pytest.mark.parametrize("scale", [0.1, 1, 10])
def test_float32_keeps_five_digits(name, parameters, scale):
    s, u, labels = random_logits(scale, seed=1, dtype=torch.float32)
    loss, gradient = run(name, s, u, labels, **parameters)
    want, want_gradient = reference.value_and_gradient(name, s, u, labels, **parameters)
    assert loss.dtype == gradient.dtype == torch.float32
    assert relative(loss, want) < 1e-5
    assert of_batch(gradient, want_gradient) < 1e-5


@every(CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_worked_on_in_float32(name, parameters, dtype):
    """The logits are rounded, the arithmetic is not: TAID's mix in bfloat16 would miss by 1e-2."""
    s, u, labels = random_logits(1, seed=2, dtype=dtype)
    loss, gradient = run(name, s, u, labels, **parameters)
    want, want_gradient = reference.value_and_gradient(name, s, u, labels, **parameters)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert relative(loss, want) < 1e-5
    assert of_batch(gradient.double(), want_gradient) < torch.finfo(dtype).eps


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["case"])
@pytest.mark.parametrize("index", range(len(GOLDEN[0]["losses"])),
                         ids=lambda i: f"{GOLDEN[0]['losses'][i]['name']}-{i}")
def test_golden_figures(case, index):
    golden = case["losses"][index]
    s, u, gradient = (torch.tensor(values, dtype=torch.float64) for values in
                      (case["student_logits"], case["teacher_logits"], golden["gradient"]))
    mask = torch.tensor(case["mask"], dtype=torch.float64)
    s.requires_grad_()
    loss = divergence(golden["name"], s, u, **golden["parameters"])
    mean = (loss * mask).sum() / mask.sum()
    (got,) = torch.autograd.grad(mean, s)
    torch.testing.assert_close(got, gradient, rtol=1e-8, atol=1e-9)
    if golden["form"] == "ce":  # cross-entropy with the target is the KL plus its entropy
        extra = reference.entropy(golden_target(golden, s.detach(), u))
        mean = mean + (extra * mask).sum() / mask.sum()
    assert mean.item() == pytest.approx(golden["mean"], rel=1e-9)


def golden_target(golden, s, u):
    return reference.taid_target(s, u, golden["parameters"]["t"]) if golden["name"] == "taid" else u


# ----- near agreement, where distillation ends ----------------------------------------------


@every(AGAINST_TEACHER)
@pytest.mark.parametrize("rms", [1e-1, 1e-2, 1e-3])
def test_mean_loss_near_agreement_keeps_its_digits(name, parameters, rms):
    s, u, labels = near_logits(rms)
    loss, gradient = run(name, s, u, labels, **parameters)
    want, want_gradient = reference.value_and_gradient(name, s, u, labels, **parameters)
    # alpha_beta subtracts two terms of first order; one digit goes with them
    assert relative(loss.double().mean(), want.mean()) < (1e-3 if name == "alpha_beta" else 1e-4)
    assert of_batch(gradient, want_gradient) < 1e-3


@every(KL_FAMILY)
@pytest.mark.parametrize("rms", [1e-1, 1e-2, 1e-3])
def test_every_token_near_agreement_keeps_its_digits(name, parameters, rms):
    s, u, labels = near_logits(rms)
    loss, gradient = run(name, s, u, labels, **parameters)
    want, want_gradient = reference.value_and_gradient(name, s, u, labels, **parameters)
    assert relative(loss, want) < 2e-4
    assert of_batch(gradient, want_gradient) < 5e-6


@every(KL_FAMILY)
def test_textbook_float32_loses_its_digits_near_agreement(name, parameters):
    """The reason for the closed forms: a test of the test above."""
    s, u, labels = near_logits(1e-3)
    want, _ = reference.value_and_gradient(name, s, u, labels, **parameters)
    ours = relative(divergence(name, s, u, **parameters), want)
    textbook = relative(reference.loss_of(name, s, u, labels, **parameters), want)
    assert textbook > 0.1
    assert textbook > 1000 * ours


# ----- what every loss obeys ----------------------------------------------------------------


@every(CASES)
@pytest.mark.parametrize("rms", [10, 1, 1e-1, 1e-2, 1e-3, 1e-4])
def test_never_negative(name, parameters, rms):
    s, u, labels = near_logits(rms)
    loss, _ = run(name, s, u, labels, **parameters)
    # outside the KL family the terms themselves have a sign, so only their sum is >= 0
    slack = 0.0 if (name, parameters) in KL_FAMILY else -1e-6 * rms
    assert loss.min() >= slack


@every(AGAINST_TEACHER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zero_at_agreement(name, parameters, dtype):
    s, _, labels = random_logits(5, dtype=dtype)
    loss, gradient = run(name, s, s.clone(), labels, **parameters)
    assert not loss.any()
    assert not gradient.any()


@every(CASES)
def test_constants_added_to_logits_change_nothing(name, parameters):
    s, u, labels = random_logits(2)
    loss, gradient = run(name, s, u, labels, **parameters)
    shift = torch.linspace(-50, 50, ROWS, dtype=torch.float64)[:, None]
    shifted, shifted_gradient = run(name, s + shift, u - 2 * shift, labels, **parameters)
    torch.testing.assert_close(shifted, loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(shifted_gradient, gradient, rtol=1e-9, atol=1e-12)


@every(CASES)
def test_gradient_rows_sum_to_zero(name, parameters):
    s, u, labels = random_logits(3)
    _, gradient = run(name, s, u, labels, **parameters)
    assert gradient.abs().max() > 1e-3
    assert gradient.sum(-1).abs().max() < 1e-12 * gradient.abs().max()


@every(AGAINST_TEACHER)
def test_no_gradient_reaches_the_teacher(name, parameters):
    s, u, _ = random_logits(1)
    s.requires_grad_()
    u.requires_grad_()
    divergence(name, s, u, **parameters).sum().backward()
    assert u.grad is None
    assert s.grad.any()


@every(CASES)
def test_upstream_weights_scale_rows(name, parameters):
    """Padding has weight 0, and rows do not mix."""
    s, u, labels = random_logits(1)
    _, gradient = run(name, s, u, labels, **parameters)
    weights = torch.arange(ROWS, dtype=torch.float64)
    s.requires_grad_()
    loss = divergence(name, s, None if name == "ce" else u, labels=labels, **parameters)
    (weighted,) = torch.autograd.grad((loss * weights).sum(), s)
    torch.testing.assert_close(weighted, gradient * weights[:, None])


# ----- TAID ---------------------------------------------------------------------------------


def taid_gradient(t, s, u):
    return run("taid", s, u, None, t=t)[1].flatten()


def test_taid_at_t_0_is_nothing():
    s, u, _ = random_logits(3)
    loss, gradient = run("taid", s, u, None, t=0.0)
    assert not loss.any()
    assert not gradient.any()


def test_taid_at_t_1_is_forward_kl_to_the_bit():
    s, u, _ = random_logits(3, dtype=torch.float32)
    for taid, forward in zip(run("taid", s, u, None, t=1.0), run("forward_kl", s, u, None),
                             strict=True):
        assert torch.equal(taid, forward)


@pytest.mark.parametrize("scale", [0.5, 1, 3])
def test_taid_goes_from_reverse_to_forward_kl(scale):
    """Its gradient starts out parallel to reverse KL's, turns away step by step, and ends as
    forward KL's."""
    s, u, _ = random_logits(scale, rows=64, width=32)
    reverse, forward = (run(name, s, u, None)[1].flatten() for name in ("rkl", "fkl"))
    path = [taid_gradient(t, s, u) for t in (1e-3, 0.01, 0.1, 0.4, 0.7, 1.0)]
    to_reverse = [cosine_similarity(g, reverse, dim=0).item() for g in path]
    to_forward = [cosine_similarity(g, forward, dim=0).item() for g in path]
    assert to_reverse[0] > 0.99999
    assert to_reverse[1] > 0.999
    assert to_reverse == sorted(to_reverse, reverse=True)
    assert to_forward == sorted(to_forward)
    assert to_forward[-1] > 1 - 1e-12


def test_taid_mixes_logits_not_probabilities():
    """A mix of probabilities has the gradient t (q - p): plain forward KL with a small weight."""
    s, u, _ = random_logits(2, rows=64)
    t = 0.4
    student = s.clone().requires_grad_()
    q, p = reference.softmax(s), reference.softmax(u)
    mixed = reference.kl((1 - t) * q + t * p, reference.softmax(student))
    (wrong,) = torch.autograd.grad(mixed.sum(), student)
    forward = run("forward_kl", s, u, None)[1]
    torch.testing.assert_close(wrong, t * forward, rtol=1e-9, atol=1e-12)
    right = taid_gradient(t, s, u)
    assert cosine_similarity(right, wrong.flatten(), dim=0) < 0.95
    assert relative(mixed.mean(), divergence("taid", s, u, t=t).mean()) > 0.1


# ----- edges --------------------------------------------------------------------------------

INF = float("inf")
EDGES = {
    "student rules a token out": ([0, 1, -INF, 2], [0, 1, 0.5, 2]),
    "teacher rules a token out": ([0, 1, 0.5, 2], [0, 1, -INF, 2]),
    "both rule one out": ([0, 1, -INF, 2], [0.5, 1, -INF, 2]),
    "each rules another out": ([0, -INF, 1, 2], [0.5, 1, -INF, 2]),
    "opposite and extreme": ([1e4, -1e4, 0, 5], [-1e4, 1e4, 3, 1]),
    "one-hot and equal": ([1e4, -1e4, 0, 5], [1e4, -1e4, 0, 5]),
    "one-hot student": ([1e4, 0, 0, 0], [0, 1, 2, 3]),
    "one-hot teacher": ([0, 1, 2, 3], [0, 0, 0, 1e4]),
}


@every([("taid", {"t": 0.0}), ("taid", {"t": 1e-3}), *BOUNDED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_edges_stay_finite(name, parameters, dtype):
    s, u = torch.tensor(list(EDGES.values()), dtype=dtype).unbind(1)
    loss, gradient = run(name, s, u, torch.full((len(s),), 2), **parameters)
    rounding = 8 * torch.finfo(dtype).eps * (1 + loss)
    checks = {
        "finite loss": loss.isfinite(),
        "finite gradient": gradient.isfinite().all(-1),
        "not negative": loss >= 0,
        "gradient sums to 0": gradient.double().sum(-1).abs() <= rounding,
    }
    for check, passed in checks.items():
        failed = [edge for edge, ok in zip(EDGES, passed, strict=True) if not ok]
        assert not failed, check


@pytest.mark.parametrize(("name", "parameters"), [
    ("taid", {"t": 1.0}), ("forward_kl", {}), ("jsd", {}), ("skew_kl", {}), ("skew_rkl", {}),
    ("tvd", {}),
], ids=label)
def test_token_that_only_the_student_rules_out_counts_as_almost_impossible(name, parameters):
    """-inf is the limit of very small logits, in value and gradient."""
    s, u = torch.tensor([EDGES["student rules a token out"]]).unbind(1)
    nearly = s.masked_fill(s == -INF, divergences.LOG_SMALLEST + float(s.logsumexp(-1)))
    for found, want in zip(run(name, s, u, None, **parameters),
                           run(name, nearly, u, None, **parameters), strict=True):
        torch.testing.assert_close(found, want)
    loss, _ = run(name, s, u, None, **parameters)
    without, _ = run(name, s[:, [0, 1, 3]], u[:, [0, 1, 3]], None, **parameters)
    assert (loss > without + 0.01).all()


def test_taid_ends_are_exact_at_the_edges_too():
    """t = 0 is the student whatever the teacher rules out, and t = 1 is the teacher alone."""
    s, u = torch.tensor(list(EDGES.values())).unbind(1)
    assert not any(result.any() for result in run("taid", s, u, None, t=0.0))
    ends = zip(run("taid", s, u, None, t=1.0), run("fkl", s, u, None), strict=True)
    assert all(torch.equal(taid, forward) for taid, forward in ends)


@pytest.mark.parametrize(("name", "parameters"), [
    ("taid", {"t": 1.0}), ("forward_kl", {}), ("reverse_kl", {}), ("tvd", {}), ("skew_kl", {}),
], ids=label)
def test_token_ruled_out_on_both_sides_may_as_well_be_absent(name, parameters):
    s, u, _ = random_logits(2)
    wide_s, wide_u = (torch.cat([x, torch.full((ROWS, 1), -INF)], -1) for x in (s, u))
    loss, gradient = run(name, s, u, None, **parameters)
    wide_loss, wide_gradient = run(name, wide_s, wide_u, None, **parameters)
    torch.testing.assert_close(wide_loss, loss)
    torch.testing.assert_close(wide_gradient[:, :-1], gradient)
    assert not wide_gradient[:, -1].any()


@pytest.mark.parametrize("t", [0.2, 0.4, 0.99])
def test_taid_target_gives_ruled_out_tokens_no_mass(t):
    """The student is then pushed away from what the teacher never says, at any t > 0."""
    s, u = torch.tensor([[0.0, 1, 2]]), torch.tensor([[0.0, 1, -INF]])
    _, gradient = run("taid", s, u, None, t=t)
    assert gradient[0, 2] == pytest.approx(s.softmax(-1)[0, 2].item(), rel=1e-5)


def test_label_that_is_ruled_out_costs_the_floor():
    loss, gradient = run("ce", torch.tensor([[0.0, 1, -INF]]), None, torch.tensor([2]))
    assert loss.item() == pytest.approx(-divergences.LOG_SMALLEST)
    assert gradient.isfinite().all()


@every(CASES)
def test_no_rows(name, parameters):
    """A batch whose answers are all masked."""
    s, u = torch.zeros(2, 0, WIDTH)
    loss, gradient = run(name, s, u, torch.zeros(0, dtype=torch.long), **parameters)
    assert loss.shape == (0,)
    assert loss.sum() == 0
    assert gradient.shape == (0, WIDTH)


@every(CASES)
def test_leading_shapes(name, parameters):
    s, u, labels = random_logits(1, rows=6)
    flat, flat_gradient = run(name, s, u, labels, **parameters)
    loss, gradient = run(name, s.view(2, 3, -1), u.view(2, 3, -1), labels.view(2, 3), **parameters)
    assert torch.equal(loss, flat.view(2, 3))
    assert torch.equal(gradient, flat_gradient.view(2, 3, -1))


@every(CASES)
def test_row_chunks_change_nothing(name, parameters, monkeypatch):
    s, u, labels = random_logits(1)
    whole = run(name, s, u, labels, **parameters)
    for elements in (1, 2 * WIDTH + 3):
        monkeypatch.setattr(divergences, "CHUNK_ELEMENTS", elements)
        chunked = run(name, s, u, labels, **parameters)
        # not to the bit: the last lanes of a vector instruction round differently
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-15)


def test_row_chunks_cover_every_row_once(monkeypatch):
    monkeypatch.setattr(divergences, "CHUNK_ELEMENTS", 2 * WIDTH)
    slices = list(divergences.row_chunks(5, WIDTH))
    assert list(itertools.chain(*(range(5)[rows] for rows in slices))) == [0, 1, 2, 3, 4]
    assert len(slices) == 3


def test_no_gradient_is_computed_without_need():
    s, u, _ = random_logits(1)
    assert not divergence("fkl", s, u).requires_grad
    with torch.no_grad():
        assert not divergence("fkl", s.requires_grad_(), u).requires_grad


# ----- one is another -----------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_amid_with_the_geometric_mean_is_taid_bit_for_bit(t):
    s, u, _ = random_logits(3, dtype=torch.float32)
    for one, other in zip(run("amid", s, u, None, t=t, alpha=1.0), run("taid", s, u, None, t=t),
                          strict=True):
        assert torch.equal(one, other)


def test_amid_with_the_arithmetic_mean_is_a_mixture():
    """KL((1 - t) q + t p || q), and nearly taid's for a mean of nearly order 0."""
    s, u, _ = random_logits(2)
    q, p = s.softmax(-1), u.softmax(-1)
    mixture = 0.7 * q + 0.3 * p
    loss, _ = run("amid", s, u, None, t=0.3, alpha=-1.0)
    assert relative(loss, (mixture * (mixture / q).log()).sum(-1)) < 1e-9
    near, taid = (run(name, s, u, None, t=0.3, **extra)[1] for name, extra in (
        ("amid", {"alpha": 1 - 1e-6}), ("taid", {})))
    assert relative(near, taid) < 1e-4


def test_todi_has_the_value_of_jeffreys_and_another_gradient():
    s, u, _ = random_logits(2)
    (loss, gradient), forward, reverse = (run(name, s, u, None)
                                          for name in ("todi", "forward_kl", "reverse_kl"))
    assert relative(loss, forward[0] + reverse[0]) < 1e-9
    assert relative(gradient, forward[1] + reverse[1]) > 0.1


def test_the_entropy_switch_takes_one_loss_or_the_other_token_by_token():
    s, u, _ = random_logits(4)
    p = u.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    threshold = float(entropy.median()) - 1e-6
    loss, _ = run("entropy_switch", s, u, None, threshold=threshold)
    forward, reverse = (run(name, s, u, None)[0] for name in ("forward_kl", "reverse_kl"))
    assert torch.equal(loss, torch.where(entropy >= threshold, forward, reverse))
    assert 0 < int((entropy >= threshold).sum()) < len(entropy)


# ----- hard tokens, and a bound -------------------------------------------------------------


@every([("forward_kl", {"focus": 1.0}), ("reverse_kl", {"focus": 0.5}), ("taid", {"t": 0.6}),
        ("ce", {"focus": 2.0}), ("jsd", {})])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_focus_and_clip_are_as_written(name, parameters, temperature):
    s, u, labels = random_logits(1.5)
    free, _ = run(name, s, u, labels, kd_temperature=temperature, **parameters)
    parameters = {**parameters, "clip": float(free.median()) + 1e-6}
    loss, gradient = run(name, s, u, labels, kd_temperature=temperature, **parameters)
    want, want_gradient = reference.value_and_gradient(
        name, s, u, labels, temperature, **parameters)
    assert relative(loss, want, floor=1e-4) < 1e-10
    assert of_batch(gradient, want_gradient) < 1e-10
    plain, _ = run(name, s, u, labels, kd_temperature=temperature,
                   **{key: x for key, x in parameters.items() if key == "t"})
    assert (free <= plain).all()
    assert torch.equal(free, plain) == ("focus" not in parameters)
    clipped = loss == parameters["clip"]
    assert 0 < int(clipped.sum()) < len(clipped)
    assert not gradient[clipped].any()
    assert gradient[~clipped].abs().amax(-1).min() > 0


# ----- names and messages -------------------------------------------------------------------


def test_every_name_and_alias_is_one_loss():
    s, u, labels = random_logits(1)
    for name, loss in LOSSES.items():
        extra = {"t": 0.4} if name in MOVING else {}
        want, _ = run(name, s, u, labels, **extra)
        for alias in loss.aliases:
            teacher = None if name == "ce" else u
            got = divergence(alias.upper().replace("_", "-"), s, teacher, labels=labels, **extra)
            assert torch.equal(got, want)


def test_every_loss_has_a_reference():
    assert set(LOSSES) == {*reference.LOSSES, "ce"} == {name for name, _ in CASES}


S = torch.zeros(2, 3)
MISTAKES = {
    "unknown name": (("taidd", S, S), {}, "unknown loss 'taidd'.*Did you mean 'taid'"),
    "far name": (("zzz", S, S), {}, "unknown loss 'zzz'.*Valid: .*forward_kl"),
    "near parameter": (("jsd", S, S), {"betta": 0.1}, "no parameter 'betta'.*'beta'"),
    "no parameters": (("tvd", S, S), {"beta": 0.1}, "no parameter 'beta'.*clip, focus"),
    "beta": (("jsd", S, S), {"beta": 1.1}, r"beta = 1.1.*\[0, 1\]"),
    "lam": (("skew_kl", S, S), {"lam": 1.0}, r"lam = 1.0.*\[0, 1\)"),
    "lam, reverse": (("skew_rkl", S, S), {"lam": -0.1}, r"lam = -0.1.*\[0, 1\)"),
    "mu": (("akl", S, S), {"mu": 2}, r"mu = 2.*\[0, 1\]"),
    "t": (("taid", S, S), {"t": -0.1}, r"t = -0.1.*\[0, 1\]"),
    "t is not a number": (("taid", S, S), {"t": float("nan")}, "t = nan"),
    "alpha is text": (("ab", S, S), {"alpha": "0.2"}, "alpha = '0.2'.*finite number"),
    "alpha": (("ab", S, S), {"alpha": INF}, "alpha = inf.*finite number"),
    "missing t": (("taid", S, S), {}, "needs t"),
    "missing t of amid": (("amid", S, S), {"alpha": 0}, "'amid' needs t"),
    "a schedule's key": (("amid", S, S), {"t": 0.1, "rate": 0.1}, "no parameter 'rate'"),
    "threshold": (("eopd", S, S), {"threshold": -1.0}, "threshold = -1.0.*>= 0"),
    "no teacher": (("fkl", S, None), {}, r"student \(2, 3\) and teacher None"),
    "other vocabulary": (("fkl", S, S[:, :2]), {}, r"\(2, 3\) and teacher \(2, 2\).*Vocabulary"),
    "no labels": (("ce", S, None), {}, r"labels of shape \(2,\)"),
    "wrong labels": (("ce", S, None), {"labels": torch.zeros(3).long()}, r"labels of shape \(2,\)"),
    "zero temperature": (("fkl", S, S), {"kd_temperature": 0}, "kd_temperature = 0.*positive"),
    "negative temperature": (("fkl", S, S), {"kd_temperature": -2.0}, "kd_temperature = -2.0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(mistake):
    positional, named, message = MISTAKES[mistake]
    with pytest.raises(RecipeError, match=message):
        divergence(*positional, **named)


@pytest.mark.parametrize("t", [torch.tensor(0.4), torch.tensor([0.4])])
def test_parameters_may_be_tensors_of_one_number(t):
    s, u = torch.randn(3, 5), torch.randn(3, 5)
    assert torch.equal(divergence("taid", s, u, t=t), divergence("taid", s, u, t=t.item()))
