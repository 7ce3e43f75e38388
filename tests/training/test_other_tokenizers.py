"""Training with a student of another tokenizer: any split of a step, what is logged, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training.runs import make_trainer, rows, step_gradient, weights
from training.test_invariance import ALTERNATIVES, TOLERANCE, relative
from training.test_trainer import by_hand, logs

from taid_vlm.batch.figures import token_figures
from taid_vlm.batch.forward import student_forward, teacher_forward
from taid_vlm.errors import AlignmentError

OBJECTIVE = {"terms": [{"name": "taid"}, {"name": "ce", "weight": 0.5}]}
PAIR: dict[str, Any] = {"teacher": "internvl", "student": "llava", "tokenizer": "metaspace",
                        "objective": OBJECTIVE, "data": rows(8)}
CHUNK_FIGURES = ("chunk_kl", "chunk_reverse_kl")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    return step_gradient(tmp_path_factory.mktemp("reference"), **PAIR)


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_gradient_does_not_depend_on_batches(
    name: str, reference: dict[str, Tensor], tmp_path: Path
) -> None:
    found = step_gradient(tmp_path, **PAIR, **ALTERNATIVES[name])
    assert relative(reference, found) < TOLERANCE


def test_logged_figures_are_means_over_what_they_are_defined_on(tmp_path: Path) -> None:
    data = rows(8)
    trainer = make_trainer(tmp_path, **PAIR | {"data": data}, per_device_train_batch_size=4,
                           gradient_accumulation_steps=2, logging_steps=1, max_steps=1,
                           learning_rate=0.0)
    assert trainer.pairing is not None
    assert trainer.pairing.case == "c"
    batch = trainer.data_collator(data)
    with torch.no_grad():
        figures = token_figures(batch, student_forward(trainer.model, batch),
                                teacher_forward(trainer.teacher_model, batch), trainer.pairing)
    expected = by_hand(trainer, data)
    trainer.train()
    row = logs(trainer)[0]
    assert set(CHUNK_FIGURES) < set(figures)
    for name, figure in figures.items():
        assert row[name] == pytest.approx(float(figure.values.double().mean()), rel=1e-4), name
    assert row["loss/taid"] == pytest.approx(expected, rel=1e-5)
    assert row["loss/ce"] == pytest.approx(row["nll"], rel=1e-6)
    assert row["loss"] == pytest.approx(row["loss/taid"] + 0.5 * row["loss/ce"], rel=1e-6)


@pytest.mark.parametrize(("teacher", "student", "tokenizer"), [
    ("internvl", "llava", "metaspace"), ("smolvlm", "qwen2_5_vl", "other")])
def test_training_comes_nearer_to_the_teacher(
    teacher: str, student: str, tokenizer: str, tmp_path: Path
) -> None:
    trainer = make_trainer(
        tmp_path, teacher=teacher, student=student, tokenizer=tokenizer, data=rows(8),
        objective="taid", learning_rate=5e-3, logging_steps=1, max_steps=8)
    before = trainer.evaluate()
    start = weights(trainer)
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_coverage"] == after["eval_coverage"] == 1.0
    assert 0 < before["eval_chunk_coverage"] < 1
    for name in ("eval_kl", "eval_chunk_kl"):
        assert after[name] < before[name], name
    assert all(bool(value.isfinite().all()) for value in weights(trainer).values())
    assert any(not torch.equal(start[name], value) for name, value in weights(trainer).items())
    assert len(logs(trainer)) == 8
    assert all(math.isfinite(row[name]) for row in logs(trainer) for name in CHUNK_FIGURES)


@pytest.mark.parametrize(("alignment", "tokenizer", "told"), [
    ("exact", "metaspace", "alignment: exact, but teacher and student split text differently"),
    ("shared", "unigram", "alignment: shared, but teacher and student split text differently"),
    ("exact", "permuted", "alignment: exact, but the two vocabularies are not the same"),
])
def test_an_alignment_that_does_not_hold_is_refused(
    alignment: str, tokenizer: str, told: str, tmp_path: Path
) -> None:
    mend = "shared" if tokenizer == "permuted" else "chunks"
    with pytest.raises(AlignmentError, match=rf"^{told}.* Use alignment: {mend}"):
        make_trainer(tmp_path, **PAIR | {"tokenizer": tokenizer, "objective": {
            "name": "taid", "alignment": alignment}})


def test_chunks_can_be_asked_for(tmp_path: Path) -> None:
    """Of equal splits nothing is left to chunks: the loss is that of case b."""
    losses = []
    for alignment, case in (("auto", "b"), ("chunks", "c")):
        trainer = make_trainer(tmp_path / alignment, **PAIR | {
            "tokenizer": "permuted", "objective": {**OBJECTIVE, "alignment": alignment}},
            logging_steps=1)
        assert trainer.pairing is not None
        assert trainer.pairing.case == case
        trainer.train()
        losses.append([row["loss"] for row in logs(trainer)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
