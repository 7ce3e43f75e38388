"""Weights and losses on what a teacher sees, against loops in float64, and their recipe."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from taid_vlm.errors import RecipeError
from taid_vlm.objectives import (
    VisualTerm,
    advantage_weight,
    feature_loss,
    parse_objective,
    pool,
    relation_loss,
)

INF = float("inf")
BOTH = ["taid", "visual_features"]


def cells(seed: int, images: int = 3, number: int = 4, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, number, width, generator=generator, dtype=torch.float64)


# ----- naive references ---------------------------------------------------------------------


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (
        sum(x * x for x in a).sqrt() * sum(y * y for y in b).sqrt())


def naive_features(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.stack([sum(1 - cosine(a, b) for a, b in zip(s, u, strict=True)) / len(s)
                        for s, u in zip(student, teacher, strict=True)])


def naive_relation(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.stack([
        sum((cosine(s[i], s[j]) - cosine(u[i], u[j])) ** 2
            for i in range(len(s)) for j in range(len(s))) / len(s) ** 2
        for s, u in zip(student, teacher, strict=True)])


REFERENCES = {feature_loss: naive_features, relation_loss: naive_relation}


# ----- token weights ------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.5, 3.0])
def test_the_weight_is_its_formula(strength: float) -> None:
    advantage = [-INF, -7.0, -1e-9, 0.0, 1e-9, 0.3, 2.0, 40.0, INF]
    wanted = [1 + strength * (1 - math.exp(-max(a, 0.0))) for a in advantage]
    found = advantage_weight(torch.tensor(advantage, dtype=torch.float64), strength)
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)
    assert (found >= 1).all() and (found <= 1 + strength).all()


def test_a_small_advantage_keeps_its_digits() -> None:
    found = advantage_weight(torch.tensor([1e-6]), 1e6) - 1
    assert float(found) == pytest.approx(1.0, rel=1e-5)


# ----- pooling ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 7), (5, 2), (24, 24), (27, 16)])
@pytest.mark.parametrize("grid", [1, 2, 4])
def test_pooling_is_torchs(shape: tuple[int, int], grid: int) -> None:
    """Grids that do not divide, that are not square, and that are finer than the tokens."""
    features = cells(1, 1, shape[0] * shape[1], 3)[0]
    image = features.T.reshape(1, 3, *shape)
    wanted = adaptive_avg_pool2d(image, grid)[0].flatten(1).T
    torch.testing.assert_close(pool(features, shape, grid), wanted)


def test_pooling_is_done_in_float32() -> None:
    half = cells(2, 1, 12, 6)[0].bfloat16()
    pooled = pool(half, (3, 4), 2)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), pool(half.double(), (3, 4), 2))


def test_pooling_is_row_by_row() -> None:
    painted = torch.zeros(4, 6, 1)
    painted[:2, 3:] = 1  # top right
    assert pool(painted.flatten(0, 1), (4, 6), 2)[:, 0].tolist() == [0, 1, 0, 0]


# ----- losses -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", REFERENCES)
def test_losses_and_gradients_are_the_naive_ones(loss) -> None:  # type: ignore[no-untyped-def]
    teacher, results = cells(4), []
    for function in (loss, REFERENCES[loss]):
        student = cells(3).requires_grad_()
        values = function(student, teacher)
        (gradient,) = torch.autograd.grad(values @ torch.tensor([1.0, 2, 3]).double(), student)
        results.append((values.detach(), gradient))
    torch.testing.assert_close(*results)
    assert results[0][0].min() > 0.01
    assert results[0][1].norm() > 0.01


@pytest.mark.parametrize("loss", REFERENCES)
def test_the_same_features_at_another_scale_have_no_loss(loss) -> None:  # type: ignore[no-untyped-def]
    student = cells(5)
    values = loss(student, 7 * student)
    torch.testing.assert_close(values, torch.zeros(3).double())


def test_relation_needs_no_common_width_and_sees_no_rotation() -> None:
    student = cells(6)
    turned = student @ torch.linalg.qr(cells(7, 1, 8, 5)[0]).Q.T  # 5 -> 8 wide, cosines kept
    torch.testing.assert_close(relation_loss(student, turned), torch.zeros(3).double())
    assert (relation_loss(student, cells(8, width=8)) > 0.01).all()


@pytest.mark.parametrize("loss", REFERENCES)
def test_no_gradient_reaches_the_teacher(loss) -> None:  # type: ignore[no-untyped-def]
    student, teacher = cells(9).requires_grad_(), cells(10).requires_grad_()
    loss(student, teacher).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("loss", REFERENCES)
def test_images_do_not_depend_on_each_other_and_none_is_fine(loss) -> None:  # type: ignore[no-untyped-def]
    student, teacher = cells(11), cells(12)
    alone = torch.cat([loss(student[i : i + 1], teacher[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(loss(student, teacher), alone)
    assert loss(student[:0], teacher[:0]).shape == (0,)


@pytest.mark.parametrize("loss", REFERENCES)
def test_features_of_zero_are_finite(loss) -> None:  # type: ignore[no-untyped-def]
    student = torch.zeros(1, 4, 5).requires_grad_()
    values = loss(student, cells(13, 1).float())
    values.sum().backward()
    assert values.isfinite().all()
    assert student.grad is not None and student.grad.isfinite().all()


# ----- in a recipe --------------------------------------------------------------------------


def test_the_recipe_form() -> None:
    objective = parse_objective({
        "terms": ["taid", {"name": "visual_features", "weight": 0.1, "grid": 3},
                  {"name": "Visual-Relation", "weight": 0.2}],
        "token_weights": {"name": "visual_advantage", "strength": 2}})
    assert [term.name for term in objective.terms] == ["taid"]
    assert objective.visual == (
        VisualTerm("visual_features", 0.1, 3), VisualTerm("visual_relation", 0.2, 4))
    assert objective.visual_advantage == 2.0


def test_nothing_is_asked_for_by_default() -> None:
    assert parse_objective("taid").visual == ()
    assert parse_objective("taid").visual_advantage == 0.0
    weighed = parse_objective({"name": "taid", "token_weights": "visual_advantage"})
    assert weighed.visual_advantage == 1.0


def test_visual_terms_need_a_teacher_beside_plain_cross_entropy() -> None:
    assert parse_objective({"terms": ["ce", "visual_relation"]}).needs_teacher


def test_weights_reach_the_terms_with_a_teacher_only() -> None:
    objective = parse_objective({"terms": ["taid", "ce"], "token_weights": "visual_advantage"})
    losses = {"taid": torch.tensor([1.0, 2.0]), "ce": torch.tensor([3.0, 4.0])}
    found = objective.reweighted(losses, torch.tensor([1.0, 1.5]))
    assert {name: x.tolist() for name, x in found.items()} == {"taid": [1, 3], "ce": [3, 4]}
    assert objective.reweighted(losses, None) == losses


@pytest.mark.parametrize(("config", "message"), [
    ({"terms": ["taid", "visual_feature"]}, "Did you mean 'visual_features'"),
    ({"terms": ["taid", "visual_relations"]}, "Did you mean 'visual_relation'"),
    ({"terms": [*BOTH, "visual_features"]}, "twice"),
    ({"terms": ["visual_features"]}, "visual_features only, which says nothing about answers"),
    ({"name": "visual_relation"}, "visual_relation only"),
    ({"terms": ["taid", {"name": "visual_features", "gird": 4}]}, "Did you mean 'grid'"),
    ({"terms": ["taid", {"name": "visual_features", "grid": 0}]}, "grid = 0.* from 1 to 32"),
    ({"terms": ["taid", {"name": "visual_relation", "grid": 1}]}, "grid = 1.* from 2 to 32"),
    ({"terms": ["taid", {"name": "visual_relation", "grid": 33}]}, "grid = 33"),
    ({"terms": ["taid", {"name": "visual_relation", "grid": 4.0}]}, "grid = 4.0"),
    ({"terms": ["taid", {"name": "visual_relation", "grid": True}]}, "grid = True"),
    ({"terms": ["taid", {"name": "visual_features", "weight": -1}]}, "weight = -1"),
    ({"name": "taid", "token_weights": "visual_advantages"}, "Did you mean 'visual_advantage'"),
    ({"name": "taid", "token_weights": {"strength": 1}}, "token_weights.name is missing"),
    ({"name": "taid", "token_weights": 3}, "token_weights must be"),
    ({"name": "taid", "token_weights": {"name": "visual_advantage", "strengh": 1}},
     "Did you mean 'strength'"),
    ({"name": "taid", "token_weights": {"name": "visual_advantage", "strength": -1}},
     "strength = -1, but it must be >= 0"),
    ({"name": "taid", "token_weights": {"name": "visual_advantage", "strength": INF}},
     "strength = inf"),
    ({"name": "ce", "token_weights": "visual_advantage"}, "and there is none"),
])
def test_mistakes_are_explained(config: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_objective(config)  # type: ignore[arg-type]
