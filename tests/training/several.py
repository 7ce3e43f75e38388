"""Runs with several teachers: two of other families and tokenizers, rows shared out by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.runs import Recorder, rows
from zoo import build

from taid_vlm import DistillationConfig, DistillationTrainer

NAMES = ("a", "b", None, "a", None, "b")  # of the rows, in turn; None: the mixture
MIXTURE = {"a": 0.7, "b": 0.3}


def shared_out(number: int = 32, **options: Any) -> list[dict[str, Any]]:
    """Rows with and without images, one in two answers counting half, with their teachers."""
    data = rows(number, **options)
    for index, row in enumerate(data):
        if NAMES[index % 6] is not None:
            row["teacher"] = NAMES[index % 6]
        if "messages" in row:
            row["messages"][1]["weight"] = 0.5
    return data


def several_trainer(
    output: str | Path, *, data: list[dict[str, Any]] | None = None,
    families: tuple[str, str] = ("internvl", "llava"),
    tokenizers: tuple[str, str] = ("plain", "metaspace"), only: str | None = None,
    kill_at: int | None = None, dropout: float = 0.0, **arguments: Any,
) -> DistillationTrainer:
    """`only`: a teacher by its name alone."""
    defaults = {
        "per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 1e-3, "seed": 7,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "logging_steps": 2, "dataloader_pin_memory": False,
        **({} if only else {"teacher_weights": MIXTURE}),
    }
    built = {name: build(family, seed=seed, tokenizer=tokenizer) for name, family, tokenizer, seed
             in zip(MIXTURE, families, tokenizers, (0, 5), strict=True) if only in (None, name)}
    ours = build("llava", seed=1, tokenizer="permuted")
    for module in ours.model.modules() if dropout else ():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    data = shared_out() if data is None else data
    recorder = Recorder(kill_at)
    trainer = DistillationTrainer(
        ours.model, {name: one.model for name, one in built.items()},
        DistillationConfig(str(output), **{**defaults, **arguments}), data, data[:8],
        ours.processor, {name: one.processor for name, one in built.items()},
        callbacks=[recorder])
    recorder.trainer = trainer
    trainer.recorder = recorder
    return trainer
