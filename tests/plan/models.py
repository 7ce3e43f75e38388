"""Pairs that are large enough for their memory to be measured, and what one training step takes.

Only configurations and processors are saved: a plan reads no weights. A measured step runs on the
same configurations with random weights.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from cli.recipes import write_jsonl, write_recipe
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    TrainerCallback,
)
from zoo import make_tokenizer
from zoo.families import FAMILIES
from zoo.images import noise

from taid_vlm import DistillationTrainer
from taid_vlm.config.recipe import Recipe
from taid_vlm.models.loading import sees_images
from taid_vlm.runs.ingredients import gather, lora_config

WORDS = ("a", "red", "green", "blue", "square", "circle", "left", "right", "above", "of", "the")
TEXT = {"vocab_size": 640, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "attention_dropout": 0.0, "tie_word_embeddings": False}
TOWER = {"hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 6,
         "num_attention_heads": 4, "image_size": 96}


def save_pair(folder: Path, families: Mapping[str, str], **text: Any) -> dict[str, str]:
    """{role: folder} of configurations and processors; `text` changes the language models."""
    paths = {}
    for role, family in families.items():
        tok = make_tokenizer(family)
        wider = {"hidden_size": 256, "intermediate_size": 704} if role == "teacher" else {}
        own = {**TEXT, **wider, **text, "pad_token_id": tok.pad_token_id,
               "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id}
        processor, config, kind = FAMILIES[family](tok, own)
        if hasattr(config, "vision_config"):
            _enlarge(processor, config.vision_config)
        config.architectures = [kind.__name__]
        config.save_pretrained(folder / role)
        processor.save_pretrained(folder / role)
        paths[role] = str(folder / role)
    return paths


def _enlarge(processor: Any, vision: Any) -> None:
    """A tower of LLaVA that sees 144 patches."""
    for key, value in TOWER.items():
        setattr(vision, key, value)
    processor.image_processor.size = {"height": 96, "width": 96}


def write_pair(
    folder: Path, words: int = 60, images: int = 0, number: int = 8,
    train: Mapping[str, Any] | None = None, student: Mapping[str, Any] | None = None,
    teacher: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None,
    **recipe: Any,
) -> Path:
    """A recipe on disk with its pair and its data, of text or of one image per row and more."""
    families = ({"teacher": "llava", "student": "llava"} if images else
                {"teacher": "llama", "student": "qwen2"})
    pair = save_pair(folder, families, **(text or {}))
    data = write_jsonl(folder / "train.jsonl", rows(folder, number, words, images))
    return write_recipe(folder, {
        "student": {"model_name_or_path": pair["student"], **(student or {})},
        "teacher": {"model_name_or_path": pair["teacher"], **(teacher or {})},
        "data": {"train": str(data)}, "output_dir": str(folder / "out"),
        "train": {"use_cpu": True, "per_device_train_batch_size": 4, **(train or {})}, **recipe,
    })


def rows(folder: Path, number: int, words: int, images: int = 0) -> list[dict[str, Any]]:
    """Rows whose answers have `words` words; pictures are written to `folder`."""
    rng, made = random.Random(0), []
    if images:
        noise(96, 96).save(folder / "0.png")
    for _ in range(number):
        answer = " ".join(rng.choice(WORDS) for _ in range(words))
        row = {"prompt": "<image>" * images + "what is this", "completion": answer}
        made.append(row | ({"images": ["0.png"] * images} if images else {}))
    return made


# ----- measuring ----------------------------------------------------------------------------


class _Watch(TrainerCallback):
    """Profiles the allocations of the second optimizer step, where the optimizer's state lies."""

    def __init__(self) -> None:
        self.profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.before = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            states = kwargs["optimizer"].state.values()
            self.before = sum(
                value.nbytes for kept in states for value in kept.values()
                if isinstance(value, torch.Tensor))
            self.profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.profile.stop()

    def peak(self) -> int:
        """The most that lay above what was there when the step began."""
        events = [event for event in self.profile.profiler.kineto_results.events()
                  if event.name() == "[memory]"]
        live = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            most = max(most, live)
        return most


def real_trainer(recipe: Recipe, folder: Path) -> DistillationTrainer:
    """The trainer of a recipe, on random weights."""
    train = {**recipe.train, "max_steps": 2, "logging_steps": 1, "save_strategy": "no",
             "disable_tqdm": True}
    found = gather(recipe.model_copy(update={"train": train, "output_dir": str(folder)}))
    models = {role: _random(spec.model_name_or_path, spec.dtype)
              for role, spec in (("student", recipe.student), ("teacher", recipe.teacher))
              if spec is not None}
    return DistillationTrainer(
        models["student"], models.get("teacher"), found.args, found.train, None,
        found.student_processor, found.teacher_processor,
        peft_config=lora_config(recipe.student.peft))


def _random(name: str, dtype: str | None) -> Any:
    config = AutoConfig.from_pretrained(name)
    auto = AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM
    return auto.from_config(config, dtype=getattr(torch, dtype or "float32"))


def measured_step(recipe: Recipe, folder: Path) -> int:
    """The most bytes of tensors in one optimizer step: what torch's CPU allocator gave out."""
    trainer, watch = real_trainer(recipe, folder), _Watch()
    trainer.add_callback(watch)
    trainer.train()
    models: list[nn.Module] = [trainer.model] + ([trainer.teacher_model] if trainer.teacher else [])
    resident = sum(t.nbytes for model in models for t in [*model.parameters(), *model.buffers()])
    return resident + watch.before + watch.peak()
