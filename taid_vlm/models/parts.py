"""The parts of a model: which parameters are whose, what is frozen, what learns at which rate.

    tower           the encoder of images (and of sound, where a model has one)
    projector       what brings its features to the language model's width, with all that stands
                    between the two (separators of tiles, a resampler's queries)
    language_model  decoder and input embeddings
    head            output embeddings, unless they are the input embeddings (tied)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from taid_vlm.config.training import PARTS
from taid_vlm.errors import TaidError
from taid_vlm.models.forward import unwrap
from taid_vlm.models.loading import sees_images
from taid_vlm.models.lora import own_parameters
from taid_vlm.models.quantization import numel

TOWER, PROJECTOR, LANGUAGE_MODEL, HEAD = PARTS

# what the families of transformers call their encoders (`PreTrainedModel.get_encoder`)
_TOWER_NAME = re.compile(r"(^|_)(tower|visual|vision_model|vision_encoder|image_encoder)$")
# children of a tower that leave its width: they are the projector, or its first half
_PROJECTOR_IN_TOWER = frozenset({
    "merger", "merger_list", "deepstack_merger_list",  # Qwen-VL and those built like it
    "patch_merger",  # Hunyuan 4
    "downsample",  # GLM-V, before its merger
    "connector",  # Granite-Docling
    "head_linear", "head_norm",  # Ovis2: scores over its visual vocabulary
})
_NOT_FOR_CHECKPOINT = ("every_n_layers", "offload")  # read by transformers, not by torch


def parts_of(model: nn.Module) -> dict[str, str]:
    """The part of every parameter, by its name in `model` (wrapped or not).

    A LoRA parameter belongs to the part that it adapts. A part that a model lacks (a text model's
    tower, a tied head) is nobody's.
    """
    plain = unwrap(model)
    paths = {id(module): name for name, module in plain.named_modules()}
    head, embeddings = plain.get_output_embeddings(), plain.get_input_embeddings()
    language = [paths[id(m)] for m in (plain.get_decoder(), embeddings) if id(m) in paths]
    own_head = None if head is None or is_tied(plain) else paths[id(head)]
    if head is not None and own_head is None:
        language.append(paths[id(head)])
    rest = PROJECTOR if sees_images(plain.config) else LANGUAGE_MODEL
    parts = {id(p): _part(name, own_head, language, rest) for name, p in plain.named_parameters()}
    # what a wrapper brings (a learnt prompt) stands in for input embeddings
    return {name: parts.get(id(p), LANGUAGE_MODEL) for name, p in model.named_parameters()}


def _part(name: str, head: str | None, language: Sequence[str], rest: str) -> str:
    if head is not None and name.startswith(f"{head}."):
        return HEAD
    pieces = name.split(".")
    for piece, inner in pairwise(pieces):
        if _TOWER_NAME.search(piece):
            return PROJECTOR if inner in _PROJECTOR_IN_TOWER else TOWER
    return LANGUAGE_MODEL if any(f"{name}.".startswith(f"{path}.") or not path
                                 for path in language) else rest


def is_tied(model: nn.Module) -> bool:
    """Whether the head's weight is the input embeddings'."""
    plain = unwrap(model)
    head, embeddings = plain.get_output_embeddings(), plain.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is embeddings.weight


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Number of parameters, and of those that are trained, of every part the model has."""
    parts, counts = parts_of(model), {part: Counter[str]() for part in PARTS}
    for name, p in own_parameters(model).items():
        counts[parts[name]].update(parameters=numel(p), trained=numel(p) * p.requires_grad)
    return {part: dict(numbers) for part, numbers in counts.items() if numbers}


# ----- what a user asks for -----------------------------------------------------------------


def freeze_parts(
    model: nn.Module, freeze: Sequence[str] | None, learning_rates: Mapping[str, float] | None
) -> None:
    """Take the gradient from the parameters of some parts.

    Raises:
        TaidError: the model lacks a part that is named, nothing is left to train, or a part with a
            learning rate has nothing to train (an adapter does not reach it).
    """
    parts, freeze, rates = parts_of(model), freeze or [], learning_rates or {}
    for key, names in (("freeze", freeze), ("learning_rates", rates)):
        for part in names:
            if part not in parts.values():
                raise TaidError(_lacking(model, key, part, set(parts.values())))
    for name, p in model.named_parameters():
        if parts[name] in freeze:
            p.requires_grad_(False)
    trained = {parts[name] for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise TaidError(f"freeze = {list(freeze)}: nothing is left to train.")
    for part in rates:
        if part not in trained:
            raise TaidError(f"learning_rates.{part}: nothing of '{part}' is trained. Trained: "
                            f"{_listed(trained)}.")


def _lacking(model: nn.Module, key: str, part: str, present: set[str]) -> str:
    if part == HEAD and is_tied(model):
        return (f"{key}: this student's head is its input embedding (they are tied), which belongs "
                f"to '{LANGUAGE_MODEL}': name that instead.")
    return f"{key}: this student has no '{part}'. It has: {_listed(present)}."


def _listed(parts: set[str]) -> str:
    return ", ".join(part for part in PARTS if part in parts)


# ----- training -----------------------------------------------------------------------------


class TrainedParts(TrainerCallback):
    """What `freeze` and `learning_rates` of a DistillationConfig mean for one student.

    Args:
        model: the student, with its adapter if it has one; its frozen parts lose their gradient.
        args: a DistillationConfig.

    Raises:
        TaidError: as `freeze_parts`, and where recomputing activations rules out mixed batches.
    """

    def __init__(self, model: nn.Module, args: Any) -> None:
        self.freeze, self.learning_rates = args.freeze or [], args.learning_rates or {}
        freeze_parts(model, self.freeze, self.learning_rates)
        settle_unused(args, model)
        model.register_forward_hook(_keep_graph)
        self.frozen = frozen_modules(model, self.freeze)
        self.rates: dict[str, float] = {}  # of the last optimizer step, as they are logged

    def keep_frozen(self) -> None:
        """Put frozen modules into evaluation mode: no dropout, and BatchNorm's statistics stay.

        A layer that recomputes its activations stays in training mode, where alone it does so;
        what is inside it does not.
        """
        for module in self.frozen:
            module.training = bool(getattr(module, "gradient_checkpointing", False))

    def split_groups(self, optimizer: Any, model: nn.Module) -> Any:
        """Split the groups of an optimizer by part, and give each part its own learning rate.

        Groups with the general rate stand first, where Trainer reads the rate that it logs.

        Raises:
            TaidError: an optimizer that does not update by groups of parameters.
        """
        if not self.learning_rates or "part" in optimizer.param_groups[0]:
            return optimizer
        parts = parts_of(model)
        places = {id(p): parts[name] for name, p in model.named_parameters() if p.requires_grad}
        if {id(p) for group in optimizer.param_groups for p in group["params"]} != set(places):
            raise TaidError(f"learning_rates: {type(optimizer).__name__} does not update by groups "
                            "of parameters; choose another optim.")
        split = []
        for part in sorted(PARTS, key=lambda part: part in self.learning_rates):
            for group in optimizer.param_groups:
                own = [p for p in group["params"] if places[id(p)] == part]
                rate = self.learning_rates.get(part, group["lr"])
                split += [{**group, "params": own, "lr": rate, "part": part}] if own else []
        optimizer.param_groups[:] = split
        return optimizer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A frozen tower has no graph, also where activations are recomputed.

        For that, transformers makes the output of every embedding require a gradient, and the
        whole tower would go backward. Only torch's reentrant way needs it, at the language model.

        Raises:
            TaidError: an optimizer from elsewhere (DeepSpeed's own) knows nothing of parts.
        """
        if self.learning_rates and "part" not in kwargs["optimizer"].param_groups[0]:
            raise TaidError("learning_rates: the optimizer was not made by the trainer, so its "
                            "groups are no parts.")
        reentrant, tower = is_reentrant(args), TOWER in self.freeze
        if not args.gradient_checkpointing or (reentrant and not tower):
            return
        model = unwrap(kwargs["model"])
        model.disable_input_require_grads()
        if reentrant:
            model.get_input_embeddings().register_forward_hook(_require_gradient)
        layers: list[Any] = frozen_modules(model, [TOWER]) if tower else []
        for module in layers:
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the learning rates that this step used."""
        groups = kwargs["optimizer"].param_groups if self.learning_rates else []
        self.rates = {f"learning_rate/{group['part']}": float(group["lr"]) for group in groups}


def frozen_modules(model: nn.Module, freeze: Sequence[str]) -> list[nn.Module]:
    """Modules that hold parameters of these parts only, with all that is inside them."""
    parts, inside = parts_of(model), dict[int, nn.Module]()
    places = {id(p): parts[name] for name, p in model.named_parameters()}
    for module in model.modules():
        own = {places[id(p)] for p in module.parameters()}
        if own and own <= set(freeze):
            inside |= {id(inner): inner for inner in module.modules()}
    return list(inside.values())


def _require_gradient(module: nn.Module, inputs: Any, output: Any) -> Any:
    return output.requires_grad_(True)


def _keep_graph(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Let a batch without images go backward where tower and projector alone are trained.

    Nothing that is trained has a share in such a batch. Its logits (or its loss, where that is what
    comes out) get one: 0 times one parameter, without which there is no graph, and in several
    processes all others wait for this one.
    """
    fused = isinstance(output, tuple)
    value = output.loss if fused else output.logits
    trained = next((p for p in module.parameters() if p.requires_grad), None)
    if not module.training or value.requires_grad or trained is None:
        return output
    value = value + 0 * trained.flatten()[0].to(value.dtype)
    if fused:
        return output._replace(loss=value)
    output.logits = value
    return output


def settle_unused(args: TrainingArguments, model: nn.Module) -> None:
    """Let DistributedDataParallel look for parameters without a gradient, unless the user decided.

    A batch without images uses no tower, and some towers have layers that no batch uses (LLaVA
    reads the last but one). Trainer stops looking where activations are recomputed, which only
    torch's reentrant way asks for.
    """
    if args.ddp_find_unused_parameters is not None or not sees_images(unwrap(model).config):
        return
    if is_reentrant(args) and args.parallel_mode == ParallelMode.DISTRIBUTED:
        raise TaidError(
            "gradient_checkpointing_kwargs: the reentrant way does not work in several processes "
            "where a batch may have no images: set use_reentrant: false, or, if all have, "
            "ddp_find_unused_parameters: false.")
    args.ddp_find_unused_parameters = True


def is_reentrant(args: TrainingArguments) -> bool:
    """Whether activations are recomputed in torch's reentrant way, which is torch's default once
    any of its arguments is options."""
    options = {key: value for key, value in (args.gradient_checkpointing_kwargs or {}).items()
               if key not in _NOT_FOR_CHECKPOINT}
    return bool(args.gradient_checkpointing and options
                and options.get("use_reentrant") is not False)
