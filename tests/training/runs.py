"""Small real training runs, in this process or (as a script) in processes of their own.

As a script: `python runs.py OPTIONS.json` with a list of `make_trainer` options (and `resume`, a
checkpoint), also under torch.distributed.run; rank 0 leaves `final.safetensors` and
`trajectory.json` in every output.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from zoo import build
from zoo.images import images

from taid_vlm import DistillationConfig, DistillationTrainer
from taid_vlm.runs.ingredients import lora_config

WORDS = ("a", "red", "green", "blue", "square", "circle", "left", "right", "above", "of", "the",
         "two", "three", "naïve", "图片")


KINDS = ("one", "two", "text", "turns")


def rows(
    number: int = 32, seed: int = 0, text_only: bool = False, kinds: Sequence[str] = KINDS
) -> list[dict[str, Any]]:
    """Rows with one image, two images or none, one turn or two, answers of unequal length."""
    rng, pictures, made = random.Random(seed), images(3), []
    for index in range(number):
        def answer() -> str:
            return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12)))

        kind = "text" if text_only else kinds[index % len(kinds)]
        if kind == "one":
            made.append({"prompt": "<image>what is this", "completion": answer(),
                         "images": [pictures[index % 3]]})
        elif kind == "two":
            made.append({"prompt": "compare <image> with <image>", "completion": answer(),
                         "images": pictures[:2]})
        elif kind == "text":
            made.append({"prompt": "hello there", "completion": answer()})
        else:
            made.append({"messages": [
                {"role": "user", "content": "<image>what"},
                {"role": "assistant", "content": answer()},
                {"role": "user", "content": "and then"},
                {"role": "assistant", "content": answer()},
            ], "images": [pictures[index % 3]]})
    return made


class Recorder(TrainerCallback):
    """Notes t after every optimizer step; can kill the process right after one."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.trainer: DistillationTrainer | None = None
        self.kill_at, self.t = kill_at, []

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        schedule = self.trainer.schedule
        self.t.append(None if schedule is None else schedule.t)
        if state.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


POISON = "poison"


def poison_teacher(trainer: DistillationTrainer, factor: float) -> None:
    """The teacher's hidden states are multiplied by `factor` in rows whose prompt is POISON."""
    mark = trainer.collator.teacher.tokenizer(POISON, add_special_tokens=False)["input_ids"]

    def break_row(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        ids = kwargs["input_ids"]
        for row in range(len(ids)):
            if any(ids[row, i:i + len(mark)].tolist() == mark for i in range(ids.shape[1])):
                output.last_hidden_state[row] *= factor
        return output

    trainer.teacher_model.base_model.register_forward_hook(break_row, with_kwargs=True)


def make_trainer(
    output: str | Path, *, teacher: str = "internvl", student: str = "llava",
    tokenizer: str = "permuted", dropout: float = 0.0, data: list[dict[str, Any]] | None = None,
    kill_at: int | None = None, streamed: bool = False, kinds: Sequence[str] = KINDS,
    student_config: dict[str, Any] | None = None, poison: float | None = None,
    peft: dict[str, Any] | None = None, **arguments: Any,
) -> DistillationTrainer:
    """A trainer on a small cross-family pair; `streamed` data are texts without a length.

    `student_config` sets attributes of the student's config after it was built. With `poison`, rows
    come in order, and it is what `poison_teacher` takes.
    """
    defaults = {
        "per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 1e-3, "seed": 7,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "logging_steps": 2, "dataloader_pin_memory": False,
    }
    theirs, ours = build(teacher), build(student, seed=1, tokenizer=tokenizer)
    for key, value in (student_config or {}).items():
        setattr(ours.model.config, key, value)
    if dropout:
        ours.model.config.get_text_config().attention_dropout = dropout
        for module in ours.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = dropout
    recorder = Recorder(kill_at)
    data = rows(text_only=streamed, kinds=kinds) if data is None else data
    train = datasets.Dataset.from_list(data).to_iterable_dataset() if streamed else data
    trainer = DistillationTrainer(
        ours.model, theirs.model, DistillationConfig(str(output), **{**defaults, **arguments}),
        train, data[:6], ours.processor, theirs.processor, callbacks=[recorder],
        peft_config=lora_config(peft),
    )
    if poison is not None:
        trainer._get_train_sampler = lambda *_: None
        poison_teacher(trainer, poison)
    recorder.trainer = trainer
    trainer.recorder = recorder
    return trainer


def weights(trainer: DistillationTrainer) -> dict[str, Tensor]:
    """All that is trained: the student's, and the map of its visual features."""
    trained = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    if trainer.visual.map is not None:
        trained["visual_map"] = next(trainer.visual.map.parameters())
    return {name: p.detach().clone() for name, p in trained.items()}


def step_gradient(output: Path, **options: Any) -> dict[str, Tensor]:
    """The gradient of one optimizer step, read off one step of plain gradient descent."""
    trainer = make_trainer(output, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
                           lr_scheduler_type="constant", **options)
    before = weights(trainer)
    trainer.train()
    return {name: before[name] - after for name, after in weights(trainer).items()}


def main() -> None:
    torch.set_num_threads(1)
    for options in json.loads(Path(sys.argv[1]).read_text()):
        resume = options.pop("resume", None)
        trainer = make_trainer(**options)
        trainer.train(resume_from_checkpoint=resume)
        if trainer.is_world_process_zero():
            output = Path(options["output"])
            save_file(weights(trainer), output / "final.safetensors")
            (output / "trajectory.json").write_text(json.dumps(trainer.recorder.t))
        guarded = {"processes": trainer.accelerator.num_processes, **trainer.guard.state_dict()}
        (Path(options["output"]) / f"guard-{trainer.args.process_index}.json").write_text(
            json.dumps(guarded))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # processes that leave one by one can abort each other
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nor may what torch does at the end of a process


if __name__ == "__main__":
    main()
