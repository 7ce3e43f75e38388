"""Evaluate vision-language models, on one or many devices:

    accelerate launch scripts/evaluate_vlm.py --model student=runs/first \
        --suite taid-vlm=FOLDER --output-dir runs/first/eval

The same as `accelerate launch -m taid_vlm evaluate`, for launchers that want a file. Questions are
shared out, one process writes; the same command goes on after an interruption.
"""

from __future__ import annotations

import sys

from taid_vlm.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
