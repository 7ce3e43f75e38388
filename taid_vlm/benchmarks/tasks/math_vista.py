"""MathVista: mathematical reasoning over figures, charts and photographs."""

from __future__ import annotations

from collections.abc import Mapping

from taid_vlm.benchmarks.choices import listed
from taid_vlm.benchmarks.metrics.math_vista import JUDGE_FREE, OFFICIAL
from taid_vlm.benchmarks.prompts import about_image
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import LETTERS, Row
from taid_vlm.errors import RecordError, nearest

HINTS = {  # by type of answer; of floats by decimals
    "text": "and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "integer": "requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the "
               "end.",
    "float1": "requiring a floating-point number with one decimal place and provide the final "
              "value, e.g., 1.2, 1.3, 1.4, at the end.",
    "float2": "requiring a floating-point number with two decimal places and provide the final "
              "value, e.g., 1.23, 1.34, 1.45, at the end.",
    "list": "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], "
            "[1.2, 1.3, 1.4], at the end.",
}
SPLIT_BY = ("source", "category", "task", "context", "grade", "language")


def read(row: Row) -> list[Question]:
    """One question; every skill it needs is a tag of its own, "skill: ..."."""
    choices = tuple(choice.strip() for choice in row.texts("choices"))
    kinds = {key: row.text(key) for key in ("question_type", "answer_type")}
    return about_image(
        row, row.id("pid"), _prompt(row, choices, kinds["answer_type"]), _answer(row, choices),
        image=row.first("decoded_image", "image"), choices=choices, tags=kinds | _tags(row),
        extra={"answer_type": kinds["answer_type"], "precision": row.integer("precision", 0),
               **row.tags("extraction")})


def _answer(row: Row, choices: tuple[str, ...]) -> str:
    answer = row.text("answer")
    if not choices:
        return answer
    if answer not in choices:
        raise RecordError(f"{row.where}: answer '{answer}' is none of the choices {choices!r}.")
    return LETTERS[choices.index(answer)]


def _tags(row: Row) -> dict[str, str]:
    metadata = row.need("metadata")
    if not isinstance(metadata, Mapping):
        raise RecordError(f"{row.where}: metadata must hold {', '.join(SPLIT_BY)} and skills, "
                          f"got {metadata!r:.60}.")
    tags = {key: str(metadata[key]) for key in SPLIT_BY if metadata.get(key)}
    return tags | {f"skill: {skill}": "yes" for skill in metadata.get("skills") or ()}


def _prompt(row: Row, choices: tuple[str, ...], kind: str) -> str:
    kind += str(row.integer("precision")) if kind == "float" else ""
    if kind not in HINTS:
        raise RecordError(f"{row.where}: answer_type '{kind}' is not known.{nearest(kind, HINTS)}")
    unit = f" (Unit: {row.text('unit')})" if "unit" in row else ""
    options = f"\nChoices:\n{listed(choices, '({}) {}')}" if choices else ""
    return (f"Hint: Please answer the question {HINTS[kind]}\nQuestion: {row['question']}{unit}"
            f"{options}").strip()


BENCHMARK = Benchmark("math_vista", "MathVista", read, (JUDGE_FREE, OFFICIAL),
                      hub=("AI4Math/MathVista", None, "testmini"), max_new_tokens=1024)
