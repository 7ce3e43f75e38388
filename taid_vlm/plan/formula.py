"""Memory of models whose forward cannot be rehearsed, because its shapes depend on values.

Activations of a decoder layer are 34 bytes per token and hidden unit in half precision, and with
attention that keeps its scores 5 more per token, head and other token (Korthikanti et al., 2022,
"Reducing activation recomputation in large transformer models", section 4.1). Recomputed layers
keep their input alone, and one layer at a time has all. A tower's layers count the same way.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from taid_vlm.batch.collator import Batch
from taid_vlm.models.forward import head_rows, unwrap
from taid_vlm.models.parts import TOWER, parts_of
from taid_vlm.models.quantization import bytes_of
from taid_vlm.plan import ledger as kinds
from taid_vlm.plan.rehearsal import Memory, parameters, teacher_tensors, trained
from taid_vlm.training.loss import FusedStep
from taid_vlm.training.trainer import DistillationTrainer

PER_UNIT, PER_SCORE = 17, 2.5  # numbers kept per token and unit, and per score
LOSS_COPIES = 4  # logits, their gradient, what comes back from the loss, and one chunk's worth


def training(trainer: DistillationTrainer, batch: Batch) -> Memory:
    """As `rehearsal.rehearse_training`, by formula."""
    live = resident_models(trainer)
    live[kinds.GRADIENTS] = bytes_of(trained(trainer))
    half = 2 if trainer.args.bf16 else 4
    if trainer.args.bf16:
        live[kinds.CASTS] = sum(2 * p.numel() for p in trained(trainer))
    live[kinds.STUDENT_LANGUAGE] = _layers(trainer.model, batch["student_inputs"], half,
                                           kept=not trainer.args.gradient_checkpointing)
    live[kinds.LOSS] = _logits(trainer, batch, LOSS_COPIES)
    if isinstance(trainer._step, FusedStep):
        live[kinds.LOSS] = min(live[kinds.LOSS], trainer.args.loss_memory_budget)
    return Memory(live, live)


def evaluation(trainer: DistillationTrainer, batch: Batch) -> Memory:
    """As `rehearsal.rehearse_evaluation`, by formula."""
    live = resident_models(trainer)
    live[kinds.STUDENT_LANGUAGE] = _layers(trainer.model, batch["student_inputs"], 4, kept=False)
    live[kinds.LOSS] = _logits(trainer, batch, 1)
    return Memory(live, live)


def resident_models(trainer: DistillationTrainer) -> dict[str, int]:
    """Bytes of what lies in memory all the time."""
    live = {kinds.STUDENT: bytes_of([*parameters(trainer), *trainer.model.buffers()])}
    if trainer.teacher is not None:
        live[kinds.TEACHER] = bytes_of(teacher_tensors(trainer))
    return live


def _logits(trainer: DistillationTrainer, batch: Batch, copies: int) -> int:
    size = len(batch["labels"]) * head_rows(trainer.model) * copies
    if trainer.teacher is not None:
        width = trainer.teacher.top or trainer.teacher.rows
        size += len(batch["teacher_labels"]) * width
    return 4 * size


def _layers(model: nn.Module, inputs: dict[str, Tensor], element: int, kept: bool) -> int:
    """Activations of all layers of a language model, and of its tower's where there are images."""
    config = unwrap(model).config
    rows, length = inputs["input_ids"].shape
    size = _stack(config.get_text_config(), rows, length, element, kept,
                  config._attn_implementation == "eager")
    vision = getattr(config, "vision_config", None)
    has_tower = TOWER in parts_of(model).values()
    if vision is None or not has_tower or not hasattr(vision, "hidden_size"):
        return size
    pixels = sum(x.numel() for key, x in inputs.items() if "pixel" in key)
    patch = getattr(vision, "patch_size", 14)
    side = patch if isinstance(patch, int) else patch[-1]
    return size + _stack(vision, 1, pixels // (3 * side * side), element, kept, False)


def _stack(config: Any, rows: int, length: int, element: int, kept: bool, scores: bool) -> int:
    layers = getattr(config, "num_hidden_layers", None) or getattr(config, "depth", 24)
    per_layer = PER_UNIT * rows * length * config.hidden_size * element
    if scores:
        per_layer += int(PER_SCORE * element * rows * length**2 * config.num_attention_heads)
    inputs = rows * length * config.hidden_size * element * layers
    return per_layer * layers if kept else inputs + per_layer
