"""Runs with the teacher placed in some way, in the processes that this script is started in.

    python -m torch.distributed.run --nproc_per_node=2 placed.py RUNS.json

RUNS.json has {name: options of make_trainer}; rank 0 leaves NAME.safetensors and NAME.json beside
it: the student's whole weights; log, held-out figures, how both models lay, bytes of the student
in this process before the last update.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import fsdp_on_cpu  # noqa: F401  # before accelerate makes up its mind
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from training.runs import KINDS, make_trainer, rows
from transformers import TrainerCallback

from taid_vlm.models.forward import unwrap

UNEVEN = 5  # held-out records, one at a time: two processes have unequal shares of them


def main() -> None:
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    for name, options in json.loads(path.read_text()).items():
        run(path.parent, name, options)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what torch does at the end of a process can abort it


def run(folder: Path, name: str, options: dict[str, Any]) -> None:
    """Measure, train, measure again; rank 0 writes."""
    trainer = make_trainer(folder / name, **{
        "per_device_eval_batch_size": 1, "optim": "sgd", "learning_rate": 0.1, "logging_steps": 1,
        **options})
    weighed = Weighed(trainer)
    trainer.add_callback(weighed)
    held_out = rows(UNEVEN, seed=3, kinds=options.get("kinds", KINDS))
    trainer.place_student()
    trainer.evaluate(held_out)
    trainer.train()
    trainer.evaluate(held_out)
    whole = {key: full(p) for key, p in unwrap(trainer.model).named_parameters()}
    if trainer.is_world_process_zero():
        save_file(whole, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps({
            "log": trainer.state.log_history, "processes": trainer.accelerator.num_processes,
            "kind": trainer.accelerator.distributed_type.value,
            "loss": trainer.loss_report["name"], "teacher": lies(trainer.teacher_model),
            "student": lies(trainer.model), "bytes": weighed.bytes}))
    trainer.accelerator.wait_for_everyone()


class Weighed(TrainerCallback):
    """Bytes of what this process has of the student, when its gradients are whole."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.bytes = trainer, dict[str, int]()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        own = list(self.trainer.model.parameters())
        kept = [x for one in getattr(self.trainer.optimizer, "state", {}).values()
                for x in one.values() if isinstance(x, Tensor)]
        self.bytes = {"parameters": local(own), "optimizer": local(kept),
                      "gradients": local(p.grad for p in own if p.grad is not None)}


def local(tensors: Iterable[Tensor]) -> int:
    here = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return sum(x.numel() * x.element_size() for x in here)


def full(p: Any) -> Tensor:
    if hasattr(p, "ds_id"):  # ZeRO-3 leaves nothing in the parameter itself
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([p]):
            return p.detach().clone()
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach().contiguous()


def lies(wrapped: nn.Module) -> dict[str, Any]:
    """Which parameters are spread, over what, and what of them is here."""
    model = unwrap(wrapped)
    named = dict(model.named_parameters())
    spread = {name: p for name, p in named.items() if isinstance(p, DTensor)}
    head = model.get_output_embeddings()
    return {
        "whole": sorted(named.keys() - spread.keys()), "spread": sorted(spread),
        "meshes": sorted({f"{p.device_mesh.mesh_dim_names} {p.device_mesh.size()}"
                          for p in spread.values()}),
        "numbers": sum(p.numel() for p in spread.values()),
        "here": sum(p.to_local().untyped_storage().nbytes() // p.element_size()
                    for p in spread.values()),
        "head": f"{type(head).__name__} {type(head.weight).__name__}",
        "trained": sum(p.requires_grad for p in named.values()),
    }


if __name__ == "__main__":
    main()
