"""TextVQA: questions about text in photographs, each answered by ten people.

In the capitals that lmms-eval gives them: "what is the PIN" as "What is the pin"; no words read
off the image by another model stand beside them.
"""

from __future__ import annotations

from taid_vlm.benchmarks.metrics.vqa import ENOUGH, TEXTVQA_OFFICIAL, TEXTVQA_VLMEVALKIT
from taid_vlm.benchmarks.prompts import short_answers
from taid_vlm.benchmarks.question import Benchmark

BENCHMARK = Benchmark(
    "textvqa", "TextVQA",
    short_answers("question_id", "index", group="image_id", people=ENOUGH, ask=str.capitalize),
    (TEXTVQA_OFFICIAL, TEXTVQA_VLMEVALKIT), hub=("lmms-lab/textvqa", None, "validation"))
