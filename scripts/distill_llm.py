"""Distil a text LLM, on one or many devices:

    accelerate launch scripts/distill_llm.py recipes/qwen3_8b_to_0.6b.yaml [KEY=VALUE ...]

The same as `accelerate launch -m taid_vlm distill`, for launchers that want a file. `--resume` goes
on from the last checkpoint.
"""

from __future__ import annotations

import sys

from taid_vlm.cli import distill_script

if __name__ == "__main__":
    sys.exit(distill_script("qwen3_8b_to_0.6b"))
