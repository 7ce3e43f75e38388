"""What transformers would refuse after the weights are loaded, or not at all, before that."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import ParallelMode

from taid_vlm.config.model import TeacherSpec
from taid_vlm.config.recipe import Recipe
from taid_vlm.config.training import of_hub
from taid_vlm.errors import RecipeError, TaidError, nearest, nearest_sibling
from taid_vlm.evaluation.held_out import DIRECTIONS
from taid_vlm.models.loading import load_skeleton
from taid_vlm.objectives import parse_objective
from taid_vlm.teachers.placement import check_sharding
from taid_vlm.training.config import DistillationConfig
from taid_vlm.training.on_policy import check_on_policy
from taid_vlm.training.pair import with_adapter

SAMPLING = ("random", "sequential")
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
STEPS = 1000  # of a schedule that is tried, where a run's own are not known yet
WITHOUT_EFFECT_ALONE = {  # key: the one that it needs
    "activation_checkpointing_kwargs": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "gradient_checkpointing", "fsdp_config": "fsdp",
    "spike_window": "spike_factor",
}


def refuse_early(args: DistillationConfig, recipe: Recipe, adapter: Any = None) -> None:
    """Refuse what of `train` cannot work or has no effect, before any weights are loaded.

    Args:
        adapter: the LoraConfig of `student.peft`, if there is one.

    Raises:
        RecipeError: the key, its value, the reason and the mend.
    """
    _refuse_without_effect(args, recipe.train, recipe)
    _refuse_by_device(args)
    _check_trackers(args)
    _check_metric(args, recipe)
    _check_loader(args)
    if args.learning_rate < 0:
        raise _refusal("learning_rate", args.learning_rate, "must be a number of at least 0.")
    optimizer = _check_optimizer(args, recipe)
    _check_schedule(args, optimizer)
    _check_student(args, recipe, adapter)
    _check_zero(args)
    if parse_objective(args.objective).on_policy is not None:
        check_on_policy(args)
    if recipe.teacher is not None:
        _check_teacher(args, recipe.teacher)


def check_files(train: Mapping[str, Any]) -> None:
    """Refuse configurations that are named and not there; transformers names no key."""
    for key in ("deepspeed", "fsdp_config", "accelerator_config"):
        value = train.get(key)
        if isinstance(value, str) and not value.startswith("{") and not Path(value).is_file():
            raise _refusal(key, value, f"is no file.{nearest_sibling(Path(value), '*.json')}")
    if train.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise _refusal("deepspeed", train["deepspeed"], "needs the deepspeed library: pip install "
                                                        "deepspeed, or take it out.")


def _refusal(key: str, value: Any, reason: str) -> RecipeError:
    return RecipeError(f"train.{key} = {value!r:.60} {reason}")


def _attempt(key: str, value: Any, build: Callable[[], Any]) -> Any:
    """Build a part of the trainer; its many exceptions become one message."""
    try:
        return build()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _refusal(key, value, f"cannot work: {reason}") from error


# ----- keys ---------------------------------------------------------------------------------


def _refuse_without_effect(
    args: DistillationConfig, train: Mapping[str, Any], recipe: Recipe
) -> None:
    _check_hub_keys(train)
    for key, other in WITHOUT_EFFECT_ALONE.items():
        if train.get(key) and not getattr(args, other):
            raise _refusal(key, train[key], f"has no effect without train.{other}.")
    if train.get("eval_steps") and args.eval_strategy != "steps":
        raise _refusal("eval_steps", train["eval_steps"],
                       "has no effect without train.eval_strategy: steps.")
    if args.deepspeed and args.spike_factor is not None:
        raise _refusal("spike_factor", args.spike_factor, "cannot work with train.deepspeed, which "
                       "has applied a step before its loss is known in all processes.")
    if args.auto_find_batch_size:
        raise _refusal("auto_find_batch_size", True, "would change the batch in the middle of a "
                       "run; `taid-vlm plan` says which size fits.")
    if args.torch_compile and args.loss_implementation != "reference":
        raise _refusal("torch_compile", True, "needs train.loss_implementation: reference; the "
                       "fused loss is inside the model's forward and compiles itself.")
    if args.parallelism_config is not None:
        raise _refusal("parallelism_config", args.parallelism_config, "is not supported: rows of "
                       "aligned tokens cannot be cut into shards.")
    if args.train_sampling_strategy not in SAMPLING:
        raise _refusal("train_sampling_strategy", args.train_sampling_strategy, "needs lengths, "
                       f"which records do not have before they are read.{nearest('', SAMPLING)}")
    if args.eval_on_start and recipe.data.eval is None:
        raise _refusal("eval_on_start", True, "needs data.eval.")
    given: Any = train.get("accelerator_config")
    for key in {"split_batches", "dispatch_batches"} & set(given or ()):
        if given[key]:
            raise _refusal(f"accelerator_config.{key}", given[key], "cannot work: a batch of "
                           "aligned tokens cannot be cut; every process makes its own.")


def _check_hub_keys(train: Mapping[str, Any]) -> None:
    """A student is pushed once, when its run is done; whether it can be: `runs/publish.py`."""
    for key in (key for key in train if of_hub(key) and train[key]):
        if not train.get("push_to_hub"):
            raise RecipeError(f"train.{key} has no effect without train.push_to_hub.")
        if key in ("hub_always_push", "hub_revision") or (
                key == "hub_strategy" and train[key] != "end"):
            raise _refusal(key, train[key], "is not supported: the student is pushed once, to the "
                           "main branch, when the run is done. Take it out.")


def _refuse_by_device(args: DistillationConfig) -> None:
    if args.fp16 and args.device.type == "cpu":
        raise _refusal("fp16", True, "needs a GPU; a CPU has train.bf16.")
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise _refusal("fsdp", args.fsdp, "needs several processes: start with `accelerate "
                                          "launch`, or take it out.")


# ----- parts of the trainer -----------------------------------------------------------------


def _check_trackers(args: DistillationConfig) -> None:
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            valid = [*INTEGRATION_TO_CALLBACK, "none"]
            raise _refusal("report_to", name, f"is not known.{nearest(name, valid)}")
        _attempt("report_to", name, INTEGRATION_TO_CALLBACK[name])


def _check_metric(args: DistillationConfig, recipe: Recipe) -> None:
    name = args.metric_for_best_model
    if name is None and args.save_strategy == "best":
        raise _refusal("save_strategy", "best", "needs train.metric_for_best_model, for example "
                                                "kl.")
    if name is None:
        return
    if args.eval_strategy == "no":
        raise _refusal("metric_for_best_model", name, "has no effect without train.eval_strategy.")
    valid = [figure for figure, (_, needs_teacher) in DIRECTIONS.items()
             if recipe.teacher_specs or not needs_teacher]
    if name.removeprefix("eval_") not in valid:
        raise _refusal("metric_for_best_model", name,
                       f"is no figure of the evaluation.{nearest(name, valid)}")


def _check_loader(args: DistillationConfig) -> None:
    workers = args.dataloader_num_workers
    _attempt("dataloader_num_workers", workers, lambda: DataLoader(
        [0], num_workers=workers, prefetch_factor=args.dataloader_prefetch_factor,  # type: ignore[arg-type]
        persistent_workers=args.dataloader_persistent_workers))


def _check_optimizer(args: DistillationConfig, recipe: Recipe) -> torch.optim.Optimizer:
    """An optimizer of the kind that is wanted, for one small matrix."""
    weights = torch.nn.Linear(2, 2)
    model: Any = load_skeleton(recipe.student, "student") if args.optim_target_modules else weights

    def build() -> torch.optim.Optimizer:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if {"params", "model", "optimizer_dict"} & options.keys():  # made for the whole model
            return torch.optim.SGD(weights.parameters(), lr=args.learning_rate)
        return kind(weights.parameters(), **options)

    optimizer: torch.optim.Optimizer = _attempt("optim", str(args.optim.value), build)
    if args.optim_args and _options(args) == _options(args, optim_args=None):
        raise _refusal("optim_args", args.optim_args, f"has no effect with train.optim = "
                                                      f"{str(args.optim.value)!r}.")
    if args.optim_target_modules and "galore" not in args.optim and "apollo" not in args.optim:
        raise _refusal("optim_target_modules", args.optim_target_modules, "has no effect with "
                       f"train.optim = {str(args.optim.value)!r}.")
    return optimizer


def _options(args: DistillationConfig, **changed: Any) -> Any:
    other = copy.copy(args)
    for key, value in changed.items():
        setattr(other, key, value)
    return Trainer.get_optimizer_cls_and_kwargs(other)[1]


def _check_schedule(args: DistillationConfig, optimizer: torch.optim.Optimizer) -> None:
    """Build the schedule of the learning rate, and ask it for the rate of a few steps."""
    name = str(args.lr_scheduler_type.value)
    if args.warmup_steps and name in WITHOUT_WARMUP:
        mend = "; take constant_with_warmup" if name == "constant" else ""
        raise _refusal("warmup_steps", args.warmup_steps,
                       f"has no effect with train.lr_scheduler_type = {name!r}{mend}.")
    steps = args.max_steps if args.max_steps > 0 else STEPS
    warmup = args.get_warmup_steps(steps)

    def build() -> None:
        schedule: Any = get_scheduler(
            args.lr_scheduler_type, optimizer, warmup, steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs)
        for rate in getattr(schedule, "lr_lambdas", ()):
            for step in (0, warmup, (warmup + steps) // 2, steps):
                float(rate(step))

    key = "lr_scheduler_kwargs" if args.lr_scheduler_kwargs else "lr_scheduler_type"
    _attempt(key, args.lr_scheduler_kwargs or name, build)


def _check_student(args: DistillationConfig, recipe: Recipe, adapter: Any) -> None:
    if adapter is None and not args.gradient_checkpointing:
        return
    try:
        skeleton = load_skeleton(recipe.student, "student")
    except TaidError:  # not every model of other people's code can be built without memory
        return
    if args.gradient_checkpointing and not skeleton.supports_gradient_checkpointing:
        raise _refusal("gradient_checkpointing", True,
                       f"is nothing that {type(skeleton).__name__} can do.")
    if adapter is not None:
        with_adapter(skeleton, adapter, on_meta=True)


def _check_zero(args: DistillationConfig) -> None:
    key = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if args.is_zero3 and not args.deepspeed_plugin.hf_ds_config.is_true(key):
        raise _refusal("deepspeed", "stage 3", "would leave the student's weights in shares, and "
                       f"no whole student to save: set {key} to true.")


def _check_teacher(args: DistillationConfig, teacher: TeacherSpec) -> None:
    """Refuse a placement that this run's processes and devices cannot have."""
    several, present = args.world_size > 1, torch.accelerator.device_count()
    sharding, devices = teacher.sharding, teacher.devices
    if teacher.is_sharded and not several:
        raise RecipeError(f"teacher.sharding = '{sharding}' needs several processes: start with "
                          "`accelerate launch`, or take it out.")
    if devices not in (None, "cpu") and several:
        raise RecipeError(f"teacher.devices = {devices!r}: each of {args.world_size} processes "
                          "would put a teacher of its own there; take teacher.sharding: fsdp, or "
                          "teacher.devices: cpu.")
    if isinstance(devices, list) and max(devices) >= present:
        raise RecipeError(f"teacher.devices = {devices}, but this machine has {present} "
                          "accelerators, counted from 0.")
    if sharding is None or not teacher.is_sharded:
        return
    if teacher.init_kwargs.get("quantization_config"):
        raise RecipeError(f"teacher.sharding = '{sharding}' cannot shard a quantised teacher; take "
                          "out init_kwargs.quantization_config, or sharding.")
    objective = parse_objective(args.objective)
    if sharding == "tensor" and objective.visual:
        raise RecipeError(f"objective.{objective.visual[0].name} compares features of a process's "
                          "own batch, and with teacher.sharding = 'tensor' all processes compute "
                          "one batch together; take teacher.sharding: fsdp.")
    check_sharding(load_skeleton(teacher, "teacher"), sharding, args.world_size)
