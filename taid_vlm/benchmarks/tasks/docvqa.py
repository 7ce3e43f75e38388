"""DocVQA: questions about scanned pages; answers are read off them."""

from __future__ import annotations

from taid_vlm.benchmarks.metrics.anls import ANLS, STRICT
from taid_vlm.benchmarks.prompts import short_answers
from taid_vlm.benchmarks.question import Benchmark

BENCHMARK = Benchmark(
    "docvqa", "DocVQA",
    short_answers("questionId", "question_id", "index", group="docId", kinds="question_types"),
    (ANLS, STRICT), hub=("lmms-lab/DocVQA", "DocVQA", "validation"))
