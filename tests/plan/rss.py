"""What one training step adds to a process's resident memory: a script, so that nothing else does.

`python rss.py RECIPE.yaml SMALL.yaml FOLDER` prints bytes. SMALL is trained first, so that what
the libraries load and keep for themselves is there before.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

# large blocks then go back to the system when they are freed, so that none is counted twice
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from plan.models import real_trainer

from taid_vlm.config.recipe import load_recipe


def status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    torch.set_num_threads(1)
    recipe, small, folder = (Path(name) for name in sys.argv[1:4])
    real_trainer(load_recipe(small), folder).train()
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    trainer = real_trainer(load_recipe(recipe), folder)
    trainer.train()
    print(status("VmHWM") - before)


if __name__ == "__main__":
    main()
