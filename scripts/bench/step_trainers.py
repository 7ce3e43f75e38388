"""The trainers that are compared, each as its users would call it.

A builder is a function `(Setup, Pair, folder, steps) -> Trainer`: it imports what it needs and
refuses what it cannot do with an error. All of them train on the same rows in the same order with
transformers' own optimizer and clipping. Two defaults of TRL are changed: it recomputes
activations in backward, and it computes in bfloat16, unless told otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import Trainer

from bench.implementations import BETAS
from bench.step_rows import Row, as_prompt, encode
from bench.step_setup import Pair, Setup
from taid_vlm.errors import TaidError
from taid_vlm.training.config import DistillationConfig
from taid_vlm.training.trainer import DistillationTrainer

Builder = Callable[[Setup, Pair, str, int], Trainer]
NEVER = 10**9  # steps between two logs after the first one


def ours(setup: Setup, pair: Pair, folder: str, steps: int, loss: str = "auto") -> Trainer:
    """`taid_vlm.training.trainer.DistillationTrainer`."""
    args = DistillationConfig(**_arguments(setup, folder, steps), objective=setup.objective,
                              loss_implementation=loss)
    return DistillationTrainer(
        pair.models["student"], pair.models["teacher"], args, _dataset(pair, steps), None,
        pair.processors["student"], pair.processors["teacher"])


def ours_reference(setup: Setup, pair: Pair, folder: str, steps: int) -> Trainer:
    """The same with all logits of the answers in memory."""
    return ours(setup, pair, folder, steps, "reference")


def sft(setup: Setup, pair: Pair, folder: str, steps: int) -> Trainer:
    """Ours without a teacher: cross-entropy on the answers."""
    args = DistillationConfig(**_arguments(setup, folder, steps), objective="ce")
    return DistillationTrainer(pair.models["student"], None, args, _dataset(pair, steps), None,
                               pair.processors["student"])


def trl_gkd(setup: Setup, pair: Pair, folder: str, steps: int) -> Trainer:
    """TRL's GKDTrainer on given answers (lmbda = 0): all logits of both models."""
    beta = _beta(setup)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    args = GKDConfig(**_trl_arguments(setup, folder, steps), lmbda=0.0, beta=beta)
    return GKDTrainer(pair.models["student"], pair.models["teacher"], args,
                      train_dataset=_dataset(pair, steps),
                      processing_class=pair.processors["student"])


def trl_gold(setup: Setup, pair: Pair, folder: str, steps: int) -> Trainer:
    """TRL's GOLDTrainer on given answers at temperature 1: all logits of both models."""
    beta = _beta(setup)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    class Ordered(GOLDTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return _in_order(super()._get_train_sampler(dataset))

    args = GOLDConfig(**_trl_arguments(setup, folder, steps), lmbda=0.0, beta=beta,
                      temperature=1.0)
    return Ordered(pair.models["student"], pair.models["teacher"], args,
                   train_dataset=_dataset(pair, steps),
                   processing_class=pair.processors["student"])


def trl_distillation(setup: Setup, pair: Pair, folder: str, steps: int) -> Trainer:
    """TRL's stable DistillationTrainer, chunked loss, with its generation taken out.

    It trains on what the student generates and on nothing else. Here a method in the place of that
    one hands it the data's answers, which costs it less than what its users have.
    """
    beta = _beta(setup)
    from trl import DistillationConfig as TrlConfig
    from trl import DistillationTrainer as TrlTrainer

    class Given(TrlTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return _in_order(super()._get_train_sampler(dataset))

        def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
            given = encode(self.processing_class, inputs)
            given["num_items_in_batch"] = given["completion_mask"].sum()
            return {key: value.to(self.accelerator.device) for key, value in given.items()}

    arguments = _trl_arguments(setup, folder, steps)
    arguments.pop("max_length")
    args = TrlConfig(**arguments, beta=beta, temperature=1.0,
                     max_completion_length=setup.sequence_length)
    return Given(pair.models["student"], pair.models["teacher"], args,
                 train_dataset=_dataset(pair, steps, as_prompts=True),
                 processing_class=pair.processors["student"])


TRAINERS: dict[str, Builder] = {
    "ours": ours, "ours_reference": ours_reference, "sft": sft, "trl_gkd": trl_gkd,
    "trl_gold": trl_gold, "trl_distillation": trl_distillation,
}
WITHOUT_TEACHER = frozenset({"sft"})
NOTES = {
    "ours_reference": "logits of all answers in memory",
    "sft": "no teacher: cross-entropy on the answers",
    "trl_gkd": "lmbda = 0",
    "trl_gold": "lmbda = 0, temperature = 1",
    "trl_distillation": "generation taken out: given the data's answers",
}


def _beta(setup: Setup) -> float:
    if setup.objective not in BETAS:
        raise TaidError(f"has no {setup.objective}")
    return BETAS[setup.objective]


# ----- arguments and data -------------------------------------------------------------------


def _arguments(setup: Setup, folder: str, steps: int) -> dict[str, Any]:
    return {
        "output_dir": folder, "max_steps": steps, "use_cpu": setup.device == "cpu",
        "per_device_train_batch_size": setup.batch_size,
        "gradient_accumulation_steps": setup.accumulation,
        "learning_rate": setup.learning_rate, "lr_scheduler_type": "constant",
        "logging_first_step": True, "logging_steps": NEVER, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "bf16": setup.dtype == "mixed",
        "dataloader_pin_memory": setup.device == "cuda", "train_sampling_strategy": "sequential",
    }


def _trl_arguments(setup: Setup, folder: str, steps: int) -> dict[str, Any]:
    return {**_arguments(setup, folder, steps), "gradient_checkpointing": False,
            "max_length": 4 * setup.sequence_length, "remove_unused_columns": False}


def _dataset(pair: Pair, steps: int, as_prompts: bool = False) -> Dataset:
    """The rows of one optimizer step, over and over."""
    rows = [as_prompt(row) for row in pair.rows] if as_prompts else pair.rows
    return Dataset.from_list(rows * (steps + 1))


def _in_order(sampler: Any) -> Any:
    sampler.shuffle = False
    return sampler
