"""The fused objective on rows that are aligned by pieces, against all logits and autograd."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from fusing import (
    MAPS,
    TEACHER_ROWS,
    Watched,
    bent,
    cast,
    error,
    errors,
    gradients,
    logits,
    norm_errors,
    problem,
)
from test_fused import RECIPES, SUM, every
from torch import nn

from taid_vlm.alignment import Pairing
from taid_vlm.batch.figures import token_figures
from taid_vlm.batch.losses import of_partners, token_losses
from taid_vlm.errors import RecipeError
from taid_vlm.fused.divergence import FusedDivergence
from taid_vlm.fused.heads import Head, ModuleHead
from taid_vlm.fused.pieces import Pieces
from taid_vlm.fused.work import Weighing
from taid_vlm.models.head import IDENTITY, LogitTransform
from taid_vlm.objectives import parse_objective

# tokens of the student and of the teacher in each piece, whether its first ones are compared entry
# by entry, and whether its likelihood is
LAYOUT = ((1, 1, True, False), (1, 1, True, True), (2, 1, True, True), (1, 3, False, True),
          (5, 4, True, True), (1, 1, True, False), (1, 1, True, False), (3, 2, False, True),
          (1, 1, True, True))


def laid(layout=LAYOUT, maps=1):
    """A batch's places of pieces, without labels."""
    chunk_s, chunk_t, pairs, last = [], [], [], []
    for s, t, paired, likely in layout:
        if paired:
            pairs.append((len(chunk_s), len(chunk_t)))
        chunk_s += [len(last) if likely else -1] * s
        chunk_t += [len(last) if likely else -1] * t
        if likely:
            last.append(len(chunk_s) - 1)
    names = ("pair_student", "pair_teacher", "chunk_student", "chunk_teacher", "chunk_last")
    places = ([s for s, _ in pairs], [t for _, t in pairs], chunk_s, chunk_t, last)
    return {name: torch.tensor(x, dtype=torch.long) for name, x in zip(names, places, strict=True)
            } | {"map_index": torch.arange(len(pairs)) % maps}


def case_c(layout=LAYOUT, maps=("cells",), dtype=torch.float32, seed=0, weighted=False):
    """A problem, its batch and its pairing."""
    batch = laid(layout, len(maps))
    count, teacher_count = len(batch["chunk_student"]), len(batch["chunk_teacher"])
    p = problem(count, teacher_width=TEACHER_ROWS, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    p.teacher_hidden = torch.randn(teacher_count, 9, generator=generator, dtype=torch.float64).to(
        dtype)
    batch |= {"labels": p.labels, "teacher_labels": torch.randint(
        TEACHER_ROWS, (teacher_count,), generator=generator)}
    if weighted:
        batch["weights"] = torch.rand(count, generator=generator) + 0.5
    pairing = Pairing("c", "", tuple(MAPS[name] for name in maps))
    return p, batch, pairing


def pieces_of(batch):
    return Pieces(*(batch[name] for name in Pieces.__dataclass_fields__))


def fuse(objective, p, batch, pairing, *, budget=2**20, transform=IDENTITY, head=None,
         token_weights=None, body="eager", **more):
    fused = FusedDivergence(objective, pairing.maps, memory_budget=budget, body=body)
    return fused(p.hidden, head or Head(p.weight, p.bias, transform), p.teacher_hidden,
                 Head(p.teacher_weight, transform=transform), batch["labels"], t=0.3,
                 map_index=batch["map_index"], token_weights=token_weights,
                 weights=batch.get("weights"), pieces=pieces_of(batch), **more)


def unfused(objective, p, batch, pairing, transform=None, token_weights=None):
    """The reference over all logits: loss, losses per token, gradients."""
    s = bent(torch.nn.functional.linear(p.hidden, p.weight, p.bias), transform)
    u = bent(p.teacher_hidden @ p.teacher_weight.T, transform)
    losses = token_losses(objective, batch, s, u, pairing, 0.3)
    weighed = objective.reweighted(losses, token_weights)
    loss = objective.weighted({name: (x * batch.get("weights", 1)).sum()
                               for name, x in weighed.items()})
    return loss.detach(), losses, gradients(p, loss)


@every(RECIPES)
@pytest.mark.parametrize("budget", [1, 600, 2500, 2**20])
def test_float64_is_the_reference(objective, budget):
    p, batch, pairing = case_c(dtype=torch.float64)
    result = fuse(objective, p, batch, pairing, budget=budget)
    want, losses, want_gradients = unfused(objective, p, batch, pairing)
    assert result.loss.dtype == torch.float64
    assert error(result.loss.detach(), want) < 1e-12
    for name, values in losses.items():
        assert torch.allclose(result.per_token[name], values, rtol=1e-11, atol=1e-13), name
    assert max(errors(gradients(p, result.loss), want_gradients).values()) < 1e-11


@every([{"name": "taid"}, SUM])
@pytest.mark.parametrize("budget", [1, 1500, 2**20])
@pytest.mark.parametrize("maps", [("rest",), ("cells", "conditioned")], ids=str)
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 3.0)], ids=str)
def test_weights_maps_and_what_stands_behind_heads(objective, budget, maps, transform):
    p, batch, pairing = case_c(maps=maps, dtype=torch.float64, weighted=True)
    result = fuse(objective, p, batch, pairing, budget=budget, transform=transform,
                  token_weights=p.token_weights)
    want, losses, want_gradients = unfused(
        objective, p, batch, pairing, transform, p.token_weights)
    assert error(result.loss.detach(), want) < 1e-12
    for name, values in losses.items():
        assert torch.allclose(result.per_token[name], values, rtol=1e-11, atol=1e-13), name
    assert max(errors(gradients(p, result.loss), want_gradients).values()) < 1e-11


@every(RECIPES)
def test_float32_is_as_exact_as_the_reference(objective):
    layout = LAYOUT * 4
    p, batch, pairing = case_c(layout)
    exact = unfused(objective, cast(p, torch.float64), batch, pairing)
    plain = unfused(objective, p, batch, pairing)
    result = fuse(objective, p, batch, pairing, budget=3000)
    assert error(result.loss.detach(), exact[0]) < max(1e-6, 2 * error(plain[0], exact[0]))
    limits = errors(plain[2], exact[2])
    for name, missed in errors(gradients(p, result.loss), exact[2]).items():
        assert missed < max(1e-6, 2 * limits[name]), name


@every([{"name": "taid"}, SUM])
@pytest.mark.parametrize("budget", [2000, 2**20])
def test_half_precision_rounds_what_it_is_given_and_gives(objective, budget):
    """The product rounds its logits on CPU; after that not more is lost than by one rounding."""
    p, batch, pairing = case_c(LAYOUT * 4, dtype=torch.bfloat16)
    result = fuse(objective, p, batch, pairing, budget=budget)
    s, u = (z.detach().double() for z in logits(p))
    losses = token_losses(objective, batch, s.requires_grad_(), u, pairing, 0.3)
    loss = objective.weighted({name: x.sum() for name, x in losses.items()})
    (g,) = torch.autograd.grad(loss, s)
    want = {"hidden": g @ p.weight.double(), "weight": g.T @ p.hidden.double(), "bias": g.sum(0)}
    assert result.loss.dtype == torch.float32
    assert error(result.loss.detach(), loss.detach()) < 1e-5
    for name, missed in norm_errors(gradients(p, result.loss), want).items():
        assert missed < torch.finfo(torch.bfloat16).eps / 2, name


class LowRank(nn.Module):
    """A matrix and an update of rank 2."""

    def __init__(self, p):
        super().__init__()
        self.plain = nn.Linear(7, 23).to(p.hidden.dtype).requires_grad_(False)
        self.plain.weight.data, self.plain.bias.data = p.weight.detach(), p.bias.detach()
        self.down, self.up = nn.Linear(7, 2, False), nn.Linear(2, 23, False)
        self.to(p.hidden.dtype)

    def forward(self, x):
        return self.plain(x) + self.up(self.down(x))


@pytest.mark.parametrize("budget", [1, 2**20])
def test_a_low_rank_head(budget):
    objective = parse_objective(SUM)
    p, batch, pairing = case_c(dtype=torch.float64)
    module = LowRank(p)
    leaves = [p.hidden, module.down.weight, module.up.weight]
    loss = fuse(objective, p, batch, pairing, budget=budget, head=ModuleHead(module, 23)).loss
    got = torch.autograd.grad(loss, leaves)
    losses = token_losses(objective, batch, module(p.hidden),
                          p.teacher_hidden @ p.teacher_weight.T, pairing, 0.3)
    want = objective.weighted({name: x.sum() for name, x in losses.items()})
    assert error(loss.detach(), want.detach()) < 1e-12
    for g, w in zip(got, torch.autograd.grad(want, leaves), strict=True):
        assert error(g, w) < 1e-11


def test_identical_vocabularies():
    """A space that only one template prints makes pieces of equal tokens, too."""
    objective, p = parse_objective(SUM), problem(3, dtype=torch.float64)
    none = torch.empty(0, dtype=torch.long)
    plain = type(MAPS["rest"].student)(torch.arange(23), none, none)
    pairing = Pairing("a", "", (type(MAPS["rest"])(plain, plain, True, False),))
    batch = laid(((1, 1, True, False), (2, 2, False, True))) | {
        "labels": p.labels, "teacher_labels": p.labels.flip(0)}
    result = fuse(objective, p, batch, pairing)
    want, _, want_gradients = unfused(objective, p, batch, pairing)
    assert error(result.loss.detach(), want) < 1e-12
    assert max(errors(gradients(p, result.loss), want_gradients).values()) < 1e-11


@pytest.mark.parametrize("layout", [(), ((1, 1, True, False),) * 3, ((2, 3, False, True),) * 3],
                         ids=["no tokens", "pairs alone", "likelihoods alone"])
@pytest.mark.parametrize("maps", [("cells",), ("rest", "cells")], ids=str)
def test_what_may_be_absent(layout, maps):
    objective = parse_objective(SUM)
    p, batch, pairing = case_c(layout, maps, dtype=torch.float64)
    seen = []
    result = fuse(objective, p, batch, pairing, measure=lambda index, rows, s, u: seen.append(
        len(s)) or {"width": s.sum(-1)})
    want, _, want_gradients = unfused(objective, p, batch, pairing)
    assert torch.allclose(result.loss.detach(), want, rtol=1e-12)
    for name, g in gradients(p, result.loss).items():
        assert torch.allclose(g, want_gradients[name], rtol=1e-10, atol=1e-13)
    assert sum(seen) == len(batch["pair_student"]) == len(result.figures["width"])


def test_terms_on_the_data_alone_need_no_teacher():
    objective = parse_objective("ce")
    p, batch, pairing = case_c(dtype=torch.float64)
    result = fuse(objective, p, batch, pairing)
    want, _, want_gradients = unfused(objective, p, batch, pairing)
    assert error(result.loss.detach(), want) < 1e-12
    assert max(errors(gradients(p, result.loss), want_gradients).values()) < 1e-12
    assert result.log_probs is None


# ----- how rows are cut ---------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 9, 10, 14, 25, 40, 1000])
def test_units_cover_everything_once_within_the_budget(budget):
    batch = laid()
    pieces = pieces_of(batch | {"teacher_labels": batch["chunk_teacher"]})
    units = list(pieces.units(budget, 2, 3, 1))
    for name, length in (("rows", "chunk_student"), ("pairs", "pair_student")):
        assert [i for unit in units for i in range(getattr(unit, name).start,
                                                   getattr(unit, name).stop)] == list(
            range(len(batch[length])))
    for unit in units:
        rows, teacher, pairs = (part.stop - part.start for part in unit[:3])
        assert 2 * rows + 3 * teacher + pairs <= budget or rows == 1
        assert unit.rows.start >= unit.span.start
        assert unit.rows.stop <= unit.span.stop
        for name, span in (("chunk_student", unit.span), ("chunk_teacher", unit.teacher_span)):
            held = batch[name][span]
            inside = torch.arange(unit.chunks.start, unit.chunks.stop)
            assert torch.equal(held[held >= 0].unique(), inside)  # whole chunks
    if budget == 1000:
        assert len(units) == 1


@pytest.mark.parametrize("change", [
    {"chunk_student": torch.tensor([0, 0, 1])}, {"chunk_teacher": torch.tensor([0, 1, -1])},
    {"pair_student": torch.tensor([1])}, {"pair_teacher": torch.tensor([1])},
    {"pair_student": torch.tensor([3])}, {"chunk_last": torch.tensor([1, 2])},
], ids=str)
def test_pieces_that_do_not_match_are_refused(change):
    batch = laid(((2, 2, False, True), (1, 1, True, False))) | {
        "teacher_labels": torch.zeros(3, dtype=torch.long)}
    assert list(pieces_of(batch).units(100, 1, 1, 1))
    with pytest.raises(RecipeError, match="do not follow each other alike"):
        list(pieces_of(batch | change).units(100, 1, 1, 1))


@pytest.mark.parametrize(("change", "message"), [
    ({"labels": None}, "needs labels"), ({"teacher_hidden": torch.ones(4, 9)}, "4 rows"),
    ({"hidden": torch.ones(4, 7)}, "tokens of the student"),
    ({"map_index": torch.ones(1)}, "map_index has 1 rows"),
])
def test_what_is_missing_is_named(change, message):
    p, batch, pairing = case_c()
    batch["map_index"] = change.get("map_index", batch["map_index"])
    batch["labels"] = change.get("labels", batch["labels"])
    p.hidden = change.get("hidden", p.hidden)
    p.teacher_hidden = change.get("teacher_hidden", p.teacher_hidden)
    with pytest.raises(RecipeError, match=message):
        fuse(parse_objective("taid"), p, batch, pairing)


# ----- what is in memory ------------------------------------------------------------------------


def wide(layout, seed=0):
    """Heads of 2,311 and 1,907 rows: tokens count little beside them."""
    times = 100
    p, batch, pairing = case_c(layout, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    p.weight = torch.randn(23 * times, 7, generator=generator).requires_grad_()
    p.bias, p.teacher_weight = None, torch.randn(19 * times, 9, generator=generator)
    vocabulary = pairing.maps[0]
    sides = [SimpleNamespace(**vars(side)) for side in (vocabulary.teacher, vocabulary.student)]
    for side, rows in zip(sides, (19, 23), strict=True):
        more = torch.arange(rows, rows * times)
        side.members = torch.cat([side.members, more])
        side.cell = torch.cat([side.cell, more % vocabulary.cells])
    kind = type(vocabulary.teacher)
    teacher, student = (kind(**vars(side)) for side in sides)
    maps = (type(vocabulary)(teacher, student, False, vocabulary.has_rest, vocabulary.cells),)
    return p, batch, Pairing("c", "", maps)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), "one piece"], ids=str)
def test_memory_does_not_grow_with_the_rows(shape, monkeypatch):
    """Twice the tokens in the same chunks, also where all of them are one piece."""
    monkeypatch.setattr("taid_vlm.objectives.divergences.CHUNK_ELEMENTS", 2**13)
    budget, peaks = 300_000, []
    for count in (60, 120):
        layout = ((count, count, True, True),) if shape == "one piece" else (
            (*shape, True, True),) * (count // shape[0])
        p, batch, pairing = wide(layout)
        with Watched() as watched:
            fuse(parse_objective(SUM), p, batch, pairing, budget=budget).loss.backward()
        peaks.append(watched.peak)
        assert not any(len(made) == 2 and made[0] >= count and made[1] > 1000
                       for made in watched.made)
    assert peaks[1] < peaks[0] + 60 * 7 * 4 * 4 + 20_000
    head = 4 * 23 * 100 * 7
    assert peaks[1] < budget + 3 * head + 2**21  # what the arithmetic needs beside it


def test_figures_are_the_references():
    """Of every pair and piece, whatever the chunks."""
    p, batch, pairing = case_c(maps=("cells", "rest"), dtype=torch.float64)
    s = torch.nn.functional.linear(p.hidden, p.weight, p.bias).detach()
    u = p.teacher_hidden @ p.teacher_weight.T
    figures = token_figures(batch, s, u, pairing)
    for budget in (1, 2000, 2**20):
        result = fuse(parse_objective("taid"), p, batch, pairing, budget=budget,
                      measure=lambda index, rows, s, u: {"row": s.sum(-1)})
        own, teacher = result.log_probs
        assert torch.allclose(-own.float(), figures["nll"].values.float(), atol=1e-6)
        assert torch.allclose(teacher, u.log_softmax(-1).gather(
            1, batch["teacher_labels"][:, None])[:, 0], atol=1e-12)
        assert torch.allclose(result.figures["row"], s[batch["pair_student"]].sum(-1))


@pytest.mark.parametrize("budget", [1, 1500, 2**20])
def test_weights_that_follow_from_the_teachers_likelihood(budget):
    """A token's from its partner, a chunk's from the sum over it, also where it is cut."""
    objective = parse_objective(SUM)
    p, batch, pairing = case_c(maps=("cells", "rest"), dtype=torch.float64)
    u = p.teacher_hidden @ p.teacher_weight.T
    nll = -u.log_softmax(-1).gather(1, batch["teacher_labels"][:, None])[:, 0]

    def factors(teacher_nll):
        return 1 + of_partners(batch, teacher_nll).square()

    found = fuse(objective, p, batch, pairing, budget=budget,
                 token_weights=Weighing(batch["teacher_labels"], factors))
    want, _, want_gradients = unfused(
        objective, p, batch, pairing, token_weights=factors(nll))
    assert torch.allclose(found.token_weights, factors(nll), rtol=1e-12)
    assert error(found.loss.detach(), want) < 1e-12
    assert max(errors(gradients(p, found.loss), want_gradients).values()) < 1e-11


def test_layout_has_every_shape_of_a_piece():
    kinds = {(paired, likely) for _, _, paired, likely in LAYOUT}
    assert kinds == set(itertools.product([True, False], [True, False])) - {(False, False)}
