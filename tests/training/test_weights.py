"""Answers that count more or less: a factor of their tokens' losses, over the sum of factors."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training.runs import WORDS, make_trainer, step_gradient, weights
from training.test_invariance import SGD, TOLERANCE, in_processes, relative

from taid_vlm.batch.losses import weight_sum
from taid_vlm.evaluation.answers import read_answers, to_lines
from taid_vlm.evaluation.held_out import summarise

SPLITS = {"4 x 2": (4, 2), "1 x 8": (1, 8)}
BOTH = {"terms": [{"name": "kl"}, {"name": "ce", "weight": 0.5}]}


def talks(number: int = 8, *factors: Any) -> list[dict[str, Any]]:
    """Conversations of two turns with weights of all sorts, always the same ones."""
    rng = random.Random(3)

    def answer() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12)))

    def told(index: int) -> dict[str, Any]:
        return {"role": "assistant", "content": answer(),
                **({"weight": factors[index % len(factors)]} if factors else {})}

    return [{"messages": [{"role": "user", "content": "what"}, told(2 * i),
                          {"role": "user", "content": "and"}, told(2 * i + 1)]}
            for i in range(number)]


FACTORS = (0.25, 1.0, 0, 2.0, 0.5)


def gradient(folder: Path, data: list[dict[str, Any]], **options: Any) -> dict[str, Tensor]:
    return step_gradient(folder, data=data, **{"objective": BOTH, **options})


@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_the_gradient_is_the_weighted_mean_of_single_rows(
    implementation: str, tmp_path: Path
) -> None:
    data, options = talks(4, *FACTORS), {"loss_implementation": implementation}
    whole = gradient(tmp_path, data, per_device_train_batch_size=4, **options)
    total, parts = 0.0, []
    for row in data:
        trainer = make_trainer(tmp_path, data=[row])
        amount = weight_sum(trainer.collator([row]))
        total += amount
        parts.append((amount, gradient(tmp_path, [row], per_device_train_batch_size=1, **options)))
    assert total != int(total)
    summed = {name: sum(n * part[name] for n, part in parts) / total for name in whole}
    assert relative(whole, summed) < TOLERANCE


def test_one_weight_for_all_is_no_weight_but_in_its_sum(tmp_path: Path) -> None:
    plain = gradient(tmp_path, talks())
    assert relative(plain, gradient(tmp_path, talks(8, 0.3))) < TOLERANCE
    assert relative(plain, gradient(tmp_path, talks(8, 1, 0.3))) > 1e-3


def test_both_implementations_and_any_split_give_the_same(tmp_path: Path) -> None:
    data = talks(8, *FACTORS)
    reference = gradient(tmp_path, data, loss_implementation="reference")
    assert relative(reference, gradient(tmp_path, data, loss_implementation="fused")) < TOLERANCE
    for size, steps in SPLITS.values():
        other = gradient(tmp_path, data, per_device_train_batch_size=size,
                         gradient_accumulation_steps=steps)
        assert relative(reference, other) < TOLERANCE


def test_two_processes_give_the_same(tmp_path: Path) -> None:
    data = talks(8, *FACTORS)
    in_processes(2, tmp_path, two={**SGD, "per_device_train_batch_size": 4, "data": data,
                                   "objective": BOTH})
    before = weights(make_trainer(tmp_path, data=data))
    after = load_file(tmp_path / "two" / "final.safetensors")
    two = {name: before[name] - after[name] for name in before}
    assert relative(gradient(tmp_path / "one", data), two) < TOLERANCE


def test_a_step_may_weigh_less_than_one(tmp_path: Path) -> None:
    plain = gradient(tmp_path, talks(1))
    assert relative(plain, gradient(tmp_path, talks(1, 1e-4))) < 1e-4


@pytest.mark.parametrize("objective", ["forward_kl", "taid"])
def test_log_and_evaluation_weigh_alike(objective: str, tmp_path: Path) -> None:
    data = talks(6, *FACTORS)
    trainer = make_trainer(tmp_path, data=data, objective=objective, logging_steps=1, max_steps=1,
                           per_device_train_batch_size=6, learning_rate=1e-9)
    figures = trainer.evaluate()
    trainer.train()
    logged = next(line for line in trainer.state.log_history if "loss" in line)
    for name in ("kl", "nll", "teacher_entropy"):
        assert logged[name] == pytest.approx(figures[f"eval_{name}"], rel=1e-4)
    assert figures["eval_n_tokens"] == len(trainer.collator(data)["labels"])
    assert logged["loss"] == pytest.approx(logged[f"loss/{objective}"], abs=2e-4)


def test_single_answers_add_up_to_the_weighted_figures(tmp_path: Path) -> None:
    data = talks(6, *FACTORS)
    trainer = make_trainer(tmp_path, data=data)
    tally = trainer.tally(data, keep_answers=True)
    (tmp_path / "eval_answers.jsonl").write_text(to_lines(tally.answers, tally.answers))
    pairs = read_answers(tmp_path / "eval_answers.jsonl")
    mean = sum(pair.after["kl"] for pair in pairs) / sum(pair.size("kl") for pair in pairs)
    assert mean == pytest.approx(summarise(tally)["kl"], rel=1e-5)
    plain = [sum(a.totals["kl"] for a in tally.answers), sum(a.tokens for a in tally.answers)]
    assert mean != pytest.approx(plain[0] / plain[1], rel=1e-5)


def test_chunks_weigh_as_their_answer(tmp_path: Path) -> None:
    options = {"teacher": "gemma2", "student": "qwen2", "objective": {
        "name": "kl", "alignment": "chunks"}}
    data = talks(4, *FACTORS)
    whole = gradient(tmp_path, data, per_device_train_batch_size=4, **options)
    split = gradient(tmp_path, data, per_device_train_batch_size=1,
                     gradient_accumulation_steps=4, **options)
    assert relative(whole, split) < TOLERANCE
    assert relative(whole, gradient(tmp_path, talks(4), per_device_train_batch_size=4,
                                    **options)) > 1e-3
    assert torch.is_tensor(next(iter(whole.values())))
