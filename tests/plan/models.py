"""Pairs that are large enough for their memory to be measured, and what one training step takes.

Only configurations and processors are saved: a plan reads no weights. A measured step runs on the
same configurations with random weights.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from cli.recipes import write_jsonl, write_recipe
from tokenizers import Tokenizer
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


def save_pair(
    folder: Path, families: Mapping[str, str], tokens: int = 0, variant: str = "plain", **text: Any
) -> dict[str, str]:
    """{role: folder} of configurations and processors; `text` changes the language models.

    Args:
        tokens: that the tokenizers name (0: as many as they have).
        variant: of the student's tokenizer, see `zoo.make_tokenizer`.
    """
    paths = {}
    for role, family in families.items():
        tok = make_tokenizer(family, variant if role == "student" else "plain")
        tok = _with_tokens(tok, tokens) if tokens else tok
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


def _with_tokens(tokenizer: Any, number: int) -> Any:
    """The tokenizer with tokens that no text has, before its added ones."""
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab, added = stored["model"]["vocab"], stored["added_tokens"]
    more = number - len(vocab) - len(added)
    vocab.update({f"unused{i}": i for i in range(len(vocab), len(vocab) + more)})
    for token in added:
        token["id"] += more
    for token in stored["post_processor"]["special_tokens"].values():
        token["ids"] = [i + more for i in token["ids"]]
    names = ("bos_token", "eos_token", "pad_token", "chat_template")
    return type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(stored)),
                           **{name: getattr(tokenizer, name) for name in names})


def _enlarge(processor: Any, vision: Any) -> None:
    """A tower of LLaVA that sees 144 patches."""
    for key, value in TOWER.items():
        setattr(vision, key, value)
    processor.image_processor.size = {"height": 96, "width": 96}


def write_pair(
    folder: Path, words: int = 60, images: int = 0, number: int = 8,
    train: Mapping[str, Any] | None = None, student: Mapping[str, Any] | None = None,
    teacher: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None,
    families: tuple[str, str] | None = None, tokens: int = 0, variant: str = "plain", **recipe: Any,
) -> Path:
    """A recipe on disk with its pair and its data, of text or of one image per row and more."""
    families = families or (("llava", "llava") if images else ("llama", "qwen2"))
    pair = save_pair(folder, dict(zip(("teacher", "student"), families, strict=True)), tokens,
                     variant, **(text or {}))
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
    """Profiles the allocations of two optimizer steps; the second one, where the optimizer's state
    and the room for logits that the first has left lie there, is looked at."""

    def __init__(self) -> None:
        self.profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.second = 0  # when it begins

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.profile.start()
        else:
            self.second = time.time_ns()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.profile.stop()

    def peak(self) -> int:
        """The most that lay in the second step above what was there when the first began."""
        events = [event for event in self.profile.profiler.kineto_results.events()
                  if event.name() == "[memory]"]
        live = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            if event.start_ns() >= self.second:
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


def measured_step(recipe: Recipe, folder: Path, bodies: set[str] | None = None) -> int:
    """The most bytes of tensors in one optimizer step: what torch's CPU allocator gave out.

    Args:
        bodies: of the fused loss, that must have run.
    """
    trainer, watch = real_trainer(recipe, folder), _Watch()
    trainer.add_callback(watch)
    trainer.train()
    assert bodies is None or bodies == set((trainer.loss_report or {})["bodies"])
    models: list[nn.Module] = [trainer.model] + ([trainer.teacher_model] if trainer.teacher else [])
    resident = sum(t.nbytes for model in models for t in [*model.parameters(), *model.buffers()])
    return resident + watch.peak()
