"""Held-out figures: equal to a naive float64 loop, however the records are cut into batches."""

from __future__ import annotations

import math
import random
import tempfile
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training.runs import WORDS, make_trainer
from zoo.images import images

from taid_vlm import DistillationTrainer
from taid_vlm.evaluation.held_out import ALL, Moments, Tally, evaluate_pair, summarise
from taid_vlm.models.forward import answer_logits

FIGURES = ("kl", "reverse_kl", "jsd", "teacher_entropy", "student_entropy", "agreement", "nll",
           "teacher_nll", "confidence", "token_accuracy", "head_mass", "tail_mass",
           "teacher_head_mass", "teacher_tail_mass")


def records(number: int = 12, seed: int = 3) -> list[dict[str, Any]]:
    """Images or none, one turn or two, three categories, answers of unequal length."""
    rng, made = random.Random(seed), []

    def answer() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 9)))

    for index in range(number):
        row: dict[str, Any] = {"prompt": "what", "completion": answer(), "category": "text"}
        if index % 3 == 1:
            row |= {"prompt": "<image>what", "images": images(1), "category": "image"}
        if index % 3 == 2:
            turns = [("user", "one"), ("assistant", answer()), ("user", "two"),
                     ("assistant", answer())]
            row = {"messages": [{"role": role, "content": text} for role, text in turns],
                   "categories": ["text", "later"]}
        made.append(row)
    return made


@cache
def trainer() -> DistillationTrainer:
    """A pair in float64, whose figures therefore do not depend on the padding."""
    torch.set_num_threads(1)
    made = make_trainer(tempfile.mkdtemp(), student="llava", tokenizer="permuted", data=records())
    made.model.double()
    made.teacher.model.double()
    return made


def in_doubles(batch: Any) -> Any:
    """Pixels as float64."""
    if isinstance(batch, dict):
        return {key: in_doubles(value) for key, value in batch.items()}
    return batch.double() if isinstance(batch, Tensor) and batch.is_floating_point() else batch


def collate(rows: Any) -> Any:
    return in_doubles(trainer().data_collator(rows))


def evaluated(data: list[dict[str, Any]], **options: Any) -> Tally:
    pair = trainer()
    return evaluate_pair(pair.model, pair.teacher, data, collate, pair.pairing, **options)


# ----- the naive loop -----------------------------------------------------------------------


def token_by_token(s: np.ndarray, u: np.ndarray, label: int, other: int) -> dict[str, float]:
    """All figures of one token, by their definitions, from whole-vocabulary logits."""
    pairing = trainer().pairing
    assert pairing is not None
    vocabulary = pairing.maps[0]
    q = coarse(s, vocabulary.student, vocabulary.has_rest)
    p = coarse(u, vocabulary.teacher, vocabulary.has_rest)
    order, middle = np.argsort(-p), (p + q) / 2
    head, tail = order[:10], order[math.ceil(0.8 * len(p)):]
    return {
        "jsd": float((p * np.log(p / middle) + q * np.log(q / middle)).sum()) / 2,
        "confidence": float(softmax(s).max()),
        "token_accuracy": float(softmax(s).argmax() == label),
        "head_mass": float(q[head].sum()), "tail_mass": float(q[tail].sum()),
        "teacher_head_mass": float(p[head].sum()), "teacher_tail_mass": float(p[tail].sum()),
        "kl": float((p * (np.log(p) - np.log(q))).sum()),
        "reverse_kl": float((q * (np.log(q) - np.log(p))).sum()),
        "teacher_entropy": float(-(p * np.log(p)).sum()),
        "student_entropy": float(-(q * np.log(q)).sum()),
        "agreement": float(p.argmax() == q.argmax()),
        "nll": -float(np.log(softmax(s)[label])),
        "teacher_nll": -float(np.log(softmax(u)[other])),
    }


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def coarse(logits: np.ndarray, side: Any, has_rest: bool) -> np.ndarray:
    """Shared entries, and the rest's whole probability in one more; padding rows are no outcome."""
    p = softmax(logits)
    entries = [*p[side.shared.numpy()], *([p[side.rest.numpy()].sum()] if has_rest else [])]
    return np.array(entries) / sum(entries)


@cache
def naive() -> tuple[tuple[str, tuple[dict[str, float], ...]], ...]:
    """(category, its tokens' figures) of every answer of every record, one record at a time."""
    pair, answers = trainer(), []
    for row in records():
        batch = collate([row])
        with torch.no_grad():
            s = answer_logits(pair.model, batch["student_inputs"], batch["student_mask"]).numpy()
            u = pair.teacher.logits(batch).numpy()
        assert s.dtype == np.float64
        turns: dict[int, list[dict[str, float]]] = defaultdict(list)
        for index, turn in enumerate(batch["turn"].tolist()):
            turns[turn].append(token_by_token(
                s[index], u[index], int(batch["labels"][index]),
                int(batch["teacher_labels"][index])))
        names = row.get("categories") or [row["category"]]
        answers += [(names[turn], tuple(tokens)) for turn, tokens in turns.items()]
    return tuple(answers)


def naive_mean(figure: str, category: str | None = None) -> float:
    tokens = [token[figure] for name, found in naive() for token in found
              if category in (None, name)]
    return sum(tokens) / len(tokens)


@pytest.mark.parametrize("figure", FIGURES)
def test_means_equal_the_naive_loop(figure: str) -> None:
    """The package rounds every token's figure to float32 once, hence the tolerance."""
    summary = summarise(evaluated(records()))
    assert summary["n_tokens"] == sum(len(tokens) for _, tokens in naive())
    assert summary["n_answers"] == len(naive()) == 16
    assert summary[figure] == pytest.approx(naive_mean(figure), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("figure", ["kl", "agreement", "nll"])
def test_categories_equal_the_naive_loop(figure: str) -> None:
    found = summarise(evaluated(records()))["by_category"]
    assert found.keys() == {"text", "image", "later"}
    for name, figures in found.items():
        assert figures["n_answers"] == sum(name == category for category, _ in naive())
        assert figures[figure] == pytest.approx(naive_mean(figure, name), rel=1e-6, abs=1e-7)
    tokens = sum(figures["n_tokens"] for figures in found.values())
    assert tokens == sum(len(found) for _, found in naive())


def naive_ece(category: str | None = None) -> float:
    """15 bins of confidence, by definition."""
    bins: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for name, found in naive():
        for token in found if category in (None, name) else ():
            confidence = token["confidence"]
            bins[min(int(confidence * 15), 14)].append((confidence, token["token_accuracy"]))
    gaps = [abs(sum(hit - sure for sure, hit in inside)) for inside in bins.values()]
    return sum(gaps) / sum(map(len, bins.values()))


def test_calibration_equals_the_naive_loop() -> None:
    summary = summarise(evaluated(records()))
    assert summary["ece"] == pytest.approx(naive_ece(), rel=1e-6)
    assert sum(b["tokens"] for b in summary["calibration"]) == summary["n_tokens"]
    for name, figures in summary["by_category"].items():
        assert figures["ece"] == pytest.approx(naive_ece(name), rel=1e-6)
    assert summary["ece_stderr"] > 0


# ----- batches and processes ----------------------------------------------------------------


def close(first: Any, second: Any) -> None:
    """Equal to 1e-12, key by key."""
    assert type(first) is type(second)
    if isinstance(first, list):
        first, second = (dict(enumerate(found)) for found in (first, second))
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            close(first[key], second[key])
    elif isinstance(first, float) and not math.isnan(first):
        assert second == pytest.approx(first, abs=1e-12, rel=1e-12)


def rounded_away(size: int) -> dict[str, Any]:
    """The summary at a batch size, from figures that are the same in any batch."""
    return summarise(evaluated(records(), batch_size=size))


@pytest.mark.parametrize("size", [1, 2, 5, 12, 64])
def test_figures_do_not_depend_on_the_batch_size(size: int) -> None:
    """Models in float64; figures are float32 per token, which may round to either side."""
    first, second = rounded_away(4), rounded_away(size)
    for key in ("n_tokens", "n_answers", "coverage", "dropped", "agreement"):
        assert first[key] == second[key]
    for key in FIGURES:
        assert second[key] == pytest.approx(first[key], rel=1e-8)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 20])
def test_processes_merge_to_the_whole(world: int) -> None:
    """Every record once, also where there are fewer records than processes."""
    merged = Tally()
    for rank in range(world):
        merged.merge(evaluated(records(), batch_size=1, process=(rank, world)))
    close(summarise(merged), rounded_away(1))


def test_float32_models_agree_over_batch_sizes(tmp_path: Path) -> None:
    made = make_trainer(tmp_path)
    found = [summarise(evaluate_pair(made.model, made.teacher, records(), made.data_collator,
                                     made.pairing, batch_size=size)) for size in (1, 7)]
    assert found[0]["n_tokens"] == found[1]["n_tokens"]
    assert found[0]["kl"] == pytest.approx(found[1]["kl"], rel=1e-5)


# ----- standard errors ----------------------------------------------------------------------


def test_the_standard_error_is_the_textbook_one() -> None:
    """Ratio estimator with answers as clusters: sqrt(n/(n-1) sum e_i^2) / tokens (Cochran)."""
    sums = np.array([sum(token["kl"] for token in tokens) for _, tokens in naive()])
    sizes = np.array([len(tokens) for _, tokens in naive()], dtype=float)
    residuals = sums - sums.sum() / sizes.sum() * sizes
    n = len(sums)
    expected = math.sqrt(n / (n - 1) * (residuals**2).sum()) / sizes.sum()
    assert summarise(evaluated(records()))["kl_stderr"] == pytest.approx(expected, rel=1e-5)


def test_the_standard_error_matches_a_bootstrap() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 20, 400).astype(float)
    means = rng.gamma(2.0, 0.5, 400)  # tokens of one answer go together
    sums = np.array([rng.normal(mean, 0.3, int(size)).sum()
                     for mean, size in zip(means, sizes, strict=True)])
    moments = Moments()
    for total, tokens in zip(sums, sizes, strict=True):
        moments.add(float(total), float(tokens))
    picks = rng.integers(0, 400, (4000, 400))
    spread = (sums[picks].sum(1) / sizes[picks].sum(1)).std()
    assert moments.mean == pytest.approx(sums.sum() / sizes.sum())
    assert moments.stderr == pytest.approx(spread, rel=0.05)


def test_equal_sizes_give_the_plain_standard_error() -> None:
    values = np.random.default_rng(1).normal(3.0, 1.0, 50)
    moments = Moments()
    for value in values:
        moments.add(float(value), 1.0)
    assert moments.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(50), rel=1e-9)


def test_a_standard_error_needs_two_answers() -> None:
    moments = Moments()
    assert math.isnan(moments.stderr)
    assert math.isnan(moments.mean)
    moments.add(2.0, 4.0)
    assert math.isnan(moments.stderr)
    assert moments.mean == 0.5
    moments.add(2.0, 4.0)
    assert moments.stderr == 0.0


def test_moments_merge_as_they_add() -> None:
    whole, parts = Moments(), [Moments(), Moments()]
    for index in range(10):
        for one in (whole, parts[index % 2]):
            one.add(index / 4, index + 1)
    parts[0].merge(parts[1])
    assert vars(parts[0]) == vars(whole)


# ----- edges --------------------------------------------------------------------------------


def test_no_records() -> None:
    summary = summarise(evaluated([]))
    assert summary == {"n_tokens": 0, "n_answers": 0, "coverage": 0.0, "chunk_coverage": 0.0,
                       "dropped": {}, "by_category": {}}


def test_unusable_records_are_counted_and_change_nothing() -> None:
    empty = {"prompt": "hello", "completion": " "}
    mixed = [row for pair in ((row, empty) for row in records()) for row in pair]
    found = summarise(evaluated(mixed, batch_size=1))
    assert found["dropped"] == {"empty answer": 12}
    close({**found, "dropped": {}}, rounded_away(1))


def test_nothing_usable() -> None:
    summary = summarise(evaluated([{"prompt": "hello", "completion": " "}] * 3))
    assert summary["dropped"] == {"empty answer": 3}
    assert summary["n_tokens"] == 0
    assert summary["coverage"] == 0.0


def test_without_a_teacher() -> None:
    from taid_vlm.batch.collator import DistillationCollator

    collator = DistillationCollator(trainer().data_collator.student)
    tally = evaluate_pair(trainer().model, None, records(),
                          lambda rows: in_doubles(collator(rows)), None)
    found = summarise(tally)
    assert found["nll"] == pytest.approx(naive_mean("nll"), rel=1e-5)
    assert "kl" not in found
    assert found["coverage"] == 1.0


def test_a_category_of_no_name_is_only_in_the_whole() -> None:
    data = [{"prompt": "what", "completion": "red"},
            {"prompt": "what", "completion": "blue", "category": "named"}]
    tally = evaluated(data)
    assert tally.table.keys() == {ALL, "named"}
    assert summarise(tally)["n_answers"] == 2
    assert summarise(tally)["by_category"]["named"]["n_answers"] == 1


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_student_is_restored(training: bool) -> None:
    model = trainer().model
    model.train(training)
    evaluated(records(2))
    assert model.training == training
    model.eval()


def test_dropout_is_off() -> None:
    """The same figures twice, whatever the mode it was called in."""
    model = trainer().model
    model.train()
    found = summarise(evaluated(records(), batch_size=1))
    model.eval()
    close(found, rounded_away(1))


def test_no_random_state_and_no_gradient_is_touched() -> None:
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    evaluated(records())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert all(p.grad is None for p in trainer().model.parameters())
