"""`train:` of a recipe: transformers' TrainingArguments, and what distillation adds.

What is used often stands here with its kind and meaning; the other keys are read from the
transformers that is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self, Union, get_args

from pydantic import BeforeValidator, Field, create_model, model_validator

from taid_vlm.config.arguments import Argument, trainer_arguments
from taid_vlm.config.kinds import (
    AboveOne,
    AtLeast16,
    AtLeastTwo,
    Count,
    NotNegative,
    Number,
    Positive,
    Rate,
    Share,
    Steps,
    Whole,
    wanted,
)
from taid_vlm.config.section import Section
from taid_vlm.errors import nearest

Part = Literal["tower", "projector", "language_model", "head"]
PARTS: tuple[str, ...] = get_args(Part)
MEMORY_BUDGET = 384 * 2**20  # bytes that the logits and gradients of one chunk may take
# TrainingArguments that act in parts of transformers' Trainer which distillation replaces
WITHOUT_EFFECT = frozenset({
    "average_tokens_across_devices", "batch_eval_metrics", "bf16_full_eval", "do_eval",
    "do_predict", "do_train", "eval_accumulation_steps", "eval_do_concat_batches",
    "eval_use_gather_object", "fp16_full_eval", "include_for_metrics",
    "include_num_input_tokens_seen", "label_names", "label_smoothing_factor", "length_column_name",
    "local_rank", "prediction_loss_only", "remove_unused_columns", "resume_from_checkpoint",
    "use_liger_kernel", "liger_kernel_config",
})
ELSEWHERE = {
    "output_dir": "output_dir", "objective": "objective", "canary_records": "evaluate.canary",
    "model_init_kwargs": "student.init_kwargs", "teacher_model_init_kwargs": "teacher.init_kwargs",
    "chat_template_kwargs": "student.chat_template_kwargs",
    "teacher_chat_template_kwargs": "teacher.chat_template_kwargs",
    "teacher_weights": "teacher_weights",
    "teacher_sharding": "teacher.sharding",
}


def of_hub(key: str) -> bool:
    """Whether a key of `train:` is about the hub: it is for the run, not for transformers'
    Trainer, which would push checkpoints and pickles."""
    return key == "push_to_hub" or key.startswith("hub_")


def _of_parts(kind: type) -> BeforeValidator:
    def check(value: Any) -> Any:
        names: Any = value if isinstance(value, kind) else ()
        for name in names:
            if name not in PARTS:
                raise ValueError(f"a model has no part {name!r}.{nearest(name, PARTS)}")
        return value

    return BeforeValidator(check)


class OwnArguments(Section):
    """What distillation adds to TrainingArguments.

    Args:
        supervise: Whose texts are learned: the assistant's, or all.
        max_length (tokens): Longest row after image expansion; left out, each model's own limit.
            Longer conversations are left out, longer texts cut.
        padding_side: Of both models' inputs in training.
        tokens_per_batch (tokens): The size of a micro-batch on each device, in place of
            per_device_train_batch_size: records of like lengths, drawn from shuffled windows, as
            many as fit. For the model that is shown more, after image expansion, it bounds rows
            times the longest row, and the sum of all rows with packing. A longer record is a batch
            of its own. An optimizer step is gradient_accumulation_steps of them on each device.
        packing: The records of a micro-batch in one row for each model, without padding; refused
            for models in which they would mix (a convolution, linear attention). For flash
            attention, and sdpa on a CPU: any other computes all pairs of a row's tokens, which
            takes longer than the padding that tokens_per_batch leaves.
        loss_implementation: fused never has all logits in memory; auto takes it where it gives the
            same as reference, which is checked at the first batch.
        loss_memory_budget (bytes): What the fused loss may take for logits and their gradient, and
            held-out figures for logits.
        loss_logits: float32 makes the fused loss's logits in float32 on a CPU, too, where products
            of bfloat16 leave rounded to it (auto); benchmarks/objective_cpu.md says at what cost.
        max_nonfinite_steps (steps): A step whose loss or gradient is no number is not applied and
            counted; so many in a row end the run, those of spike_factor among them.
        spike_factor: A step whose loss is above so many times the median of the last applied ones
            is not applied and counted; left out, it is. TAID's loss is compared over t squared, as
            it grows with t.
        spike_window (steps): How many these are; before, no step is compared.
        max_left_out: Share of the training records that may be left out (too long, malformed, ...);
            more of any source's first, or of all in training, end the run. 1 never does.
        window (tokens): Plain texts are learned in windows of so many tokens, instead of being cut
            at max_length: a long text is several rows, one behind the other, and all of it is
            learned, once. The data are read as a stream then, which needs max_steps.
        stride (tokens): Of a window, how many repeat the end of the one before, as context that is
            not learned: at most so many for either model, or to the nearest boundary of both;
            left out, an eighth of the window.
        freeze: Parts of the student that stay as they are.
        learning_rates: {part: learning rate}; the others take learning_rate.
    """

    supervise: Literal["answers", "all"] = "answers"
    max_length: AtLeastTwo | None = None
    padding_side: Literal["left", "right"] = "right"
    tokens_per_batch: AtLeast16 | None = None
    packing: bool = False
    loss_implementation: Literal["auto", "fused", "reference"] = "auto"
    loss_memory_budget: Positive = MEMORY_BUDGET
    loss_logits: Literal["auto", "float32"] = "auto"
    max_nonfinite_steps: Positive = 10
    spike_factor: AboveOne | None = None
    spike_window: Positive = 100
    max_left_out: Share = 0.25
    window: AtLeast16 | None = None
    stride: Positive | None = None
    freeze: Annotated[list[Part] | None, _of_parts(list)] = None
    learning_rates: Annotated[dict[Part, Rate] | None, _of_parts(dict)] = None

    @model_validator(mode="after")
    def _stride_of_a_window(self) -> Self:
        if self.stride is not None and self.stride >= (self.window or 0):
            of = "without a window" if self.window is None else f"of a window of {self.window}"
            raise ValueError(f".stride = {self.stride} tokens {of} leave nothing to learn.")
        return self

    @model_validator(mode="after")
    def _no_rate_for_frozen(self) -> Self:
        for part, rate in (self.learning_rates or {}).items():
            if part in (self.freeze or ()):
                raise ValueError(f".learning_rates.{part} = {rate!r}, but '{part}' is frozen.")
        return self


class TrainSpec(OwnArguments):
    """transformers' TrainingArguments, and what distillation adds.

    Args:
        num_train_epochs (epochs): How often all records are seen.
        max_steps (optimizer steps): Instead of num_train_epochs; -1: as many as the epochs have.
        per_device_train_batch_size (records): Records of a micro-batch on each device.
        per_device_eval_batch_size (records): The same for held-out records.
        gradient_accumulation_steps (micro-batches): Micro-batches per optimizer step.
        learning_rate: At its highest, after warmup.
        lr_scheduler_type: linear, cosine, constant, constant_with_warmup, ...
        warmup_steps (steps): Steps in which the learning rate rises, or their share below 1.
        optim: The optimizer's name.
        weight_decay: Not for biases and normalisations.
        max_grad_norm: Longer gradients are cut to this; 0 cuts none.
        bf16: Mixed precision in bfloat16.
        fp16: Mixed precision in float16, on a GPU.
        gradient_checkpointing: Recompute activations: less memory, more time.
        logging_steps (steps): Between two log lines; left out, a hundredth of max_steps.
        eval_strategy: When to evaluate in training: 'no' (in quotes), steps or epoch.
        eval_steps (steps): Between two evaluations; left out, logging_steps.
        save_strategy: When to write checkpoints: 'no' (in quotes), steps, epoch or best.
        save_steps (steps): Between two checkpoints.
        save_total_limit (checkpoints): How many are kept; null keeps all.
        seed: Of everything that is drawn.
        use_cpu: No GPU, even where there is one.
        dataloader_num_workers (processes): That prepare batches; 0: the training process itself.
        dataloader_pin_memory: Left out, false where there is no GPU.
        ddp_find_unused_parameters: Left out, true where a batch may leave parts of the student
            unused.
        fsdp: Fully sharded data parallel.
        report_to: wandb, tensorboard, ..., all (that are installed) or none.
        disable_tqdm: No progress bars.
    """

    num_train_epochs: NotNegative = 3.0
    max_steps: Whole = -1
    per_device_train_batch_size: Positive = 8
    per_device_eval_batch_size: Positive = 8
    gradient_accumulation_steps: Positive = 1
    learning_rate: Number = 5e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: Steps = 0
    optim: str = "adamw_torch_fused"
    weight_decay: NotNegative = 0.0
    max_grad_norm: NotNegative = 1.0
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool | None = None
    logging_steps: Steps = 10
    eval_strategy: str = "no"
    eval_steps: Steps | None = None
    save_strategy: str = "steps"
    save_steps: Steps = 500
    save_total_limit: Positive | None = 2
    seed: Count = 42
    use_cpu: bool = False
    dataloader_num_workers: Count = 0
    dataloader_pin_memory: bool = True
    ddp_find_unused_parameters: bool | None = None
    fsdp: Annotated[bool | str | list[Any] | None, wanted("true, false or text")] = None
    report_to: Annotated[str | list[Any] | None, wanted("text or a list")] = "none"
    disable_tqdm: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _other_keys(cls, value: Any) -> Any:
        for key in value if isinstance(value, Mapping) else ():
            if key in ELSEWHERE:
                raise ValueError(f".{key} belongs to '{ELSEWHERE[key]}' of the recipe.")
            if key in WITHOUT_EFFECT:
                raise ValueError(f".{key} has no effect on a distillation; take it out.")
        return value

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        key = "per_device_train_batch_size"
        if self.tokens_per_batch and key in self.model_fields_set:
            raise ValueError(f".{key} = {self.per_device_train_batch_size} has no effect beside "
                             f"tokens_per_batch = {self.tokens_per_batch}: take out one of them.")
        return self

    @model_validator(mode="after")
    def _some_steps(self) -> Self:
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f".max_steps = {self.max_steps}, but it must be at least 1, or -1 for "
                             "as many as the epochs have.")
        return self


_KINDS: dict[str, tuple[Any, str]] = {
    "bool": (bool, "true or false"), "int": (Whole, "a whole number"),
    "float": (Number, "a number"), "str": (str, "text"), "dict": (dict[str, Any], "a mapping"),
    "list": (list[Any], "a list"), "None": (None, ""),
}


@cache
def train_spec() -> type[TrainSpec]:
    """TrainSpec with every other key of the installed transformers."""
    others: dict[str, Any] = {
        key: (_kind(argument), Field(default=argument.default, description=argument.help))
        for key, argument in trainer_arguments().items()
        if key not in TrainSpec.model_fields and key not in ELSEWHERE and key not in WITHOUT_EFFECT}
    return create_model("Train", __base__=TrainSpec, __doc__=TrainSpec.summary(), **others)


def _kind(argument: Argument) -> Any:
    """What an annotation of transformers allows; its own classes are for it to check."""
    if not set(argument.kinds) <= set(_KINDS):
        return Any
    kinds = [_KINDS[kind] for kind in argument.kinds]
    return Annotated[Union[tuple(kind for kind, _ in kinds)],  # noqa: UP007
                     wanted(" or ".join(name for _, name in kinds if name))]
