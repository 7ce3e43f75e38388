"""OCRBench: a thousand questions of 29 datasets about text in images; points are hits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from taid_vlm.benchmarks.metrics.text import of_text
from taid_vlm.benchmarks.prompts import about_image
from taid_vlm.benchmarks.question import Benchmark, Judged, Question, Rule, groups
from taid_vlm.benchmarks.rows import Row
from taid_vlm.errors import RecordError, nearest
from taid_vlm.evaluation.statistics import Estimate, mean_of

FORMULAS = "Handwritten Mathematical Expression Recognition"
RECOGNITION = ("Regular Text Recognition", "Irregular Text Recognition",
               "Artistic Text Recognition", "Handwriting Recognition",
               "Digit String Recognition", "Non-Semantic Text Recognition")
GROUPS = {"Text Recognition": RECOGNITION} | {name: (name,) for name in (
    "Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction", FORMULAS)}
_TYPES = [name for names in GROUPS.values() for name in names]
_HALF_WIDTH = {0x3000: " "} | {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}


def read(row: Row) -> list[Question]:
    """One question, bare. HME100k is the only dataset of its type, which VLMEvalKit goes by."""
    kind = row.text(row.first("question_type", "category"))
    if kind not in _TYPES:
        raise RecordError(f"{row.where}: question_type = '{kind}'.{nearest(kind, _TYPES)}")
    return about_image(row, row.id("id", "index"), row.text("question"), *row.golds("answer"),
                       tags={"question_type": kind, **row.tags("dataset")})


def found(fold: Callable[[str], str]) -> Callable[[str, Question], float]:
    """Whether an accepted answer is part of the answer; formulas without their spaces."""
    def plain(text: str, formula: bool) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else fold(text).lower()

    def score(answer: str, question: Question) -> float:
        formula = question.tags["question_type"] == FORMULAS
        said = plain(answer, formula)
        return any(plain(gold, formula) in said for gold in question.answers)

    return score


def points(judged: Sequence[Judged]) -> dict[str, Estimate]:
    """Hits of all questions, and of the five groups that are there."""
    parts = {name: [j for j in judged if j.question.tags["question_type"] in types]
             for name, types in GROUPS.items()}
    return {"score": _hits(judged), **{name: _hits(part) for name, part in parts.items() if part}}


def _hits(judged: Sequence[Judged]) -> Estimate:
    scores = [j.verdict.score for j in judged]
    mean = mean_of(scores, groups(judged))
    return replace(mean.scaled(mean.n), value=sum(scores))


BENCHMARK = Benchmark("ocrbench", "OCRBench", read, (
    Rule("official", 1, of_text(found(str)), points,
         "Yuliang-Liu/MultimodalOCR, OCRBench/example.py; VLMEvalKit is the same"),
    Rule("lmms", 1, of_text(found(lambda text: text.translate(_HALF_WIDTH))), points,
         "EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/ocrbench/utils.py (half-width letters)"),
), hub=("echo840/OCRBench", None, "test"), max_new_tokens=128, decimals=None)
