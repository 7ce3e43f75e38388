"""What a figure was measured with: versions, machine, memory."""

from __future__ import annotations

import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("taid-vlm", "torch", "transformers", "accelerate", "datasets", "tokenizers", "timm",
            "pillow", "peft")


def versions() -> dict[str, str]:
    """Versions of everything that can change a figure."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def machine() -> dict[str, Any]:
    """What the run was timed on, without names of machines or users."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"system": platform.system(), "architecture": platform.machine(),
            "device": device, "threads": torch.get_num_threads()}


def peak_memory() -> dict[str, int]:
    """Bytes: the process's largest resident set, and the accelerator's peak where there is one."""
    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    memory = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        memory["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return memory
