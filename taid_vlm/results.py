"""results.json: every figure of a run and what is needed to check it years later."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from taid_vlm.errors import TaidError

SCHEMA = 1
STUDENT_FOLDER = "student"  # of a run's folder: the model it has trained
PACKAGES = ("taid-vlm", "torch", "transformers", "accelerate", "datasets", "tokenizers", "timm",
            "pillow", "peft")


def versions() -> dict[str, str]:
    """Versions of everything that can change a figure."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


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


def as_json(value: Any) -> str:
    """Strict JSON: NaN and infinity become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False)


def write_json(value: Any, path: Path) -> Path:
    """Write strict JSON so that the file is whole or absent."""
    return write_text(as_json(value) + "\n", path)


def write_text(text: str, path: Path) -> Path:
    """Write through a temporary file in the same folder: readers see the old file or the new one.

    Raises:
        TaidError: the folder or the file cannot be written.
    """
    try:
        return _replace_file(text, path)
    except OSError as error:
        raise TaidError(f"'{path}' could not be written: {error.strerror or error}") from error


def _replace_file(text: str, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
