"""The fused objective against all logits and autograd, in float64 and in its own types."""

import pytest
import torch
from fusing import (
    MAPS,
    TEACHER_ROWS,
    cast,
    error,
    errors,
    fuse,
    gradients,
    logits,
    mapped,
    naive,
    norm_errors,
    problem,
    textbook,
    total,
    unfused,
)

from taid_vlm.errors import RecipeError
from taid_vlm.fused.divergence import FusedDivergence
from taid_vlm.fused.heads import Head
from taid_vlm.fused.work import Weighing
from taid_vlm.models.head import LogitTransform
from taid_vlm.objectives import DIAGNOSTICS, LOSSES, diagnose, parse_objective

SUM = {"terms": [{"name": "taid"}, {"name": "jsd", "weight": 0.4, "beta": 0.3},
                 {"name": "ce", "weight": 0.1}], "kd_temperature": 2.0}
RECIPES = [
    *({"name": name} for name in LOSSES),
    *({"name": name, "kd_temperature": 2.5} for name in ("taid", "reverse_kl", "adaptive_kl")),
    {"name": "alpha_beta", "alpha": 0.0, "beta": 0.5},
    {"name": "skew_rkl", "lam": 0.9},
    {"terms": [{"name": "ce", "weight": 0.7}, {"name": "forward_kl", "weight": 2}]},
    SUM,
]
ONE_ROW = 1  # byte: a budget that no row fits


def label(recipe):
    terms = recipe.get("terms", [recipe])
    return "+".join(term["name"] for term in terms) + f"-T{recipe.get('kd_temperature', 1)}"


def every(recipes):
    return pytest.mark.parametrize(
        "objective", map(parse_objective, recipes), ids=map(label, recipes))


# ----- value and gradients ----------------------------------------------------------------------


@every(RECIPES)
@pytest.mark.parametrize("memory_budget", [ONE_ROW, 2**20])
def test_float64_is_the_textbook(objective, memory_budget):
    p = problem(dtype=torch.float64)
    loss = fuse(objective, p, t=0.3, memory_budget=memory_budget).loss
    want, want_gradients = naive(objective, p)
    assert loss.dtype == torch.float64
    assert error(loss.detach(), want) < 1e-12
    assert max(errors(gradients(p, loss), want_gradients).values()) < 1e-12


@every(RECIPES)
def test_float32_is_as_exact_as_the_unfused_path(objective):
    """1e-6 of the largest entry; where full logits themselves miss that, twice their error."""
    p = problem(rows=40, width=300)
    loss = fuse(objective, p, t=0.3, memory_budget=10**5).loss
    want, want_gradients = naive(objective, p)
    plain, plain_gradients = unfused(objective, p)
    assert error(loss.detach(), want) < max(1e-6, 2 * error(plain, want))
    limits = errors(plain_gradients, want_gradients)
    for name, missed in errors(gradients(p, loss), want_gradients).items():
        assert missed < max(1e-6, 2 * limits[name]), name


@every(RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_budget", [10**5, 2**24])
def test_half_precision_rounds_what_it_is_given_and_gives(objective, dtype, memory_budget):
    """The product rounds its logits on CPU; after that not more is lost than by one rounding."""
    p = problem(rows=40, width=300, dtype=dtype)
    result = fuse(objective, p, t=0.3, memory_budget=memory_budget)
    got = gradients(p, result.loss)
    s, u = (z.detach().double() for z in logits(p))
    s.requires_grad_()
    loss = total(objective, textbook(objective, s, u, p.labels))
    (g,) = torch.autograd.grad(loss, s)
    want = {"hidden": g @ p.weight.double(), "weight": g.T @ p.hidden.double(), "bias": g.sum(0)}
    assert result.loss.dtype == torch.float32
    assert error(result.loss.detach(), loss.detach()) < 1e-5
    for name, missed in norm_errors(got, want).items():
        assert got[name].dtype == dtype
        assert missed < torch.finfo(dtype).eps / 2, name


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_every_t(t, temperature):
    objective = parse_objective({"name": "taid", "kd_temperature": temperature})
    p = problem(dtype=torch.float64)
    loss = fuse(objective, p, t=t).loss
    want, want_gradients = naive(objective, p, t)
    assert (loss - want).abs() < 1e-12 * max(1, want.abs())
    for name, gradient in gradients(p, loss).items():
        assert (gradient - want_gradients[name]).abs().max() < 1e-12
        assert bool(gradient.any()) == (t > 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every([{"name": "taid"}, SUM])
def test_half_precision_on_cuda_has_exact_logits(objective):
    p = problem(rows=40, width=300, dtype=torch.bfloat16)
    want, want_gradients = naive(objective, p)
    p = type(p)(**{k: x.detach().cuda().requires_grad_(x.requires_grad)
                   for k, x in vars(p).items()})
    loss = fuse(objective, p, t=0.3, memory_budget=10**5, body="auto").loss
    assert error(loss.detach().cpu(), want) < 1e-5
    got = {name: g.cpu() for name, g in gradients(p, loss).items()}
    assert max(norm_errors(got, want_gradients).values()) < torch.finfo(torch.bfloat16).eps / 2


@every([{"name": "taid"}, SUM])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_in_float32_on_a_cpu_are_exact(objective, dtype, monkeypatch):
    """Also in blocks; what torch multiplies float32 with elsewhere stays what it was."""
    monkeypatch.setattr("taid_vlm.fused.heads.BLOCK", 128)
    before = torch.backends.mkldnn.matmul.fp32_precision
    p = problem(rows=40, width=300, dtype=dtype)
    want, want_gradients = naive(objective, p)
    for memory_budget in (10**5, 2**24):
        loss = fuse(objective, p, t=0.3, memory_budget=memory_budget, float32_logits=True).loss
        assert error(loss.detach(), want) < 1e-5
        got = gradients(p, loss)
        assert max(norm_errors(got, want_gradients).values()) < max(
            torch.finfo(dtype).eps / 2, 1e-5)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    if dtype == torch.bfloat16:
        rounded = gradients(p, fuse(objective, p, t=0.3).loss)
        assert norm_errors(rounded, want_gradients)["hidden"] > norm_errors(
            got, want_gradients)["hidden"]


# ----- chunks and shapes --------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 10, 11, 12])
def test_any_number_of_rows_per_chunk(most, monkeypatch):
    objective, p = parse_objective(SUM), problem(dtype=torch.float64)
    bytes_of_a_row = 8 * 2 * 23  # both models' logits; the gradient takes the student's place
    seen = []
    forward = LogitTransform.forward
    monkeypatch.setattr(LogitTransform, "forward",
                        lambda transform, z: seen.append(len(z)) or forward(transform, z))
    result = fuse(objective, p, t=0.3, memory_budget=most * bytes_of_a_row, figures=True)
    whole = fuse(objective, p, t=0.3, figures=True)
    assert max(seen[:-2]) <= most
    assert len(seen) - 2 == 2 * -(-11 // most)
    assert error(result.loss.detach(), whole.loss.detach()) < 1e-14
    assert max(errors(gradients(p, result.loss), gradients(p, whole.loss)).values()) < 1e-14
    for name, values in (whole.per_token | whole.figures).items():
        assert torch.allclose((result.per_token | result.figures)[name], values, atol=1e-7)


def test_calls_share_no_memory_that_is_needed_later():
    """Two losses before either is differentiated, of other sizes and types, by one instance."""
    fused = FusedDivergence(parse_objective("jsd"), memory_budget=2**12)
    problems = [problem(rows=rows, dtype=dtype, seed=rows, bias=False) for rows, dtype in (
        (11, torch.float32), (5, torch.float64), (29, torch.float32))]
    losses = [fused(p.hidden, Head(p.weight), p.teacher_hidden, Head(p.teacher_weight)).loss
              for p in problems]
    for p, loss in zip(problems, losses, strict=True):
        alone = fuse(parse_objective("jsd"), p)
        assert torch.equal(loss, alone.loss)
        want = gradients(p, alone.loss)
        assert all(torch.allclose(g, want[name], atol=1e-6)
                   for name, g in gradients(p, loss).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maps", [(), (MAPS["rest"],), (MAPS["rest"], MAPS["cells"])])
def test_no_rows(dtype, maps):
    p = problem(rows=0, teacher_width=TEACHER_ROWS if maps else None, dtype=dtype)
    result = fuse(parse_objective(SUM), p, t=0.3, figures=True, maps=maps,
                  map_index=torch.zeros(0, dtype=torch.long))
    assert result.loss == 0
    assert result.loss.dtype == torch.float32
    assert set(result.per_token) == {"taid", "jsd", "ce"}
    assert all(values.shape == (0,) for values in result.per_token.values())
    assert set(result.figures) == set(DIAGNOSTICS)
    for name, gradient in gradients(p, result.loss).items():
        assert gradient.shape == getattr(p, name).shape
        assert gradient.dtype == dtype
        assert not gradient.any()


@every(RECIPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (3, 1), (1, 2), (4, 2)])
def test_smallest_shapes(objective, rows, width):
    p = problem(rows=rows, width=width, dtype=torch.float64)
    loss = fuse(objective, p, t=0.3).loss
    want, want_gradients = naive(objective, p)
    assert (loss - want).abs() < 1e-12
    for name, gradient in gradients(p, loss).items():
        assert (gradient - want_gradients[name]).abs().max() < 1e-12
        assert width > 1 or not gradient.any()


# ----- different vocabularies ---------------------------------------------------------------------

MAPPED = [{"name": "reverse_kl"}, SUM, {"name": "ce"}]


def naive_mapped(objective, p, maps, map_index, weights=None):
    """Row by row, so that nothing of the grouping is shared; losses [N] and gradients."""
    p = cast(p, torch.float64)
    s, u = logits(p)
    losses = []
    for i, index in enumerate(map_index.tolist()):
        row, vocabulary = slice(i, i + 1), maps[index]
        losses.append(textbook(
            objective, mapped(vocabulary, s[row], "student"), mapped(vocabulary, u[row], "teacher"),
            p.labels[row], own=s[row]))
    joined = {name: torch.cat([part[name] for part in losses]) for name in losses[0]}
    loss = total(objective, joined, weights)
    return loss.detach(), joined, gradients(p, loss)


@every(MAPPED)
@pytest.mark.parametrize("names", [*((name,) for name in MAPS), ("rest", "cells", "conditioned")],
                         ids=" and ".join)
@pytest.mark.parametrize("memory_budget", [ONE_ROW, 2000, 2**20])
@pytest.mark.parametrize("weighted", [False, True])
def test_vocabulary_maps(objective, names, memory_budget, weighted):
    p = problem(teacher_width=TEACHER_ROWS, dtype=torch.float64)
    maps = tuple(MAPS[name] for name in names)
    map_index = torch.tensor([0, 1, 1, 2, 0, 0, 2, 1, 0, 2, 2]) % len(maps)
    weights = p.token_weights if weighted else None
    result = fuse(objective, p, t=0.3, maps=maps, memory_budget=memory_budget, figures=True,
                  map_index=map_index if len(maps) > 1 else None, token_weights=weights)
    want, per_token, want_gradients = naive_mapped(objective, p, maps, map_index, weights)
    assert error(result.loss.detach(), want) < 1e-12
    for name, values in per_token.items():
        assert error(result.per_token[name], values.detach()) < 1e-12
    got = gradients(p, result.loss)
    assert max(errors(got, want_gradients).values()) < 1e-12
    padding = maps[0].student.padding
    if len(maps) == 1 and "ce" not in result.per_token:
        assert not got["weight"][padding].any() and not got["bias"][padding].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAPS)
def test_maps_of_other_types_are_as_exact_as_autograd(name, dtype):
    objective, vocabulary = parse_objective(SUM), MAPS[name]
    p = problem(rows=40, teacher_width=TEACHER_ROWS, dtype=dtype)
    got = gradients(p, fuse(objective, p, t=0.3, maps=(vocabulary,), memory_budget=4000).loss)
    s, u = logits(p)
    losses = objective.per_token(vocabulary.map_student(s), vocabulary.map_teacher(u), p.labels,
                                 own_logits=s, t=0.3)
    plain = gradients(p, objective.weighted(losses).sum())
    want = naive_mapped(objective, p, (vocabulary,), torch.zeros(40, dtype=torch.long))[-1]
    limits = errors(plain, want)
    for leaf, missed in errors(got, want).items():
        assert missed < max(1e-6, 2 * limits[leaf]), leaf


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("elements", [1, 2**24])
def test_unmapping_is_the_transpose_of_mapping(name, elements, monkeypatch):
    monkeypatch.setattr("taid_vlm.objectives.divergences.CHUNK_ELEMENTS", elements)
    vocabulary, generator = MAPS[name], torch.Generator().manual_seed(0)
    s = 3 * torch.randn(6, 23, generator=generator, dtype=torch.float64)
    s[1, vocabulary.student.rest] = s[2, vocabulary.student.members] = -torch.inf
    s[3] = 300 * s[3]
    s.requires_grad_()
    out = vocabulary.map_student(s)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (want,) = torch.autograd.grad(out, s, upstream)
    got = vocabulary.unmap_student(upstream, s, out)
    assert got.isfinite().all()
    assert torch.allclose(got, want, atol=1e-13)


def test_one_map_of_several_may_be_the_identity():
    objective, p = parse_objective(SUM), problem(dtype=torch.float64)
    every_row = torch.arange(23)
    none = every_row[:0]
    plain = type(MAPS["rest"].student)(every_row, none, none)
    identity = type(MAPS["rest"])(plain, plain, True, False)
    swapped = type(MAPS["rest"])(
        type(plain)(every_row.flip(0), none, none), plain, False, False)
    index = torch.arange(11) % 2
    result = fuse(objective, p, t=0.3, maps=(identity, swapped), map_index=index)
    want, _, want_gradients = naive_mapped(objective, p, (identity, swapped), index)
    assert error(result.loss.detach(), want) < 1e-12
    assert max(errors(gradients(p, result.loss), want_gradients).values()) < 1e-12


# ----- what else a call takes and gives ------------------------------------------------------


def test_token_weights_are_for_the_teacher_alone():
    objective, p = parse_objective(SUM), problem(dtype=torch.float64)
    plain = fuse(objective, p, t=0.3)
    result = fuse(objective, p, t=0.3, token_weights=p.token_weights, memory_budget=1500)
    for name, values in plain.per_token.items():
        assert torch.allclose(result.per_token[name], values, rtol=1e-13)
        assert not values.requires_grad
    q = cast(p, torch.float64)
    loss = total(objective, textbook(objective, *logits(q), q.labels), p.token_weights)
    assert error(result.loss.detach(), loss.detach()) < 1e-12
    assert max(errors(gradients(p, result.loss), gradients(q, loss)).values()) < 1e-12
    nothing = fuse(parse_objective("taid"), p, t=0.3, token_weights=torch.zeros(11))
    assert not any(g.any() for g in gradients(p, nothing.loss).values())


@every([{"name": "taid"}, SUM])
@pytest.mark.parametrize("memory_budget", [ONE_ROW, 1500, 2**20])
def test_weights_that_follow_from_the_teachers_likelihood(objective, memory_budget):
    """Found in the pass that makes its logits anyway, they are as weights that are known before."""
    p = problem(dtype=torch.float64)
    seen, labels = [], p.labels.flip(0)
    u = logits(p)[1]
    nll = -u.log_softmax(-1).gather(1, labels[:, None])[:, 0]

    def factors(teacher_nll):
        seen.append(teacher_nll.clone())
        return 1 + teacher_nll.square()

    found = fuse(objective, p, t=0.3, memory_budget=memory_budget,
                 token_weights=Weighing(labels, factors))
    known = fuse(objective, p, t=0.3, memory_budget=memory_budget, token_weights=1 + nll.square())
    assert torch.allclose(seen[-1], nll, rtol=1e-12)
    assert torch.allclose(found.token_weights, 1 + nll.square(), rtol=1e-12)
    assert known.token_weights is None
    assert error(found.loss.detach(), known.loss.detach()) < 1e-12
    assert max(errors(gradients(p, found.loss), gradients(p, known.loss)).values()) < 1e-12


@every([{"name": "taid"}, {"name": "ce"}, SUM])
@pytest.mark.parametrize("name", [None, "rest", "cells"])
@pytest.mark.parametrize("elements", [100, 2**24])
def test_figures_are_those_of_the_mapped_logits(objective, name, elements, monkeypatch):
    monkeypatch.setattr("taid_vlm.objectives.divergences.CHUNK_ELEMENTS", elements)
    p = problem(teacher_width=TEACHER_ROWS if name else None)
    maps = () if name is None else (MAPS[name],)
    result = fuse(objective, p, t=0.3, maps=maps, figures=True, memory_budget=1000)
    s, u = (z.detach() for z in logits(p))
    if name:
        s, u = mapped(maps[0], s, "student"), mapped(maps[0], u, "teacher")
    want = diagnose(s, u)
    assert set(result.figures) == set(want)
    for figure, values in want.items():
        assert result.figures[figure].dtype == torch.float32
        assert torch.allclose(result.figures[figure], values, atol=1e-5), figure
    assert fuse(objective, p, t=0.3, maps=maps).figures == {}


def test_without_a_teacher():
    p = problem(dtype=torch.float64)
    loss = FusedDivergence(parse_objective("ce"), body="eager")(
        p.hidden, Head(p.weight, p.bias), labels=p.labels).loss
    want, want_gradients = naive(parse_objective("ce"), p)
    assert error(loss.detach(), want) < 1e-12
    assert max(errors(gradients(p, loss), want_gradients).values()) < 1e-12


@pytest.mark.parametrize(("changes", "message"), [
    ({"t": None}, "taid.*needs t"), ({"t": 1.5}, r"t = 1\.5.*in \[0, 1\]"),
    ({"teacher_hidden": None}, "needs teacher_hidden"), ({"teacher_head": None}, "teacher_head"),
    ({"labels": None}, "needs labels"), ({"labels": torch.zeros(3)}, "labels has 3 rows.* 11"),
    ({"token_weights": torch.ones(1)}, "token_weights has 1 rows"),
    ({"teacher_head": Head(torch.ones(22, 9))}, "23 rows.*22.*VocabularyMap"),
    ({"maps": 2}, "needs map_index"),
    ({"maps": 2, "map_index": torch.full((11,), 2)}, "another map than 0 to 1"),
])
def test_what_is_missing_is_named(changes, message):
    p = problem()
    maps = [MAPS["rest"]] * changes.pop("maps", 0)
    given = {"teacher_hidden": p.teacher_hidden, "teacher_head": Head(p.teacher_weight),
             "labels": p.labels, "t": 0.3} | changes
    with pytest.raises(RecipeError, match=message):
        FusedDivergence(parse_objective(SUM), maps)(p.hidden, Head(p.weight), **given)
