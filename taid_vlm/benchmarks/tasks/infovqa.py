"""InfographicVQA: questions about infographics; answers are read off them, or counted."""

from __future__ import annotations

from taid_vlm.benchmarks.metrics.anls import ANLS, STRICT
from taid_vlm.benchmarks.prompts import short_answers
from taid_vlm.benchmarks.question import Benchmark

BENCHMARK = Benchmark(
    "infovqa", "InfoVQA",
    short_answers("questionId", "question_id", "index", group="image_url", kinds="answer_type"),
    (ANLS, STRICT), hub=("lmms-lab/DocVQA", "InfographicVQA", "validation"))
