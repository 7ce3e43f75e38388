"""Where a teacher's weights lie: whole in every process, or its base model sharded over all.

Sharded is the base model alone. The head stays a plain frozen matrix, so that hidden states and
head are what they are in one process. No process runs a sharded model without the others: all
take the same number of batches, in training and in evaluation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from taid_vlm.errors import TaidError

MESH = "teacher"  # the dimension of the teacher's own device mesh


def place(model: PreTrainedModel, accelerator: Accelerator, sharding: str) -> Any:
    """The model where the accelerator's process computes with it.

    What `device_map` has spread stays where it is; accelerate moves an evaluated model for one
    process and for DDP, but not under FSDP.

    Args:
        sharding: of `config.model.TeacherSpec`.
    """
    if sharding == "fsdp":
        return shard(model, accelerator.device)
    if getattr(model, "hf_device_map", None) is not None:
        return model
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
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)
    model._is_fsdp_managed_module = True  # `generate` then goes on until all processes are done
    return model


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The language model's layers, by what transformers says may not be split.

    Raises:
        TaidError: it says nothing.
    """
    names = set(model._no_split_modules or ())
    layers = [x for x in model.get_decoder().modules() if type(x).__name__ in names]
    if not layers:
        raise TaidError(f"teacher.sharding: transformers does not say what the layers of "
                        f"{type(model).__name__} are.", mend="Take teacher.devices instead.")
    return layers
