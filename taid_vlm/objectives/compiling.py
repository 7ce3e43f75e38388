"""When a function of rows of logits is worth compiling, and how many rows it is given at a time."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator

import torch

from taid_vlm.objectives.divergences import row_chunks

WORTH_COMPILING = 2**22  # logits below which compiling costs more than it saves
CACHED = 2**18  # logits of one model that a thread on a CPU works on at a time


@functools.cache
def can_compile(device: str) -> bool:
    """Whether torch.compile finds what it builds with: a C++ compiler, or Triton on CUDA."""
    if device != "cpu":
        return importlib.util.find_spec("triton") is not None
    from torch._inductor import cpp_builder, exc

    try:
        return bool(cpp_builder.get_cpp_compiler())
    except exc.InvalidCxxCompiler:
        return False


def should_compile(elements: int, device: str) -> bool:
    """Whether compiling what is done to so many logits is worth it there, and can be done."""
    return elements >= WORTH_COMPILING and can_compile(device)


def row_groups(rows: int, width: int, device: str, scratch: int) -> Iterator[slice]:
    """As many rows at a time as a CPU's caches hold; elsewhere so many that `scratch` numbers for
    every logit are about 64 MiB of float32."""
    if device != "cpu":
        yield from row_chunks(rows, scratch * width)
        return
    step = max(2, torch.get_num_threads() * max(1, CACHED // max(1, width)))
    parts = max(1, rows // step)  # about equal: one row left over would be compiled for by itself
    for part in range(parts if rows else 0):
        yield slice(part * rows // parts, (part + 1) * rows // parts)
