"""VQAv2: questions about photographs, each answered by ten people."""

from __future__ import annotations

from taid_vlm.benchmarks.metrics.vqa import ENOUGH, VQA_LMMS, VQA_OFFICIAL
from taid_vlm.benchmarks.prompts import short_answers
from taid_vlm.benchmarks.question import Benchmark

BENCHMARK = Benchmark(
    "vqav2", "VQAv2",
    short_answers("question_id", "index", group="image_id", people=ENOUGH,
                  tags=("answer_type", "question_type")),
    (VQA_OFFICIAL, VQA_LMMS), hub=("lmms-lab/VQAv2", None, "validation"), max_new_tokens=16)
