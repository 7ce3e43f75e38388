"""Held-out figures inside the student's forward are those from all logits of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training.runs import make_trainer, rows
from training.several import several_trainer

from taid_vlm.evaluation.held_out import Tally, summarise
from taid_vlm.fused.divergence import FusedDivergence
from taid_vlm.training import figures as module
from taid_vlm.training.figures import fused_figures

SETTINGS: dict[str, dict[str, Any]] = {
    "pictures": {},
    "one vocabulary": {"tokenizer": "plain"},
    "text": {"teacher": "llama", "student": "qwen2", "streamed": True},
    "a softcap": {"teacher": "gemma2", "student": "gemma2", "streamed": True},
    "autocast": {"bf16": True},
    "an adapter on the head": {"peft": {"r": 4, "target_modules": ["q_proj", "lm_head"]}},
    "SFT": {"objective": "ce"},
}


def tallied(trainer: Any, fused: bool, monkeypatch: pytest.MonkeyPatch) -> Tally:
    asked, measure = list[bool](), fused_figures(trainer)

    def watched(*call: Any) -> Any:
        found = measure(*call) if fused and measure is not None else None
        asked.append(found is not None)
        return found

    with monkeypatch.context() as patch:
        patch.setattr("taid_vlm.training.trainer.fused_figures", lambda trainer: watched)
        found: Tally = trainer.tally(rows(6, seed=3, text_only=trainer.args.max_steps == 1),
                                     keep_answers=True)
    assert asked == [fused] * len(asked) != []
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_figures_are_those_of_all_logits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = SETTINGS[name]
    text = setting.get("streamed", False)
    trainer = make_trainer(tmp_path, **setting, max_steps=1 if text else 2,
                           per_device_eval_batch_size=4, loss_memory_budget=60_000)
    for trained in (False, True):
        if trained:
            trainer.train()
        state = torch.random.get_rng_state()
        fused, plain = (tallied(trainer, way, monkeypatch) for way in (True, False))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert fused.tokens == plain.tokens
        found, want = summarise(fused), summarise(plain)
        assert found.keys() == want.keys()
        for key, value in want.items():
            if isinstance(value, float):
                near = 2e-2 if setting.get("bf16") else 2e-5
                assert found[key] == pytest.approx(value, rel=near, abs=near), (key, trained)
        assert [answer.source for answer in fused.answers] == [
            answer.source for answer in plain.answers]


def test_logits_are_made_by_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, loss_memory_budget=60_000, per_device_eval_batch_size=8)
    sizes, figures_of_rows = list[int](), module.figures_of_rows
    monkeypatch.setattr(module, "figures_of_rows", lambda *call, **options: (
        sizes.append(call[5].numel()), figures_of_rows(*call, **options))[1])
    tally = trainer.tally(rows(8, seed=1))
    width = trainer.model.get_output_embeddings().out_features
    assert sum(sizes) == tally.tokens["aligned"] * width
    assert len(sizes) > 4
    assert max(sizes) * 4 < 60_000


def test_room_for_logits_is_the_losss(tmp_path: Path) -> None:
    """What a CPU keeps for the next step is not kept twice."""
    trainer = make_trainer(tmp_path)
    trainer.train()
    made = fused_figures(trainer)
    assert made is not None
    assert made.fused.student_scratch is trainer._step.fused.student_scratch
    assert isinstance(made.fused, FusedDivergence)


@pytest.mark.parametrize("setting", [
    {"loss_implementation": "reference"}, {"teacher": "llama", "student": "qwen2",
                                           "tokenizer": "metaspace", "streamed": True}])
def test_what_needs_all_logits_gets_them(setting: dict[str, Any], tmp_path: Path) -> None:
    """Asked for, and pairs that split texts differently."""
    trainer = make_trainer(tmp_path, **setting)
    measure = fused_figures(trainer)
    batch = trainer.data_collator(rows(4, text_only=True))
    assert measure is None or measure(trainer.model, trainer.teacher, batch) is None
    assert summarise(trainer.tally(rows(4, text_only=True)))["n_tokens"] > 0


def test_a_teacher_whose_head_is_not_known_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=2)
    asked = []
    monkeypatch.setattr(trainer.teacher, "hidden", asked.append)
    for _ in range(2):
        assert summarise(trainer.tally(rows(6)))["n_tokens"] > 0
    assert len(asked) == 1


def test_of_several_teachers_no_process_finds_out_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch may have a teacher's tokens in one process and none in another."""
    trainer = several_trainer(tmp_path)
    measure = fused_figures(trainer)
    assert measure is not None
    measure.processes = 2
    monkeypatch.setattr(module, "gather_object", lambda _: pytest.fail("waits for the others"))
    batch = trainer.data_collator([trainer.train_dataset[0]])
    for parts in (batch["parts"], {}):
        assert measure(trainer.model, trainer.teacher, {**batch, "parts": parts}) is None
