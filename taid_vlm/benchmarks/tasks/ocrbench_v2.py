"""OCRBench v2: reading text in images in thirty ways, in English and Chinese.

Kinds whose score needs lxml's trees or WordNet have none here, and are counted as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from taid_vlm.benchmarks.metrics import ocrbench_v2 as scores
from taid_vlm.benchmarks.prompts import about_image
from taid_vlm.benchmarks.question import (
    Benchmark,
    Judged,
    Question,
    Rule,
    Verdict,
    accuracy,
    one_by_one,
    split_by,
)
from taid_vlm.benchmarks.rows import Row
from taid_vlm.errors import RecordError, nearest
from taid_vlm.evaluation.statistics import Estimate

TEDS, TEXTS = "TEDS (needs lxml)", "BLEU and METEOR (need nltk's WordNet)"
GROUPS = {  # the kinds of a language's parts
    "en": {
        "text recognition": ("text recognition", "fine-grained text recognition", "full-page OCR"),
        "text detection": ("text grounding", "VQA with position"),
        "text spotting": ("text spotting",),
        "relationship extraction": ("key information extraction", "key information mapping"),
        "element parsing": ("document parsing", "chart parsing", "table parsing",
                            "formula recognition"),
        "mathematical calculation": ("math QA", "text counting"),
        "visual text understanding": ("document classification", "cognition VQA", "diagram QA"),
        "knowledge reasoning": ("reasoning VQA", "science QA", "APP agent",
                                "ASCII art classification")},
    "cn": {
        "text recognition": ("full-page OCR",),
        "relationship extraction": ("key information extraction", "handwritten answer extraction"),
        "element parsing": ("document parsing", "table parsing", "formula recognition"),
        "visual text understanding": ("cognition VQA",),
        "knowledge reasoning": ("reasoning VQA", "text translation")}}
PART_OF = {f"{kind} {language}": f"{part} {language}" for language, parts in GROUPS.items()
           for part, kinds in parts.items() for kind in kinds}
UNSCORED = {"document parsing": TEDS, "chart parsing": TEDS, "table parsing": TEDS,
            "full-page OCR": TEXTS, "fine-grained text recognition": TEXTS,
            "text translation": TEXTS}
PARTLY = "handwritten answer extraction"  # those of several sentences have no score
BY_KIND = {"formula recognition en": scores.formula, "formula recognition cn": scores.formula_cn,
           "cognition VQA cn": scores.vqa_cn, "reasoning VQA cn": scores.vqa_cn,
           "handwritten answer extraction cn": scores.listed_cn,
           "key information extraction en": scores.keys_and_values,
           "key information mapping en": scores.keys_and_values,
           "key information extraction cn": scores.keys_and_values,
           "VQA with position en": scores.with_position, "text grounding en": scores.grounding,
           "text spotting en": scores.spotting}
BY_EVAL = {"multiple choice": scores.letter, "case sensitive": scores.with_case,
           "exact match": scores.count_exact, "regression": scores.count_near}
SHORT_ANSWER = "简答"  # a handwritten answer of several sentences


def read(row: Row) -> list[Question]:
    """One question, bare. VLMEvalKit's table writes "without eval", "without bbox" and so on."""
    row = Row({key: value for key, value in row.items() if value != f"without {key}"}, row.where,
              row.root, row.by_index, row.number, row.records)
    kind = row.text(row.first("type", "category"))
    if kind not in PART_OF:
        raise RecordError(f"{row.where}: type = '{kind}'.{nearest(kind, PART_OF)}")
    golds = tuple(row.texts(row.first("answers", "answer")))
    return about_image(row, row.id("id", "index"), row.text("question"), *golds,
                       tags={"type": kind, "part": PART_OF[kind], **row.tags("dataset_name")},
                       extra=_extra(row, kind, golds))


def _extra(row: Row, kind: str, golds: tuple[str, ...]) -> dict[str, Any]:
    """What a kind's score reads beside the golds."""
    extra: dict[str, Any] = row.tags("eval")
    extra["short"] = SHORT_ANSWER in row.text("question")
    if kind.startswith("key information"):
        extra["pairs"] = scores.pairs_of(golds[0])
    if kind == "VQA with position en":
        extra["bbox"] = [int(x) for x in row.texts("bbox")]
    if kind == "text spotting en":
        boxes = map(scores.literal, row.texts(row.first("bbox_list", "bbox")))
        extra["words"] = list(zip(boxes, row.texts("content"), strict=False))
    return extra


def unscored(question: Question) -> str:
    """The metric that a question's kind needs and that is not here; "" for all others."""
    kind = question.tags["type"]
    if kind == "handwritten answer extraction cn" and question.extra["short"]:
        return TEXTS
    return UNSCORED.get(kind.rpartition(" ")[0], "")


def judge(question: Question, answer: str) -> Verdict:
    """By the question's kind and, within one, its way of being evaluated."""
    if reason := unscored(question):
        return Verdict(0.0, None, reason)
    if not answer.strip():
        return Verdict(0.0, None)
    score = BY_EVAL.get(question.extra.get("eval", "")) or BY_KIND.get(
        question.tags["type"], scores.vqa)
    return Verdict(float(score(answer, question)), answer.strip())


def figures(judged: Sequence[Judged]) -> dict[str, Estimate]:
    """accuracy: of all questions that have a score. Then the parts of which every kind has one;
    the authors' two averages are over all parts, and cannot be given."""
    whole = [f"{part} {language}" for language, parts in GROUPS.items()
             for part, kinds in parts.items()
             if not any(kind in UNSCORED or kind == PARTLY for kind in kinds)]
    parts = split_by(judged, lambda j: j.question.tags["part"])
    return {**accuracy(judged),
            **{part: accuracy(parts[part])["accuracy"] for part in whole if part in parts}}


BENCHMARK = Benchmark("ocrbench_v2", "OCRBench v2", read, (
    Rule("official", 1, one_by_one(judge), figures,
         "Yuliang-Liu/MultimodalOCR, OCRBench_v2/eval_scripts/eval.py"),
), hub=("ling99/OCRBench_v2", None, "test"), max_new_tokens=512)
