"""Objectives read from recipes, their weighted sum, and the figures that are logged."""

import pytest
import torch
from objectives import reference

from taid_vlm.errors import RecipeError
from taid_vlm.objectives import (
    DIAGNOSTICS,
    LOSSES,
    TaidSchedule,
    Term,
    diagnose,
    divergence,
    divergences,
    parse_objective,
)

INF = float("inf")


def logits(seed=0, rows=6, width=11, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    s, u = scale * torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    return s, u, torch.randint(width, (rows,), generator=generator)


# ----- reading ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["taid", {"name": "taid"}, {"terms": ["taid"]},
                                    {"terms": [{"name": "TAID"}]}])
def test_one_term_in_every_spelling(config):
    objective = parse_objective(config)
    assert objective.terms == (Term("taid"),)
    assert objective.kd_temperature == 1.0
    assert objective.needs_teacher


@pytest.mark.parametrize(("alias", "name"), [
    (alias, name) for name, loss in LOSSES.items() for alias in (name, *loss.aliases)])
def test_every_alias(alias, name):
    assert parse_objective(alias).terms[0].name == name
    assert parse_objective({"name": alias.replace("_", "-").upper()}).terms[0].name == name


def test_terms_weights_parameters_and_temperature():
    config = {"terms": [{"name": "jsd", "beta": 0.3, "weight": 2}, {"name": "sft", "weight": 0.1},
                        "tvd"], "kd_temperature": 2}
    objective = parse_objective(config)
    assert objective.terms == (Term("jsd", 2.0, {"beta": 0.3}), Term("ce", 0.1), Term("tvd"))
    assert objective.kd_temperature == 2.0
    assert objective.moving_term is None
    assert objective.schedule(100) is None
    # a recipe is shown and saved again: reading must leave it as it was
    assert config["terms"][0] == {"name": "jsd", "beta": 0.3, "weight": 2}
    assert config["kd_temperature"] == 2


def test_sft_needs_no_teacher():
    assert not parse_objective("sft").needs_teacher
    assert parse_objective({"terms": ["ce", "fkl"]}).needs_teacher


def test_schedule_keys_reach_the_schedule():
    config = {"name": "taid", "t_start": 0.2, "t_end": 0.7, "alpha": 5e-4, "momentum": 0.9,
              "adaptive": False, "weight": 0.5, "kd_temperature": 3}
    objective = parse_objective({**config})
    schedule = objective.schedule(123)
    assert isinstance(schedule, TaidSchedule)
    assert (schedule.total_steps, schedule.t_start, schedule.t_end) == (123, 0.2, 0.7)
    assert (schedule.alpha, schedule.momentum, schedule.adaptive) == (5e-4, 0.9, False)
    assert objective.moving_term.weight == 0.5
    assert objective.moving_term.parameters == {}
    assert objective.kd_temperature == 3.0


@pytest.mark.parametrize(("config", "message"), [
    ("tiad", "unknown loss 'tiad'.*Did you mean 'taid'"),
    ({"name": "forward_lk"}, "Did you mean 'forward_kl'"),
    ({"terms": ["taid", "kll"]}, "unknown loss 'kll'"),
    ({"name": "taid", "t_strat": 0.2}, "no key 't_strat'.*Did you mean 't_start'"),
    ({"name": "taid", "t": 0.2}, "no key 't'"),
    ({"name": "taid", "t_start": 0.9, "t_end": 0.5}, "t_start = 0.9 is greater"),
    ({"name": "taid", "t_end": 2}, "t_end = 2"),
    ({"name": "taid", "alpha": "slow"}, "alpha = 'slow'"),
    ({"name": "jsd", "bta": 0.2}, "'jsd' has no key 'bta'.*Did you mean 'beta'"),
    ({"name": "jsd", "beta": 2}, r"beta = 2.*\[0, 1\]"),
    ({"name": "skl", "lam": 1}, r"lam = 1.*\[0, 1\)"),
    ({"name": "fkl", "weight": -1}, "objective.weight = -1.*>= 0"),
    ({"name": "fkl", "weight": "high"}, "weight = 'high'"),
    ({"name": "fkl", "kd_temperature": 0}, "kd_temperature = 0.*positive"),
    ({"name": "fkl", "kd_temperature": "2"}, "kd_temperature = '2'"),
    ({"terms": ["fkl"], "weight": 2}, "'weight' stands beside 'terms'"),
    ({"terms": ["fkl", "kl"]}, "twice: forward_kl, forward_kl"),
    ({"terms": []}, "must be a list"),
    ({"terms": "fkl"}, "must be a list"),
    ({"terms": [{"weight": 1}]}, "every objective term needs a 'name'"),
    ({}, "needs a 'name'"),
    ({"weight": 2}, "needs a 'name'"),
])
def test_mistakes_are_explained(config, message):
    with pytest.raises(RecipeError, match=message):
        parse_objective(config)


# ----- the sum ------------------------------------------------------------------------------


def test_every_term_per_token_and_the_weighted_sum():
    s, u, labels = logits()
    objective = parse_objective({"terms": [
        {"name": "taid", "weight": 0.7}, {"name": "jsd", "beta": 0.2, "weight": 2},
        {"name": "ce", "weight": 0.1}]})
    losses = objective.per_token(s, u, labels, t=0.4)
    assert list(losses) == ["taid", "jsd", "ce"]
    want = {"taid": reference.taid(s, u, 0.4), "jsd": reference.jsd(s, u, 0.2),
            "ce": reference.ce(s, labels)}
    torch.testing.assert_close(losses, want)
    total = 0.7 * want["taid"] + 2 * want["jsd"] + 0.1 * want["ce"]
    torch.testing.assert_close(objective.weighted(losses), total)
    means = {name: loss.mean() for name, loss in losses.items()}
    torch.testing.assert_close(objective.weighted(means), total.mean())


def test_gradient_of_the_sum():
    s, u, labels = logits(1)
    objective = parse_objective({"terms": [{"name": "fkl"}, {"name": "ce", "weight": 0.5}],
                                 "kd_temperature": 2})
    s.requires_grad_()
    losses = objective.per_token(s, u, labels)
    (got,) = torch.autograd.grad(objective.weighted(losses).sum(), s)
    # both have the form q - target; T^2 / T leaves one T, and the data term knows no temperature
    q, p = (reference.softmax(x.detach() / 2) for x in (s, u))
    data = reference.softmax(s.detach()) - torch.nn.functional.one_hot(labels, s.shape[-1])
    torch.testing.assert_close(got, 2 * (q - p) + 0.5 * data)


def test_cross_entropy_is_over_the_students_own_vocabulary():
    s, u, _ = logits(2)
    own = torch.cat([s, torch.full((len(s), 3), 2.0, dtype=s.dtype)], -1)
    labels = torch.full((len(s),), own.shape[-1] - 1)  # a token the teacher does not have
    objective = parse_objective({"terms": ["fkl", "ce"]})
    losses = objective.per_token(s, u, labels, own_logits=own)
    torch.testing.assert_close(losses["ce"], reference.ce(own, labels))
    torch.testing.assert_close(losses["forward_kl"], reference.forward_kl(s, u))


def test_sft_alone_takes_no_teacher():
    s, _, labels = logits(3)
    losses = parse_objective("sft").per_token(s, None, labels)
    torch.testing.assert_close(losses, {"ce": reference.ce(s, labels)})


def test_taid_without_t_is_refused():
    s, u, labels = logits(3)
    with pytest.raises(RecipeError, match="needs t"):
        parse_objective("taid").per_token(s, u, labels)


def test_temperature_reaches_every_term_with_a_teacher():
    s, u, labels = logits(4)
    objective = parse_objective({"terms": ["taid", "rkl"], "kd_temperature": 3})
    losses = objective.per_token(s, u, labels, t=0.5)
    for name, extra in (("taid", {"t": 0.5}), ("reverse_kl", {})):
        want = reference.loss_of(name, s, u, labels, 3.0, **extra)
        torch.testing.assert_close(losses[name], want)
        assert not torch.allclose(want, divergence(name, s, u, **extra))


# ----- diagnostics --------------------------------------------------------------------------


def textbook_figures(s, u):
    return {
        "kl": reference.forward_kl(s, u),
        "reverse_kl": reference.reverse_kl(s, u),
        "teacher_entropy": reference.entropy(u),
        "student_entropy": reference.entropy(s),
        "agreement": (s.argmax(-1) == u.argmax(-1)).double(),
    }


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_diagnostics_are_the_textbook(scale, dtype):
    s, u, _ = (x.to(dtype) for x in logits(5, rows=40, scale=scale))
    figures = diagnose(s, u)
    assert tuple(figures) == DIAGNOSTICS
    assert 0 < figures["agreement"].mean() < 1
    for name, want in textbook_figures(s.double(), u.double()).items():
        assert figures[name].dtype == torch.float32
        torch.testing.assert_close(figures[name], want.float(), rtol=1e-5, atol=2e-6)


def test_diagnostics_in_chunks(monkeypatch):
    s, u, _ = logits(6)
    whole = diagnose(s, u)
    for name in ("CACHED", "CHUNK_ELEMENTS"):
        with monkeypatch.context() as patch:
            patch.setattr(divergences, name, 25)
            assert len(list(divergences.row_chunks(*s.shape, "cpu"))) > 1
            torch.testing.assert_close(diagnose(s, u), whole)


def test_diagnostics_need_no_gradient_and_take_no_rows():
    s, u, _ = logits(7)
    assert not any(value.requires_grad for value in diagnose(s.requires_grad_(), u).values())
    assert all(value.shape == (0,) for value in diagnose(s[:0], u[:0]).values())


def test_diagnostics_with_ruled_out_tokens():
    s = torch.tensor([[0.0, 1, -INF], [0, 1, 2], [1e4, 0, -1e4]])
    u = torch.tensor([[0.0, 1, 2], [0, 1, -INF], [-1e4, 0, 1e4]])
    figures = diagnose(s, u)
    assert all(value.isfinite().all() for value in figures.values())
    two = reference.entropy(torch.tensor([0.0, 1]))
    assert figures["student_entropy"][0] == pytest.approx(two.item())
    assert figures["teacher_entropy"][1] == pytest.approx(two.item())
    assert figures["agreement"].tolist() == [0, 0, 0]


def test_diagnostics_at_agreement():
    s, _, _ = logits(8)
    figures = diagnose(s, s.clone())
    assert not figures["kl"].any()
    assert not figures["reverse_kl"].any()
    assert figures["agreement"].all()


@pytest.mark.parametrize("config", [
    None, 3, {"terms": [1]}, {"terms": [None]}, {"name": "fkl", "weight": float("nan")},
    {"name": "fkl", "kd_temperature": float("inf")},
])
def test_values_of_a_wrong_kind(config):
    with pytest.raises(RecipeError):
        parse_objective(config)
