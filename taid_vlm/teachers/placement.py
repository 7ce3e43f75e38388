"""Where a teacher's weights lie: with the student, on other devices, or sharded over processes.

What lies elsewhere is the base model alone. The head stays a plain frozen matrix on the process's
device, so that hidden states and head are what they are in one process on one device. No process
runs a sharded model without the others: all take the same number of batches.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import align_module_device, gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from taid_vlm.errors import TaidError
from taid_vlm.models.parts import decoder_layers

MESH = "teacher"  # the dimension of the teacher's own device mesh


def place(model: PreTrainedModel, accelerator: Accelerator, sharding: str) -> Any:
    """The model as the accelerator's process computes with it. accelerate moves an evaluated model
    for one process and for DDP, but not under FSDP.

    Args:
        sharding: of `config.model.TeacherSpec`.
    """
    if sharding in SHARD:
        return SHARD[sharding](model, accelerator.device)
    if getattr(model, "hf_device_map", None) is not None:
        return bring_home(model, accelerator.device)
    return accelerator.prepare_model(model, evaluation_mode=True).to(accelerator.device)


def shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Shard the base model in place with torch's `fully_shard`, over all processes.

    Units are the decoder's layers, which every batch runs; all else (tower, projector,
    embeddings) is gathered together for a forward: a batch without images leaves out a tower, and
    the other processes would wait for it. The head's parameters are left whole, so embeddings
    that are tied to it are, too.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=(MESH,))
    whole = set(model.get_output_embeddings().parameters())
    for unit in (*decoder_layers(model), model.base_model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    _move_rest(model, device)
    model._is_fsdp_managed_module = True  # `generate` then goes on until all processes are done
    return model


def _move_rest(model: PreTrainedModel, device: torch.device) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)


def split(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Split every layer of the base model by transformers' plan for tensor parallelism.

    All processes then compute one batch together; as each has its own, they take turns.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=(MESH,))
    apply_tensor_parallelism(model, mesh, planned(model, dist.get_world_size()))
    for p in model.parameters():
        if isinstance(p, DTensor):  # a slice would keep all of what it is cut from
            p._local_tensor = p._local_tensor.clone()
    _move_rest(model, device)
    model.base_model.forward = _taking_turns(model.base_model.forward, device)
    return model


def planned(model: PreTrainedModel, processes: int) -> dict[str, str]:
    """What transformers' plan does with every module and parameter of the base model, by name."""
    plan, *_ = model._resolve_parallel_plans(DistributedConfig(tp_plan="auto", tp_size=processes))
    whole = {id(p) for p in model.get_output_embeddings().parameters()}
    kept = [name for name, module in model.named_modules()
            if any(id(p) in whole for p in module.parameters(recurse=False))]
    return {name: style for name, style in plan.items()
            if not any(f"{name}.".startswith(f"{inner}.") for inner in kept)}


def _taking_turns(forward: Any, device: torch.device) -> Any:
    """`forward` of a model that all processes run on the same inputs, for inputs of their own.

    Where answers are generated, with a cache, the inputs are the same already.
    """

    @functools.wraps(forward)
    def turns(**inputs: Any) -> Any:
        if inputs.get("use_cache"):
            return forward(**inputs)
        tensors = {key: x for key, x in inputs.items() if isinstance(x, Tensor)}
        shapes = gather_object([{key: (x.shape, x.dtype) for key, x in tensors.items()}])
        rest = {key: x for key, x in inputs.items() if key not in tensors}
        own = None
        for rank, names in enumerate(shapes):
            here = rank == dist.get_rank()
            part = {key: tensors[key].contiguous() if here else
                    torch.empty(shape, dtype=dtype, device=device)
                    for key, (shape, dtype) in names.items()}
            for x in part.values():
                dist.broadcast(x, rank)
            result = forward(**{**rest, **part})
            own = result if here else own
        return own

    return turns


def bring_home(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Let a model that `device_map` has put elsewhere be called from `device`: its base model takes
    what it is given to where it begins, and gives its results back; its head is here."""
    head = model.get_output_embeddings()
    with align_module_device(head):  # offloaded weights are there inside
        own = {name: nn.Parameter(p.detach().to(device, copy=p.device != device), False)
               for name, p in head.named_parameters(recurse=False)}
    remove_hook_from_module(head)
    for name, parameter in own.items():
        setattr(head, name, parameter)
    remove_hook_from_module(model)  # not those inside
    for module, place in ((model.base_model, begins_on(model)), (head, device)):
        add_hook_to_module(module, AlignDevicesHook(place, io_same_device=True), append=True)
    return model


def begins_on(model: PreTrainedModel) -> torch.device:
    """The device on which a model's first layer runs, wherever its weights are kept."""
    embeddings = model.get_input_embeddings()
    hook = getattr(embeddings, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    named = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((device for device in named if device is not None), embeddings.weight.device)
    return torch.device(device)


def check_sharding(model: PreTrainedModel, sharding: str, processes: int) -> None:
    """Refuse a model that cannot be sharded over so many processes; shapes are enough.

    Raises:
        TaidError: with the value, the model and the mend.
    """
    problem, mend = None, "Take teacher.sharding: fsdp instead"
    config = model.config.get_text_config()
    if getattr(model.config, "quantization_config", None) is not None:
        problem, mend = "is quantised", "Take teacher.sharding: replicate"
    elif sharding == "fsdp" and not decoder_layers(model):
        problem, mend = "does not say what its layers are", "Take teacher.devices instead"
    elif sharding == "tensor" and not model.tp_plan:
        problem = "has no plan for tensor parallelism in transformers"
    elif sharding == "tensor":
        for key in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(config, key, None)
            if isinstance(heads, int) and heads % processes:
                problem = f"has {key} = {heads}, which {processes} processes cannot share evenly"
    if problem is not None:
        raise TaidError(f"teacher.sharding = '{sharding}': the model ({config.model_type}) "
                        f"{problem}. {mend}.")


SHARD = {"fsdp": shard, "tensor": split}
