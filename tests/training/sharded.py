"""One step's gradient under DDP or FSDP2, on the gloo processes that this script is started in.

    python -m torch.distributed.run --nproc_per_node=2 sharded.py KIND FOLDER

KIND is ddp or fsdp, with -chunks for a student that splits text differently, -reference for the
reference loss or -several for two teachers. Rank 0 writes KIND-PROCESSES files.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from training.runs import rows
from zoo import Built, build

from taid_vlm import DistillationConfig
from taid_vlm.adapters import make_adapter
from taid_vlm.alignment import pair_models
from taid_vlm.batch.collator import DistillationCollator
from taid_vlm.batch.several import SeveralCollator
from taid_vlm.batch.shares import Shares
from taid_vlm.models.forward import head_rows
from taid_vlm.models.head import IDENTITY
from taid_vlm.objectives import parse_objective
from taid_vlm.teachers import LocalTeacher, Teachers
from taid_vlm.training.loss import choose_step
from taid_vlm.training.several import SeveralStep


def main() -> None:
    torch.set_num_threads(1)
    kind, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    theirs, ours = build("internvl"), build(
        "llava", seed=1, tokenizer="metaspace" if "-chunks" in kind else "permuted")
    teacher, student = (make_adapter(theirs.processor, "teacher"),
                        make_adapter(ours.processor, "student"))
    pairing = pair_models(teacher, student, head_rows(theirs.model), head_rows(ours.model))
    collator = DistillationCollator(student, teacher, pairing)
    # FSDP gathers gradients by module, so every process has to use the tower in every batch
    seen = [row for row in rows(12) if row.get("images") is not None]
    batches = [collator([row]) for row in seen[:8][rank::world]]
    objective = parse_objective({"terms": ["taid", {"name": "ce", "weight": 0.3}]})
    name = "reference" if kind.endswith("-reference") else "fused"
    teacher_model = LocalTeacher(theirs.model)
    step = choose_step(name, objective, pairing, ours.model, teacher_model, batches[0], 40_000)
    if kind.endswith("-several"):
        teacher_model, batches = several(ours, collator, teacher_model, seen[:8][rank::world])
        step = SeveralStep(objective, teacher_model, ours.model, IDENTITY,
                           DistillationConfig(str(folder), use_cpu=True), contextlib.nullcontext)
    model = wrapped(kind, ours.model)
    tokens = torch.tensor(sum(len(batch["labels"]) for batch in batches))
    dist.all_reduce(tokens)
    for batch in batches:
        found = step(model, teacher_model, batch, 0.4, True)
        (found.loss * world / tokens).backward()  # both average over processes
    gradients = {name: p.grad for name, p in ours.model.named_parameters() if p.grad is not None}
    sharded = any(isinstance(g, DTensor) for g in gradients.values())
    whole = {name: (g.full_tensor() if isinstance(g, DTensor) else g).contiguous()
             for name, g in gradients.items()}
    if rank == 0:
        save_file(whole, folder / f"{kind}-{world}.safetensors")
        (folder / f"{kind}-{world}.json").write_text(json.dumps({"sharded": sharded}))
    dist.barrier()
    dist.destroy_process_group()


def several(
    ours: Built, collator: DistillationCollator, one: LocalTeacher, data: list[dict[str, Any]]
) -> tuple[Teachers, list[dict[str, Any]]]:
    """With a second teacher of another tokenizer; every record has one of the two, in turn, so
    that processes have other ones in a step."""
    other = build("llava", seed=5, tokenizer="metaspace")
    adapter = make_adapter(other.processor, "teacher")
    pairing = pair_models(adapter, collator.student, head_rows(other.model), head_rows(ours.model))
    parts = {"a": collator, "b": DistillationCollator(collator.student, adapter, pairing)}
    joint = SeveralCollator(collator.student, parts=parts, shares=Shares(("a", "b"), None))
    named = [{**row, "teacher": "ab"[len(row["completion"]) % 2] if "completion" in row else "a"}
             for row in data]
    return (Teachers({"a": one, "b": LocalTeacher(other.model)},
                     {name: part.pairing for name, part in parts.items()}),
            [joint([row]) for row in named])


def wrapped(kind: str, model: torch.nn.Module) -> torch.nn.Module:
    model.train()
    if kind.startswith("ddp"):
        return DistributedDataParallel(model, find_unused_parameters=True)
    for layer in model.model.language_model.layers:
        fully_shard(layer, reshard_after_forward=True)
    return fully_shard(model, reshard_after_forward=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what torch does at the end of a process can abort it
