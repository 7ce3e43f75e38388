"""`taid-vlm plan`: how much memory a recipe needs on each device."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from taid_vlm.batch.collator import Batch
from taid_vlm.batch.several import role_of
from taid_vlm.config.model import ModelSpec
from taid_vlm.config.recipe import Recipe
from taid_vlm.errors import TaidError, at_least
from taid_vlm.io.quiet import quiet
from taid_vlm.models.experts import chosen_experts, parameters_per_token
from taid_vlm.models.forward import unwrap
from taid_vlm.models.loading import load_skeleton
from taid_vlm.models.quantization import bytes_of, saved_bytes
from taid_vlm.plan import formula
from taid_vlm.plan import ledger as kinds
from taid_vlm.plan.caches import CacheSize, cache_size
from taid_vlm.plan.longest import Longest, Looked, longest_batch, longest_step, look_at
from taid_vlm.plan.rehearsal import (
    Memory,
    kept,
    parameters,
    rehearse_evaluation,
    rehearse_training,
    trained,
)
from taid_vlm.plan.shapes import Shapes, model_of_shapes
from taid_vlm.plan.shares import Shares, offloads, shares_of
from taid_vlm.plan.sizes import OPTIMIZERS, optimizer_bytes, resident, sharded
from taid_vlm.runs.ingredients import Ingredients, gather, lora_config
from taid_vlm.runs.sharing import Sharing, sharing
from taid_vlm.runs.stages import parts_by_name
from taid_vlm.teachers import (
    CachedTeacher,
    ServedTeacher,
    SharedTeacher,
    SparseSignal,
    TeacherInStudent,
)
from taid_vlm.teachers.protocol import Laws, Question
from taid_vlm.teachers.several import each
from taid_vlm.training.config import DistillationConfig
from taid_vlm.training.pair import with_adapter
from taid_vlm.training.trainer import DistillationTrainer

# what a process needs beside tensors: a CUDA context with its kernels and workspaces, or an
# interpreter with the libraries loaded
GPU_PROCESS, CPU_PROCESS = 600 * 10**6, 600 * 10**6
FRAGMENTATION = 0.05  # of what a step makes and frees: blocks of an allocator that do not fit
COUNTED, REHEARSED, ESTIMATED = "counted", "rehearsed", "estimated"
STEP, UPDATE, EVALUATION = "training step", "optimizer update", "evaluation"

# arguments of `train` that change what lies in memory; a rehearsal takes no others
_MATTER = frozenset({
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "bf16", "max_length", "supervise", "padding_side", "freeze",
    "learning_rates", "loss_implementation", "loss_memory_budget", "max_grad_norm",
    "neftune_noise_alpha", "seed",
})


@dataclass(frozen=True)
class Component:
    """What one kind of tensors takes, in bytes per device.

    most: at its own fullest moment; at_peak: at the moment when all together are most.
    how: "counted" (exact), "rehearsed" (a step on the models' shapes) or "estimated".
    """

    name: str
    most: int
    at_peak: int
    how: str


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: parameters in memory, and those that a token passes."""

    chosen: int
    number: int
    parameters: int
    per_token: int


@dataclass(frozen=True)
class Plan:
    """Memory of one device while a recipe (or one stage of it) is carried out.

    peak: bytes in its fullest moment, which is in the phase `fullest`; phases: peak of each.
    experts: of models that have some. cache: on disk, of a teacher that is loaded.
    """

    stage: str
    processes: int
    device: str
    peak: int
    fullest: str
    phases: Mapping[str, int]
    components: tuple[Component, ...]
    batch: Longest
    notes: tuple[str, ...] = ()
    experts: Mapping[str, Experts] = field(default_factory=dict)
    cache: CacheSize | None = None


Seen = dict[str, Looked]


def plan_recipe(recipe: Recipe, processes: int = 1, seen: Seen | None = None) -> list[Plan]:
    """The plan of every stage of a recipe, in order; of a recipe without stages its only one.

    Args:
        processes: of a data-parallel run; each has a device of its own.
        seen: what plans of much the same recipe found out about its records, and where this one
            notes it.

    Raises:
        TaidError: what a run would refuse, too.
    """
    at_least("--processes", processes, 1)
    seen = {} if seen is None else seen
    # what training would log belongs to training
    with quiet("taid_vlm", "transformers", "accelerate", "torch", warn=False):
        return [_plan(part, name, processes, seen) for name, part in parts_by_name(recipe)]


def fullest(plans: Sequence[Plan]) -> Plan:
    """The stage that needs most."""
    return max(plans, key=lambda plan: plan.peak)



# ----- one stage ----------------------------------------------------------------------------


def _plan(recipe: Recipe, stage: str, processes: int, seen: Seen) -> Plan:
    with tempfile.TemporaryDirectory() as folder:
        found = gather(_for_rehearsal(recipe, folder, processes))
        shapes, saved = Shapes(), Counter[str]()
        trainer = _trainer(recipe, found, shapes, saved)
        looked = _looked(trainer, recipe, "train", found.train, seen)
        sides = [(looked, found.train)]
        batch, lengths = longest_step(trainer, looked, _rows(recipe, found.args, looked))
        phases = {STEP: _rehearsed(rehearse_training, formula.training, trainer, batch, shapes)}
        if _device(recipe) == "gpu":
            trainer._steps.clear()  # CUDA's allocator gives what the loss had to anything else
        phases[UPDATE] = _update(trainer, recipe, processes)
        if found.eval is not None:
            looked = _looked(trainer, recipe, "eval", found.eval, seen)
            sides.append((looked, found.eval))
            held_out, _ = longest_batch(trainer, looked, found.args.per_device_eval_batch_size)
            phases[EVALUATION] = _rehearsed(
                rehearse_evaluation, formula.evaluation, trainer, held_out, shapes)
        phases = {name: _rounded(memory, saved) for name, memory in phases.items()}
        plan = _account(stage, processes, recipe, found, trainer, phases, lengths)
        return replace(plan, cache=cache_size(recipe, trainer, sides))


def _rows(recipe: Recipe, args: DistillationConfig, looked: Looked) -> int:
    """Records of a micro-batch: of one by tokens as many of the longest as it holds."""
    if (budget := recipe.train.get("tokens_per_batch")) is None:
        return args.per_device_train_batch_size
    longest = max(len(row.ids) for _, one in looked.usable for row in one.rows.values())
    return max(1, int(budget) // longest)


def _looked(
    trainer: DistillationTrainer, recipe: Recipe, side: str, records: Any, seen: Seen
) -> Looked:
    """The records of one side, looked at once for all recipes that show them alike."""
    models = [(spec.model_name_or_path, spec.revision, spec.processor_name_or_path,
               spec.chat_template, spec.chat_template_kwargs, spec.processor_kwargs)
              for spec in (recipe.student, *recipe.teacher_specs.values())]
    shown = [recipe.train.get(key) for key in ("max_length", "supervise")]
    key = repr((side, getattr(recipe.data, side), recipe.data.video, models, shown,
                recipe.objective, recipe.teacher_weights))
    if key not in seen:
        seen[key] = look_at(trainer, records)
    return seen[key]


def _for_rehearsal(recipe: Recipe, folder: str, processes: int) -> Recipe:
    """The recipe with those arguments of training alone that change what lies in memory.

    A sharded student's gradients lie there from the first micro-batch on, so that the fullest
    moment does not hang on how many of them are here.
    Half precision is bfloat16: float16 takes as much, and no CPU can autocast to it.
    """
    train = {key: value for key, value in recipe.train.items() if key in _MATTER}
    train["gradient_accumulation_steps"] = 2 if shares_of(recipe, processes) else min(
        train.get("gradient_accumulation_steps", 1), 2)
    own = {"bf16": bool(train.get("bf16") or recipe.train.get("fp16")), "use_cpu": True,
           "max_steps": 1, "optim": "sgd", "logging_steps": 1, "logging_nan_inf_filter": False,
           "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
    teacher = recipe.teacher and recipe.teacher.model_copy(
        update={"sharding": None, "devices": None})
    return recipe.model_copy(update={
        "train": {**train, **own}, "output_dir": folder, "teacher": teacher})


def _trainer(
    recipe: Recipe, found: Ingredients, shapes: Shapes, saved: Counter[str]
) -> DistillationTrainer:
    """The run's trainer on models of shapes; `saved` gets what `quantization` takes off them."""
    student: Any = model_of_shapes(recipe.student, "student", shapes)
    saved[kinds.STUDENT] = saved_bytes(student, recipe.student)
    shared, base = _sharing(recipe, found), student
    if recipe.student.peft is not None:
        student = with_adapter(student, lora_config(recipe.student.peft), on_meta=True)
        shapes.hollow(student)
    teachers: dict[str, Any] = dict(found.caches)
    for key, spec in recipe.teacher_specs.items():
        if spec.server is not None:
            teachers[key] = _Served(spec.server, load_skeleton(spec, key))
        elif shared is not None and not shared.reason:
            teachers[key] = TeacherInStudent(base, shared.adapter, empty=True)
        elif key not in teachers:
            teachers[key] = model_of_shapes(_stored(spec, recipe), key, shapes)
            saved[kinds.TEACHER] = saved.get(kinds.TEACHER, 0) + saved_bytes(teachers[key], spec)
    trainer = DistillationTrainer(
        student, recipe.of_teachers(teachers), found.args, found.train, None,
        found.student_processor, found.teacher_processor)
    if isinstance(trainer.teacher, SharedTeacher):
        shapes.hollow(trainer.model)  # the teacher's adapter
    if trainer.visual.map is not None:
        shapes.hollow(trainer.visual.map)
    return trainer


def _sharing(recipe: Recipe, found: Ingredients) -> Sharing | None:
    teacher = recipe.teacher and _stored(recipe.teacher, recipe)
    return sharing(recipe.model_copy(update={"teacher": teacher}), found)


class _Served(ServedTeacher):
    """A served teacher whose server is not asked: laws of the right shapes."""

    asks = False

    def _connect(self) -> None:
        return None

    def _ask(self, question: Question) -> Laws:
        ids = torch.zeros(len(question.places), self.top, dtype=torch.long)
        return Laws(ids, ids.double(), ids[:, 0].double())

    def wait(self, batches: Sequence[dict[str, Any]]) -> None:
        pass

    def sparse(self, batch: Mapping[str, Any], k: int) -> SparseSignal:
        labels = batch["teacher_labels"]
        ids, own = labels[:, None].expand(-1, k), labels.float()
        return SparseSignal(ids.contiguous(), ids.float(), own.clone(), own)


def _stored(spec: ModelSpec, recipe: Recipe) -> ModelSpec:
    """A teacher stays in the half precision it is stored in, except on a CPU."""
    half = spec.dtype is None and _device(recipe) == "gpu"
    return spec.model_copy(update={"dtype": "auto"}) if half else spec


def _device(recipe: Recipe) -> str:
    return "cpu" if recipe.train.get("use_cpu") else "gpu"


# ----- its phases ---------------------------------------------------------------------------


def _rehearsed(rehearse: Callable[..., Memory], by_formula: Callable[..., Memory],
               trainer: DistillationTrainer, batch: Batch, shapes: Shapes) -> Memory:
    try:
        return rehearse(trainer, batch, shapes)
    except TaidError:
        raise
    except Exception as error:  # a model's own code may need values, or kernels of its own
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return replace(by_formula(trainer, batch), problem=reason)


def _rounded(memory: Memory, saved: Mapping[str, int]) -> Memory:
    """With weights as they lie there: a rehearsal multiplies by whole ones."""
    at_peak, most = ({kind: size - saved.get(kind, 0) for kind, size in part.items()}
                     for part in (memory.at_peak, memory.most))
    return replace(memory, at_peak=at_peak, most=most)


def _update(trainer: DistillationTrainer, recipe: Recipe, processes: int) -> Memory:
    """The optimizer's step: all gradients, and nothing left of the activations but, on a CPU, the
    loss's room for logits."""
    _, scratch = _optimizer(trainer, recipe, shares_of(recipe, processes))
    live = {**formula.resident_models(trainer), kinds.SCRATCH: scratch,
            kinds.GRADIENTS: bytes_of(trained(trainer)), kinds.LOSS: bytes_of(kept(trainer))}
    return Memory(live, live)


def _optimizer(
    trainer: DistillationTrainer, recipe: Recipe, shares: Shares | None
) -> tuple[int, int]:
    tables = {id(module.weight) for module in trainer.model.modules()
              if isinstance(module, nn.Embedding)}
    own = trained(trainer)
    updated = own if shares is None else shares.updated(own)
    state, scratch = optimizer_bytes(
        optim_of(recipe), updated,
        embeddings=[here for here, p in zip(updated, own, strict=True) if id(p) in tables],
        gpu=_device(recipe) == "gpu", momentum="momentum" in str(recipe.train.get("optim_args")))
    master = 0 if shares is None else shares.master(own)
    return state + master, scratch + master  # of gradients there is such a copy, too


def optim_of(recipe: Recipe) -> str:
    """The optimizer's name in transformers."""
    given = recipe.train.get("optim", TrainingArguments.default_optim)
    return str(getattr(given, "value", given))


# ----- the account --------------------------------------------------------------------------


def _account(
    stage: str, processes: int, recipe: Recipe, found: Ingredients, trainer: DistillationTrainer,
    phases: Mapping[str, Memory], lengths: Longest,
) -> Plan:
    shares = shares_of(recipe, processes)
    state, _ = _optimizer(trainer, recipe, shares)
    buckets = bytes_of(trained(trainer)) if processes > 1 and shares is None else 0
    always = {kinds.OPTIMIZER: state, kinds.BUCKETS: buckets}
    phases = {name: _placed(memory, recipe, trainer, processes)
              for name, memory in phases.items()}
    if shares is not None:
        phases = {name: _spread(memory, name, trainer, shares) for name, memory in phases.items()}
    whole = {name: _with_process(memory, always, _device(recipe))
             for name, memory in phases.items()}
    name, worst = max(whole.items(), key=lambda item: item[1].peak)
    most = {kind: max(memory.most.get(kind, 0) for memory in whole.values())
            for kind in kinds.KINDS}
    return Plan(
        stage, processes, _device(recipe), worst.peak, name,
        {phase: memory.peak for phase, memory in whole.items()},
        tuple(Component(kind, most[kind], worst.at_peak.get(kind, 0), _how(kind, phases, recipe))
              for kind in kinds.KINDS if most[kind]),
        lengths, tuple(_notes(recipe, found, phases, trainer, shares)), _experts(trainer))


def _experts(trainer: DistillationTrainer) -> dict[str, Experts]:
    models = {"student": trainer.model, **{
        role_of(name) if name else "teacher": getattr(teacher, "model", None)
        for name, teacher in each(trainer.teacher).items()}}
    counts = {role: (model, chosen_experts(unwrap(model).config))
              for role, model in models.items() if model is not None}
    return {role: Experts(*chosen, sum(p.numel() for p in unwrap(model).parameters()),
                          parameters_per_token(model))
            for role, (model, chosen) in counts.items() if chosen is not None}


def _placed(
    memory: Memory, recipe: Recipe, trainer: DistillationTrainer, processes: int
) -> Memory:
    """With as much of the teacher as its sharding and its devices leave to the student's device."""
    teacher = recipe.teacher
    if teacher is None or trainer.teacher_model is None:
        return memory
    if _is_elsewhere(teacher.devices) and _device(recipe) == "gpu":
        size = resident(trainer.teacher_model.get_output_embeddings())
    elif teacher.sharding and teacher.is_sharded:
        size = sharded(trainer.teacher_model, teacher.sharding, processes)
    else:
        return memory
    return replace(memory, at_peak={**memory.at_peak, kinds.TEACHER: size},
                   most={**memory.most, kinds.TEACHER: size})


def _spread(
    memory: Memory, phase: str, trainer: DistillationTrainer, shares: Shares
) -> Memory:
    """With as much of the student as its sharding leaves to each device, and what is whole for as
    long as it is computed with, which needs no copies of autocast's."""
    own, buffers = parameters(trainer), bytes_of(trainer.model.buffers())
    rounded = formula.resident_models(trainer)[kinds.STUDENT] - memory.at_peak[kinds.STUDENT]
    here = bytes_of(shares.parameters(own)) + buffers - rounded // (
        shares.processes if shares.stage == 3 else 1)
    whole, left = bytes_of(trained(trainer)), bytes_of(shares.gradients(trained(trainer)))
    passing = 0 if phase == UPDATE else shares.gathered(trainer.model)
    passing += shares.unreduced(trainer.model) if phase == STEP else 0

    def spread(part: Mapping[str, int]) -> dict[str, int]:
        casts = 0 if shares.half else part.get(kinds.CASTS, 0)
        return {**part, kinds.STUDENT: here, kinds.CASTS: casts, kinds.GATHERED: passing,
                kinds.GRADIENTS: part.get(kinds.GRADIENTS, 0) * left // whole}

    return replace(memory, at_peak=spread(memory.at_peak), most=spread(memory.most))


def _is_elsewhere(devices: Any) -> bool:
    return devices == "cpu" or (isinstance(devices, list) and 0 not in devices)


def _with_process(memory: Memory, always: Mapping[str, int], device: str) -> Memory:
    """What the process itself takes, and what its allocator cannot use."""
    made = sum(size for kind, size in memory.at_peak.items()
               if kind not in (kinds.STUDENT, kinds.TEACHER))
    process = GPU_PROCESS if device == "gpu" else CPU_PROCESS
    more = {**always, kinds.OVERHEAD: process + int(FRAGMENTATION * made)}
    return Memory({**memory.at_peak, **more}, {**memory.most, **more})


def _how(kind: str, phases: Mapping[str, Memory], recipe: Recipe) -> str:
    if recipe.train.get("deepspeed") and kind in (kinds.GRADIENTS, kinds.OPTIMIZER):
        return ESTIMATED  # its engine's own copies
    if kind in (kinds.STUDENT, kinds.TEACHER, kinds.GRADIENTS, kinds.BUCKETS) or (
            kind == kinds.OPTIMIZER and optim_of(recipe) in OPTIMIZERS):
        return COUNTED
    guessed = any(memory.problem for memory in phases.values()) or kind in (
        kinds.OVERHEAD, kinds.SCRATCH, kinds.OPTIMIZER, kinds.GATHERED)
    return ESTIMATED if guessed else REHEARSED


def _notes(
    recipe: Recipe, found: Ingredients, phases: Mapping[str, Memory],
    trainer: DistillationTrainer, shares: Shares | None,
) -> Iterator[str]:
    """What the plan could not know, and what is not in memory."""
    for name, teacher in each(trainer.teacher).items():
        if isinstance(teacher, CachedTeacher):
            cache, who = teacher.cache, f"{role_of(name)}" if name else "the teacher"
            yield (f"of {who} its head alone is in memory; '{cache.folder}' has {cache.bytes:,} "
                   f"bytes on disk, {cache.bytes_per_token:,.0f} an answer token.")
    if isinstance(trainer.teacher, SharedTeacher):
        yield "teacher and student share one base model, which is counted as the student."
    elif (shared := _sharing(recipe, found)) is not None:
        yield f"teacher and student have one base model, loaded for each: {shared.reason}."
    if optim_of(recipe) not in OPTIMIZERS:
        yield f"train.optim = '{optim_of(recipe)}' is not known here; counted like adamw_torch."
    yield from _shard_notes(recipe, shares)
    if recipe.teacher is not None and recipe.teacher.devices is not None:
        where = "its head alone is counted" if _is_elsewhere(recipe.teacher.devices) else \
            "all of it is counted"
        yield (f"teacher.devices = {recipe.teacher.devices!r} may put the teacher beside the "
               f"student or not; {where}.")
    for key in ("torch_compile", "auto_find_batch_size"):
        if recipe.train.get(key):
            yield f"train.{key} is not followed; the plan is of a run without it."
    for key, teacher in recipe.teacher_specs.items():
        if teacher.server is not None:
            who = "the teacher" if key == "teacher" else key
            yield (f"{who} is served ('{teacher.server.model}'): it takes no memory here, and its "
                   "server is not asked.")
    if trainer.objective.on_policy is not None:
        yield ("sampled answers are counted with all of on_policy.max_new_tokens where references "
               "are not longer; keys and values while they are sampled, when there are no "
               "gradients and no logits, are not.")
    for role, spec in (("student", recipe.student), *recipe.teacher_specs.items()):
        if spec.init_kwargs:
            named = ", ".join(spec.init_kwargs)
            yield (f"{role}.init_kwargs ({named}) are not followed: a quantised model takes less; "
                   f"{role}.quantization is.")
    for name, memory in phases.items():
        if memory.problem:
            yield (f"the {name} could not be rehearsed ({memory.problem:.200}); its activations "
                   "are estimated by a formula.")


def _shard_notes(recipe: Recipe, shares: Shares | None) -> Iterator[str]:
    for key in ("fsdp", "parallelism_config"):
        if recipe.train.get(key) and (shares is None or key != "fsdp"):
            more = " Say how many with --processes." if key == "fsdp" else ""
            yield (f"train.{key} shards the models over devices; the plan is of one device that "
                   f"holds all of them.{more}")
    if shares is not None and shares.accumulates:
        yield ("FSDP keeps whole gradients until the last micro-batch of a step; "
               "train.accelerator_config={gradient_accumulation_kwargs: {sync_each_batch: true}} "
               "shards them after each.")
    if shares is not None and offloads(recipe):
        yield "shares in the memory of the host are counted as if they were on the device."
