"""Evaluate language models on text benchmarks, on one or many devices:

    accelerate launch scripts/evaluate_llm.py --model student=runs/first \
        --tasks open_ended=dolly.jsonl --output-dir runs/first/eval

The same as `accelerate launch -m taid_vlm evaluate`, for launchers that want a file. Without
--tasks it measures the six of the Open LLM Leaderboard (`--harness lm-eval --tasks openllm`), of
which each process takes its share of tasks.
"""

from __future__ import annotations

import sys

from taid_vlm.cli import main

DEFAULT = ("--harness", "lm-eval", "--tasks", "openllm")

if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(main(["evaluate", *(() if "--tasks" in words else DEFAULT), *words]))
