"""accelerate's FSDP2 on a CPU, which it leaves out without a word: it trains with DDP there.

Imported by scripts that are started in several gloo processes. As a script it is the command:
`python -m torch.distributed.run --nproc_per_node=2 fsdp_on_cpu.py distill recipe.yaml`.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_init = AcceleratorState.__init__


def init(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
    shared = PartialState._shared_state
    first = not AcceleratorState._shared_state and kwargs.get("fsdp_plugin") is not None
    if first:
        shared["distributed_type"] = DistributedType.MULTI_GPU
    _init(self, *args, **kwargs)
    if first:
        assert self.distributed_type is DistributedType.FSDP
        shared["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = init  # type: ignore[method-assign]

if __name__ == "__main__":
    from taid_vlm.cli import main

    raise SystemExit(main(sys.argv[1:]))
