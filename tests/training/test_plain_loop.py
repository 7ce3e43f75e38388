"""The plain loop and the Trainer are the same training: equal weights, not similar ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from training.runs import make_trainer, rows, weights


def plain_loop() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "plain_loop.py"
    spec = importlib.util.spec_from_file_location("plain_loop", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("objective", ["taid", {"terms": [{"name": "rkl"}, {"name": "ce"}]}])
def test_equal_weights(objective: object, tmp_path: Path) -> None:
    """Two epochs and a bit, with accumulation and a partial last step per epoch."""
    options = {"max_steps": 5, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2,
               "weight_decay": 0.0, "warmup_steps": 2, "objective": objective}
    trained, fresh = (make_trainer(tmp_path, **options) for _ in range(2))
    trained.train()
    plain = plain_loop().train(
        fresh.model, fresh.teacher_model, fresh.data_collator, fresh.pairing, rows(), fresh.args)
    expected = weights(trained)
    assert all(torch.equal(expected[name], p) for name, p in plain.named_parameters())
