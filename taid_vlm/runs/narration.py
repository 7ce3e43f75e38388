"""What a run says on the terminal: what it is about to do in words, a line for every log, one bar.

The whole of every log line is in `results.json` (`history`), in checkpoints and with the trackers.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, ClassVar

from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from taid_vlm.config.model import ModelSpec
from taid_vlm.config.recipe import Recipe
from taid_vlm.io.terminal import human
from taid_vlm.models.quantization import bytes_of, numel
from taid_vlm.teachers.several import each
from taid_vlm.training.trainer import DistillationTrainer

logger = logging.getLogger(__name__)

# key of a log line -> how it is called and shown; those that are there, in this order
SHOWN = {"loss": ("loss", ".4f"), "kl": ("kl", ".4f"), "agreement": ("agree", ".1%"),
         "nll": ("nll", ".4f"), "t": ("t", ".3f"), "learning_rate": ("lr", ".1e"),
         "answer_tokens_per_second": ("tok/s", ",.0f")}
ONLY_WITHOUT = {"nll": "kl"}  # what is shown only where the other is not known


class Narrator(TrainerCallback):
    """In place of transformers' dictionaries; only the main process speaks."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        for callback in (PrinterCallback, ProgressCallback):
            trainer.pop_callback(callback)
        trainer.callback_handler.callbacks.insert(0, self)  # what is begun is said first
        self.bars = not trainer.args.disable_tqdm
        self.bar: tqdm[Any] | None = None
        self.began = (0, 0.0)  # step and clock

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = (state.global_step, time.perf_counter())
        if not state.is_world_process_zero:
            return
        batches = args.gradient_accumulation_steps * args.world_size
        size = f"{args.train_batch_size * batches:,} records" if args.tokens_per_batch is None \
            else f"{batches:,} x {args.tokens_per_batch:,} tokens at most"
        logger.info("steps     %s of %s each%s", f"{state.max_steps:,}", size,
                    f", from step {state.global_step:,} on" if state.global_step else "")
        # no bar where nobody looks: `disable=None` asks whether this is a terminal
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step",
                        dynamic_ncols=True, disable=None if self.bars else True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and (line := log_line(logs)):
            step, total = state.global_step, state.max_steps
            eta = "" if "loss" not in logs else f"  ETA {self._left(step, total)}"
            logger.info("%s%s", f"{step:>{len(str(total))}}/{total}  {line}", eta)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def _left(self, step: int, total: int) -> str:
        done, clock = step - self.began[0], time.perf_counter() - self.began[1]
        return str(timedelta(seconds=round(clock / max(done, 1) * (total - step))))


class TaidCurves(TrainerCallback):
    """Three curves side by side with every tracker, which read together: a loss that rises beside
    a KL that falls says that t has moved the target, not that the student got worse."""

    CURVES: ClassVar = {"kl": "taid/kl_to_teacher", "loss": "taid/loss_to_moving_target",
                        "t": "taid/t_of_target"}

    def __init__(self, trainer: DistillationTrainer) -> None:
        trainer.callback_handler.callbacks.insert(0, self)  # before the trackers read the line

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "t" in logs and "loss" in logs:
            logs.update({name: logs[key] for key, name in self.CURVES.items() if key in logs})


def log_line(logs: Mapping[str, Any]) -> str:
    """What a reader of the terminal wants of a log line: "loss 0.2225  kl 0.2731  agree 87.7%".

    Args:
        logs: as the trainer logs them; held-out figures begin with "eval_".

    Returns:
        So short that it fits 100 columns with step and time left; "" for a line with none of these
        figures, such as the last one.
    """
    held_out = any(key.startswith("eval_") for key in logs)
    figures = {key: logs.get(f"eval_{key}" if held_out else key) for key in SHOWN}
    if held_out:
        figures |= {"loss": None}  # the KL again
    shown = [f"{name} {_number(figures[key], spec)}"
             for key, (name, spec) in SHOWN.items()
             if isinstance(figures[key], (int, float)) and not (
                 key in ONLY_WITHOUT and figures[ONLY_WITHOUT[key]] is not None)]
    return "  ".join(["held-out", *shown] if held_out and shown else shown)


def _number(value: Any, spec: str) -> str:
    wide = spec == ".4f" and abs(value) >= 10
    return format(value, ".4g" if wide else spec) if math.isfinite(value) else "nan"


def opening(trainer: DistillationTrainer, recipe: Recipe) -> Iterator[str]:
    """What the run is about to do, in words; a line each.

    The memory is counted from the tensors that are there, and so a lower bound.
    """
    student = trainer.accelerator.unwrap_model(trainer.model)
    teachers = ", ".join(map(_name, recipe.teacher_specs.values()))
    yield f"teacher   {teachers or 'none'}"
    yield f"student   {_name(recipe.student)}"
    pairings = getattr(trainer.teacher, "pairings", {"": trainer.pairing})
    for name, pairing in pairings.items():
        if pairing is not None:
            yield f"pair      {f'{name}: ' if name else ''}case {pairing.case}: {pairing.reason}"
    held_out = "no held-out records, so nothing is measured" if trainer.eval_dataset is None else \
        f"{_count(trainer.eval_dataset)} held out"
    yield f"records   {_count(trainer.train_dataset)} to train on, {held_out}"
    trained = [p for p in student.parameters() if p.requires_grad]
    every = sum(map(numel, student.parameters()))
    yield (f"trained   {sum(map(numel, trained)):,} of {every:,} parameters"
           f"{'' if recipe.student.peft is None else ', an adapter'}")
    yield f"memory    {_memory(trainer, recipe, trained)}"
    trackers = [name for name in trainer.args.report_to if name != "none"]
    yield f"logs      {', '.join([trainer.args.output_dir, *trackers])}"


def _count(records: Any) -> str:
    return f"{len(records):,}" if hasattr(records, "__len__") else "a stream of records"


def _name(spec: ModelSpec) -> str:
    server, cache = getattr(spec, "server", None), getattr(spec, "cache", None)
    return f"{server.model} at {server.url}" if server else cache or spec.model_name_or_path


def _memory(trainer: DistillationTrainer, recipe: Recipe, trained: list[Any]) -> str:
    spread = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or any(
        getattr(spec, "sharding", None) for spec in recipe.teacher_specs.values())
    if spread:
        return "spread over processes: taid-vlm plan --processes N says how much each needs"
    models = [trainer.model, *(model for teacher in each(trainer.teacher).values()
                               if isinstance(model := getattr(teacher, "model", None), nn.Module))]
    weights = bytes_of(p for model in models for p in model.parameters() if not p.is_meta)
    gradients = bytes_of(trained)
    adam = 2 * gradients if "adamw_torch" in trainer.args.optim else 0
    moments = f", AdamW's moments {human(adam)}" if adam else ""
    return (f"at least {human(weights + gradients + adam)}: weights {human(weights)}, gradients "
            f"{human(gradients)}{moments} (counted; taid-vlm plan adds the rest)")
