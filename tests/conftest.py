"""For every test: no network, and one thread, so that small models are fast and repeatable."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TAID_VLM_TRACEBACK", "1")  # what is unexpected shows where it came from
if "TAID_VLM_CACHE" not in os.environ:  # nothing of an earlier state of the code is read
    cache = tempfile.TemporaryDirectory(prefix="taid-vlm-cache-")
    os.environ["TAID_VLM_CACHE"] = cache.name

import torch

torch.set_num_threads(1)
