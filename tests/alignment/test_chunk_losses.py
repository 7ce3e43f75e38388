"""Different tokenizers through real models: the chain rule, oracles, and any cut into batches."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from adapters.samples import adapter, built, encode, head_rows, record, row
from alignment.chunked import Name, batch_of, doubled, in_doubles, kinds, pair
from alignment.test_vocabulary import PADDING, renamed_rows, twin
from torch import Tensor, nn

from taid_vlm.adapters import Side
from taid_vlm.alignment import Pairing, pair_models, supervised_positions
from taid_vlm.batch.collator import Batch, DistillationCollator
from taid_vlm.batch.figures import token_figures
from taid_vlm.batch.forward import student_forward, teacher_forward
from taid_vlm.batch.losses import token_losses
from taid_vlm.errors import RecipeError
from taid_vlm.evaluation.held_out import Tally, evaluate_pair, summarise
from taid_vlm.models.forward import forward_names
from taid_vlm.objectives import LOSSES, chunk_logits, label_log_prob, parse_objective
from taid_vlm.teachers import LocalTeacher
from taid_vlm.training.pair import refuse_absent

PAIRS = [
    (Name("llama"), Name("qwen2", "other")),
    (Name("qwen2"), Name("gemma2", "metaspace")),
    (Name("gemma2", "unigram"), Name("llama")),
    (Name("internvl"), Name("llava", "metaspace")),
    (Name("smolvlm"), Name("gemma3", "other")),
    (Name("qwen2_5_vl"), Name("idefics3", "unigram")),
    (Name("llava", "metaspace"), Name("qwen3_vl")),
]
EVERY = pytest.mark.parametrize(("teacher", "student"), PAIRS, ids=str)
SEES = PAIRS[3]
TEACHED = [name for name, loss in LOSSES.items() if loss.needs_teacher]
ALL_LOSSES = parse_objective({"terms": [*TEACHED, "ce"]})


@cache
def measured(teacher: Name, student: Name, side: Side = "right") -> tuple[Batch, Tensor, Tensor]:
    """The batch of all kinds of conversations, the student's and the teacher's logits."""
    batch = batch_of(teacher, student, side)
    with torch.no_grad():
        return (batch, student_forward(doubled(student, 1), batch),
                teacher_forward(doubled(teacher), batch))


# ----- the chain rule ----------------------------------------------------------------------------


@torch.no_grad()
def log_prob_of_answers(name: Name, role: str, model: nn.Module, others: Name) -> list[float]:
    """Every record's answers (with the ends of their turns) under the model, by one plain forward
    over the whole vocabulary at every position."""
    reader, totals = adapter(name.family, role, name.tokenizer), []
    for kind in kinds(name, others):
        encoded = encode(reader, [record(kind)])
        names = forward_names(type(model))
        given = {k: v for k, v in in_doubles(encoded.inputs).items() if k in names}
        log_p = model(**given).logits[0].log_softmax(-1)
        (found,) = encoded.rows
        totals.append(sum(float(log_p[position - 1, found.ids[position - found.offset]])
                          for position, _ in supervised_positions(found)))
    return totals


def by_row(batch: Batch, values: Tensor, tokens: Tensor) -> list[float]:
    number = len(batch["sources"])
    return values.new_zeros(number).index_add(0, batch["row"][tokens], values).tolist()


def pieces(batch: Batch, logits: Tensor, role: str) -> list[float]:
    """Log-likelihood of every record as the loss sees it: tokens compared alone, and chunks."""
    labels = batch["labels" if role == "student" else "teacher_labels"]
    chunk, last = batch[f"chunk_{role}"], batch["chunk_last"]
    log_p = label_log_prob(logits, labels)
    alone = batch["chunk_student"][batch["pair_student"]] < 0
    tokens = by_row(batch, log_p[batch[f"pair_{role}"][alone]], batch["pair_student"][alone])
    chunks = by_row(batch, chunk_logits(log_p, chunk, len(last))[:, 0], last)
    return [a + b for a, b in zip(tokens, chunks, strict=True)]


@EVERY
def test_pieces_add_up_to_the_answer(teacher: Name, student: Name) -> None:
    batch, s, u = measured(teacher, student)
    assert len(batch["chunk_last"]) > 3
    ours = log_prob_of_answers(student, "student", doubled(student, 1), teacher)
    theirs = log_prob_of_answers(teacher, "teacher", doubled(teacher), student)
    assert pieces(batch, s, "student") == pytest.approx(ours, rel=1e-9)
    assert pieces(batch, u, "teacher") == pytest.approx(theirs, rel=1e-9)
    figures = token_figures(batch, s, u, pair(teacher, student).pairing)
    every = torch.arange(len(batch["labels"]))
    for name, expected in (("nll", ours), ("teacher_nll", theirs)):
        assert figures[name].tokens is None
        assert by_row(batch, -figures[name].values, every) == pytest.approx(expected, rel=1e-9)


@EVERY
def test_chunk_figures_are_those_of_two_outcomes(teacher: Name, student: Name) -> None:
    """By a loop over chunks, with the definitions of both divergences."""
    batch, s, u = measured(teacher, student)
    figures = token_figures(batch, s, u, pair(teacher, student).pairing)
    log_q = s.log_softmax(-1).gather(1, batch["labels"][:, None])[:, 0]
    log_p = u.log_softmax(-1).gather(1, batch["teacher_labels"][:, None])[:, 0]
    assert torch.equal(figures["chunk_kl"].tokens, batch["chunk_last"])
    for index in range(len(batch["chunk_last"])):
        q = math.exp(float(log_q[batch["chunk_student"] == index].sum()))
        p = math.exp(float(log_p[batch["chunk_teacher"] == index].sum()))
        kl, reverse = (a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
                       for a, b in ((p, q), (q, p)))
        assert float(figures["chunk_kl"].values[index]) == pytest.approx(kl, rel=1e-5, abs=1e-9)
        assert float(figures["chunk_reverse_kl"].values[index]) == pytest.approx(
            reverse, rel=1e-5, abs=1e-9)


@EVERY
def test_losses_stand_where_they_belong(teacher: Name, student: Name) -> None:
    """A pair's loss at its token, a chunk's at its last one, nothing at those between."""
    batch, s, u = measured(teacher, student)
    pairing = pair(teacher, student).pairing
    losses = token_losses(ALL_LOSSES, batch, s, u, pairing, t=0.4)
    figures = token_figures(batch, s, u, pairing)
    expected = torch.zeros_like(losses["forward_kl"])
    for name in ("kl", "chunk_kl"):
        expected.index_add_(0, figures[name].tokens, figures[name].values.to(expected.dtype))
    assert torch.allclose(losses["forward_kl"], expected, rtol=1e-5, atol=1e-7)
    inner = torch.ones(len(expected), dtype=torch.bool)
    inner[batch["chunk_last"]] = inner[batch["pair_student"]] = False
    assert inner.any() or student.tokenizer != "other"  # the only one with shorter tokens
    for name, values in losses.items():
        assert values.shape == batch["labels"].shape
        assert torch.isfinite(values).all()
        assert name == "ce" or (values[inner] == 0).all()
    assert torch.equal(losses["ce"], figures["nll"].values)


# ----- oracles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["internvl", "gemma2", "smolvlm"])
def test_renamed_teacher_does_not_diverge(family: str) -> None:
    """Asked for chunks, a student that is the teacher with moved rows has losses of 0."""
    teacher, student = adapter(family, "teacher"), adapter(family, "student", "permuted")
    model = twin(family).eval()
    rows = model.get_output_embeddings().weight.shape[0]
    pairing = pair_models(teacher, student, head_rows(family), rows, alignment="chunks")
    assert pairing.case == "c"
    batch = DistillationCollator(student, teacher, pairing)(
        [row(kind) for kind in kinds(Name(family))])
    with torch.no_grad():
        logits = student_forward(model, batch)
    known = {*renamed_rows(family), *range(rows - PADDING, rows)}
    logits[:, [i for i in range(rows) if i not in known]] = -1000.0
    logits.requires_grad_()
    u = teacher_forward(built(family).model, batch)
    losses = token_losses(ALL_LOSSES, batch, logits, u, pairing, t=0.4)
    figures = token_figures(batch, logits, u, pairing)
    assert batch["counts"]["chunk_tokens"] == 0
    assert batch["counts"]["aligned_tokens"] == batch["counts"]["supervised_tokens"] > 20
    for name in TEACHED:
        assert losses[name].abs().max() < 1e-6
    assert figures["kl"].values.max() < 1e-6
    assert figures["agreement"].values.min() == 1.0
    assert figures["chunk_kl"].values.shape == (0,)
    (gradient,) = torch.autograd.grad(losses["taid"].sum(), logits)
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("size", [1, 2, 5])
def test_equal_likelihoods_have_no_loss_in_chunks(size: int) -> None:
    """Equal models, their tokens put together by force."""
    name = Name("internvl")
    batch, s, _ = measured(name, name)
    tokens = len(s)
    chunk = torch.arange(tokens) // size
    last = torch.tensor([int((chunk == i).nonzero()[-1]) for i in range(int(chunk.max()) + 1)])
    none = torch.empty(0, dtype=torch.long)
    forced = batch | {"chunk_student": chunk, "chunk_teacher": chunk, "chunk_last": last,
                      "pair_student": none, "pair_teacher": none, "map_index": none}
    pairing = pair(name, name).pairing
    for u, same in ((s, True), (s.roll(1, 0), False)):
        losses = token_losses(ALL_LOSSES, forced, s, u, pairing, t=0.4)
        for term in TEACHED:
            assert (losses[term] == 0).all() == same
            assert (losses[term].nonzero() == last).any(1).all()


@pytest.mark.parametrize(("teacher", "student"), [
    (Name("internvl"), Name("llava", "permuted")), (Name("gemma2"), Name("llama", "permuted"))],
    ids=str)
def test_equal_splits_have_the_losses_of_case_b(teacher: Name, student: Name) -> None:
    """Losses, gradients and figures of `shared`, also where chunks are asked for."""
    found = {}
    for alignment in ("shared", "chunks"):
        both = pair(teacher, student, alignment)
        batch = in_doubles(both.collator()([row(k) for k in kinds(teacher, student)]))
        with torch.no_grad():
            s = student_forward(doubled(student, 1), batch)
            u = teacher_forward(doubled(teacher), batch)
        s.requires_grad_()
        losses = token_losses(ALL_LOSSES, batch, s, u, both.pairing, t=0.4)
        gradients = {name: torch.autograd.grad(values.sum(), s, retain_graph=True)[0]
                     for name, values in losses.items()}
        figures = token_figures(batch, s, u, both.pairing)
        found[alignment] = losses, gradients, {k: v.values for k, v in figures.items()}
    for shared, chunked in zip(found["shared"], found["chunks"], strict=True):
        assert set(chunked) - set(shared) <= {"chunk_kl", "chunk_reverse_kl"}
        for name, values in shared.items():
            assert torch.allclose(chunked[name], values, rtol=1e-6, atol=1e-9), name


# ----- what must not break -----------------------------------------------------------------------


@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("student_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("teacher", "student"), PAIRS[3:5], ids=str)
def test_half_precision(
    teacher: Name, student: Name, student_dtype: torch.dtype, teacher_dtype: torch.dtype
) -> None:
    """Rounded logits have the losses of the same numbers in float64."""
    batch, s, u = measured(teacher, student)
    pairing = pair(teacher, student).pairing
    s, u = s.to(student_dtype).requires_grad_(), u.to(teacher_dtype)
    losses = token_losses(ALL_LOSSES, batch, s, u, pairing, t=0.4)
    exact = token_losses(ALL_LOSSES, batch, s.double(), u.double(), pairing, t=0.4)
    for name, values in losses.items():
        assert values.dtype == torch.float32
        assert torch.allclose(values.double(), exact[name], rtol=2e-4, atol=2e-5), name
        (gradient,) = torch.autograd.grad(values.sum(), s, retain_graph=True)
        assert gradient.dtype == student_dtype
        assert torch.isfinite(gradient).all()
    rounded = token_figures(batch, s, u, pairing)
    for name, figure in token_figures(batch, s.double(), u.double(), pairing).items():
        if name != "agreement":  # ties of rounded logits
            assert torch.allclose(rounded[name].values.double(), figure.values.double(),
                                  rtol=2e-4, atol=2e-5), name


@pytest.mark.parametrize(("teacher", "student"), PAIRS[3:5], ids=str)
def test_a_batch_without_a_usable_row_has_a_gradient_of_zero(teacher: Name, student: Name) -> None:
    model, found = doubled(student, 1), pair(teacher, student)
    batch = in_doubles(found.collator()([{"prompt": "hello", "completion": " "}]))
    s, u = student_forward(model, batch), teacher_forward(doubled(teacher), batch)
    losses = token_losses(ALL_LOSSES, batch, s, u, found.pairing, t=0.4)
    assert all(values.shape == (0,) for values in losses.values())
    assert all(len(figure.values) == 0
               for figure in token_figures(batch, s, u, found.pairing).values())
    gradients = torch.autograd.grad(sum(values.sum() for values in losses.values()),
                                    list(model.parameters()), allow_unused=True)
    assert any(g is not None for g in gradients)
    assert all((g == 0).all() for g in gradients if g is not None)


# ----- any cut into batches ----------------------------------------------------------------------


def gradient(data: list[Any], side: Side) -> list[Tensor]:
    """Of the sum of TAID and CE over all tokens of these records, in the student's weights."""
    teacher, student = SEES
    model, found = doubled(student, 1), pair(teacher, student)
    batch = in_doubles(found.collator(side)(data))
    objective = parse_objective({"terms": ["taid", {"name": "ce", "weight": 0.3}]})
    losses = token_losses(objective, batch, student_forward(model, batch),
                          teacher_forward(doubled(teacher), batch), found.pairing, t=0.4)
    return list(torch.autograd.grad(
        objective.weighted(losses).sum(), list(model.parameters()), allow_unused=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradient_of_a_batch_is_the_sum_of_its_parts(side: Side) -> None:
    data = [row(kind) for kind in kinds(*SEES)]
    whole = gradient(data, "right")
    parts = zip(gradient(data[:2], side), gradient(data[2:], side), strict=True)
    norm = math.sqrt(sum(float(g.square().sum()) for g in whole if g is not None))
    assert norm > 1
    for expected, (a, b) in zip(whole, parts, strict=True):
        both = [g for g in (a, b) if g is not None]
        assert (expected is None) == (not both)
        if both:
            # rotary angles are float32 even so, and left padding moves some models' positions
            assert float((sum(both) - expected).abs().max()) < 1e-7 * norm


def tally(batch_size: int, process: tuple[int, int] = (0, 1)) -> Tally:
    teacher, student = SEES
    both = pair(teacher, student)
    collator = both.collator()
    data = [row(k) | {"category": k} for _ in range(2) for k in kinds(teacher, student)]
    data.append({"prompt": "hello", "completion": " "})
    return evaluate_pair(
        doubled(student, 1), LocalTeacher(doubled(teacher)), data,
        lambda rows: in_doubles(collator(rows)),
        both.pairing, batch_size=batch_size, process=process)


def flat(summary: dict[str, Any], path: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in summary.items():
        value = dict(enumerate(value)) if isinstance(value, list) else value
        found |= flat(value, f"{path}{key}/") if isinstance(value, dict) else \
            {f"{path}{key}": value}
    return found


@cache
def one_by_one() -> dict[str, float]:
    return flat(summarise(tally(1)))


def test_evaluation_of_chunks() -> None:
    """The figures are those of one batch, put together by hand."""
    batch, s, u = measured(*SEES)
    figures = token_figures(batch, s, u, pair(*SEES).pairing, closely=True)
    found = one_by_one()
    for name, figure in figures.items():
        assert found[name] == pytest.approx(float(figure.values.double().mean()), rel=1e-5), name
    assert found["coverage"] == 1.0
    assert found["chunk_coverage"] == float((batch["chunk_student"] >= 0).double().mean())
    assert 0 < found["chunk_coverage"] < 1
    assert found["n_tokens"] == 2 * len(s)
    assert found["dropped/empty answer"] == 1
    assert math.isfinite(found["chunk_kl_stderr"])


@pytest.mark.parametrize("batch_size", [3, 8])
def test_evaluation_does_not_depend_on_batches(batch_size: int) -> None:
    found = flat(summarise(tally(batch_size)))
    assert found == pytest.approx(one_by_one(), rel=1e-6, abs=1e-7, nan_ok=True)


def test_a_best_model_by_chunks_needs_chunks_in_the_held_out_records() -> None:
    found = dict(one_by_one())  # which others read, too
    refuse_absent("eval_chunk_kl", found)
    refuse_absent("kl", {})
    del found["chunk_kl"]
    with pytest.raises(RecipeError, match=r"metric_for_best_model = 'eval_chunk_kl'.*take 'kl'"):
        refuse_absent("eval_chunk_kl", found)


def test_evaluation_by_two_processes() -> None:
    first, second = tally(3, (0, 2)), tally(3, (1, 2))
    first.merge(second)
    assert flat(summarise(first)) == pytest.approx(one_by_one(), rel=1e-6, abs=1e-7, nan_ok=True)


def test_maps_of_other_positions_are_not_mixed_up() -> None:
    """With a glued first token each pair goes through its own map: against one pair at a time."""
    teacher, student = Name("smolvlm"), Name("gemma3", "other")
    batch, s, u = measured(teacher, student)
    pairing: Pairing = pair(teacher, student).pairing
    assert set(batch["map_index"].tolist()) == {0, 1}
    kl = token_figures(batch, s, u, pairing)["kl"]
    assert torch.equal(kl.tokens, batch["pair_student"])
    for index, (a, b, m) in enumerate(zip(batch["pair_student"].tolist(),
                                          batch["pair_teacher"].tolist(),
                                          batch["map_index"].tolist(), strict=True)):
        vocabulary = pairing.maps[m]
        q = vocabulary.map_student(s[a : a + 1]).log_softmax(-1)
        p = vocabulary.map_teacher(u[b : b + 1]).log_softmax(-1)
        possible = p > -torch.inf
        expected = float((p.exp() * (p - q))[possible].sum())
        assert float(kl.values[index]) == pytest.approx(expected, rel=1e-5, abs=1e-7)
