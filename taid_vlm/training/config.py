"""DistillationConfig: transformers' TrainingArguments and what distillation adds."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from taid_vlm.config.kinds import Count
from taid_vlm.config.recipe import Recipe
from taid_vlm.config.secrets import redact
from taid_vlm.config.section import check
from taid_vlm.config.training import MEMORY_BUDGET, OwnArguments, TrainSpec, of_hub
from taid_vlm.errors import RecipeError, TaidError
from taid_vlm.evaluation.held_out import DIRECTIONS
from taid_vlm.objectives import parse_objective
from taid_vlm.teachers.cache import template_kwargs

logger = logging.getLogger(__name__)

# what says how records are put into batches where tokens_per_batch does not
INSTEAD = ("per_device_train_batch_size", "train_sampling_strategy", "dataloader_drop_last",
           "window")


@dataclass
class DistillationConfig(TrainingArguments):
    """TrainingArguments and what distillation adds.

    Args:
        objective: a name ("taid") or a mapping as in a recipe's `objective`.
        supervise: "answers" (the assistant's texts) or "all".
        max_length: tokens per row after image expansion; None takes each model's own limit.
        padding_side: of both models' inputs in training.
        tokens_per_batch: the size of a micro-batch in tokens, in place of
            `per_device_train_batch_size` (`taid_vlm.training.budget`).
        packing: the records of a micro-batch in one row for each model, without padding
            (`taid_vlm.training.packing`).
        canary_records: records with images at which every evaluation asks whether the models look
            (`taid_vlm.evaluation.canary`); 0 asks nothing.
        loss_implementation: "fused" (never all logits in memory), "reference", or "auto": fused
            where it gives the same, which is checked at the first batch.
        loss_memory_budget: bytes that the fused loss may take for logits and their gradient, and
            held-out figures for logits.
        loss_logits: "float32" makes the fused loss's logits in float32 on a CPU, too, where "auto"
            takes them as half-precision products leave them.
        max_nonfinite_steps: steps in a row with a loss or gradient that is no number, after which
            the run ends; such a step is not applied.
        spike_factor, spike_window: a step whose loss is above `spike_factor` times the median of
            the last `spike_window` applied ones is not applied (`taid_vlm.training.guard`).
        max_left_out: share of the training records that may be left out; more end the run, before
            training (of the first records of a source) or in it.
        window, stride: tokens of the windows that plain texts are learned in, and of the context in
            them (an eighth if None).
        freeze: parts of the student that stay as they are (`taid_vlm.models.parts`).
        learning_rates: {part: learning rate}; the others take `learning_rate`.
        model_init_kwargs, teacher_model_init_kwargs: for `from_pretrained`, where a model is
            given by name.
        teacher_sharding: how the teacher lies in several processes, as a recipe's
            `teacher.sharding`.
        chat_template_kwargs, teacher_chat_template_kwargs: variables of the student's and the
            teacher's chat templates; of several teachers by name.
        teacher_weights: of several teachers, the mixture for records that name none.

    Example:
        >>> from taid_vlm import DistillationConfig
        >>> args = DistillationConfig("runs/first", objective={"name": "taid", "t_start": 0.2},
        ...                           learning_rate=1e-4, max_steps=100, use_cpu=True)
        >>> args.objective["name"], args.supervise, args.loss_implementation
        ('taid', 'answers', 'auto')
    """

    objective: str | dict[str, Any] = field(default="taid")
    supervise: str = field(default="answers")
    max_length: int | None = field(default=None)
    padding_side: str = field(default="right")
    tokens_per_batch: int | None = field(default=None)
    packing: bool = field(default=False)
    canary_records: int = field(default=64)
    loss_implementation: str = field(default="auto")
    loss_memory_budget: int = field(default=MEMORY_BUDGET)
    loss_logits: str = field(default="auto")
    max_nonfinite_steps: int = field(default=10)
    spike_factor: float | None = field(default=None)
    spike_window: int = field(default=100)
    max_left_out: float = field(default=0.25)
    window: int | None = field(default=None)
    stride: int | None = field(default=None)
    freeze: list[str] | None = field(default=None)
    learning_rates: dict[str, float] | None = field(default=None)
    model_init_kwargs: dict[str, Any] | None = field(default=None)
    teacher_model_init_kwargs: dict[str, Any] | None = field(default=None)
    teacher_sharding: str = field(default="replicate")
    chat_template_kwargs: dict[str, Any] | None = field(default=None)
    teacher_chat_template_kwargs: dict[str, Any] | None = field(default=None)
    teacher_weights: dict[str, float] | None = field(default=None)
    remove_unused_columns: bool = field(default=False)
    logging_nan_inf_filter: bool = field(default=False)  # what is no number is logged as that

    def __post_init__(self) -> None:
        self.greater_is_better = self._best_is_greatest()
        super().__post_init__()
        # every process makes its own batches: a batch of aligned tokens cannot be cut in two
        self.accelerator_config.dispatch_batches = False
        own = {key: getattr(self, key) for key in _OwnArguments.model_fields}
        for key, value in check(_OwnArguments, own):
            setattr(self, key, value)
        self._check_batches()

    def _check_batches(self) -> None:
        """Raise TaidError for what has no effect, or cannot work, beside a batch's tokens."""
        if parse_objective(self.objective).on_policy:
            for key in ("tokens_per_batch", "packing"):
                if value := getattr(self, key):
                    raise TaidError(f"train.{key} = {value} cannot work with objective.on_policy: "
                                    "the lengths of sampled answers are not known ahead.")
        kinds = DistillationConfig.__dataclass_fields__
        for key in INSTEAD if self.tokens_per_batch else ():
            if getattr(self, key) != kinds[key].default:
                raise TaidError(f"train.{key} = {getattr(self, key)!r} has no effect beside "
                                f"train.tokens_per_batch = {self.tokens_per_batch}, which says "
                                "which records a batch has: take out one of them.")

    def without_secrets(self) -> DistillationConfig:
        """For when the models are loaded: checkpoints and trackers write the arguments down."""
        keys = ("model_init_kwargs", "teacher_model_init_kwargs")
        shown = {key: redact(getattr(self, key)) for key in keys}
        if all(shown[key] == getattr(self, key) for key in keys):
            return self
        other = copy.copy(self)
        for key in keys:
            setattr(other, key, shown[key])
        return other

    def use_one_gpu(self) -> None:
        """Transformers would copy the model onto all GPUs that one process sees."""
        if self.n_gpu > 1:
            logger.warning("Using one GPU; start with `accelerate launch` to use all of them.")
            self._n_gpu = 1

    @property
    def is_zero3(self) -> bool:
        """The student's weights lie in shares that are brought together where they are used."""
        zero = getattr(self.deepspeed_plugin, "hf_ds_config", None)
        return zero is not None and bool(zero.is_zero3())

    def _best_is_greatest(self) -> bool | None:
        """As it was said, or else by the figure; transformers would go by its name."""
        said: bool | None = self.greater_is_better
        figure = str(self.metric_for_best_model).removeprefix("eval_")
        return not DIRECTIONS[figure][0] if said is None and figure in DIRECTIONS else said


class _OwnArguments(OwnArguments):
    canary_records: Count = 64


def training_arguments(recipe: Recipe) -> DistillationConfig:
    """transformers' arguments for a recipe, with this package's defaults under them.

    Raises:
        TaidError: values or combinations that transformers refuses.
    """
    steps = recipe.train.get("max_steps", 0)
    defaults = {key: TrainSpec.model_fields[key].default
                for key in ("report_to", "save_total_limit", "logging_steps")}
    defaults["dataloader_pin_memory"] = torch.accelerator.is_available()
    # otherwise accelerate takes the processes of one launch for strangers
    defaults["use_cpu"] = not torch.accelerator.is_available()
    if steps:
        defaults["logging_steps"] = max(1, steps // 100)
    own = {"output_dir": recipe.output_dir, "objective": recipe.objective,
           "canary_records": recipe.evaluate.canary,
           "teacher_sharding": (recipe.teacher and recipe.teacher.sharding) or "replicate",
           "chat_template_kwargs": recipe.student.chat_template_kwargs,
           "teacher_weights": recipe.teacher_weights, "teacher_chat_template_kwargs": (
               template_kwargs(recipe.teacher) if recipe.teacher else {
                   name: template_kwargs(spec) for name, spec in (recipe.teachers or {}).items()})}
    train = {key: value for key, value in recipe.train.items() if not of_hub(key)}
    try:
        # transformers writes its own defaults into mappings like fsdp_config
        return DistillationConfig(**copy.deepcopy({**defaults, **train, **own}))
    except TaidError:
        raise
    except Exception as error:  # transformers checks values and combinations its own way
        raise RecipeError(f"train: {error}") from error
