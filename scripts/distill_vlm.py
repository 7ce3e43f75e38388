"""Distil a vision-language model, on one or many devices:

    accelerate launch scripts/distill_vlm.py recipes/internvl3_8b_to_1b.yaml [KEY=VALUE ...]

The same as `accelerate launch -m taid_vlm distill`, for launchers that want a file. `--resume` goes
on from the last checkpoint.
"""

from __future__ import annotations

import sys

from taid_vlm.cli import distill_script

if __name__ == "__main__":
    sys.exit(distill_script("internvl3_8b_to_1b"))
