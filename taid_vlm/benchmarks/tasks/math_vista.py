"""MathVista: mathematical reasoning over figures, charts and photographs."""

from __future__ import annotations

from collections.abc import Mapping

from taid_vlm.benchmarks.choices import letter_of, listed
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
HINT = "Hint:"
SPLIT_BY = ("source", "category", "task", "context", "grade", "language")


def read(row: Row) -> list[Question]:
    """One question; every skill it needs is a tag of its own, "skill: ...".

    VLMEvalKit's table has the hint within its `question`, and no column for the rest of `metadata`.
    """
    choices = tuple(choice.strip() for choice in row.texts("choices"))
    kinds = {key: row.text(key) for key in ("question_type", "answer_type")}
    asked = row.text("question")
    whole = asked.startswith(HINT)
    return about_image(
        row, row.id("pid", "index"),
        asked if whole else _prompt(row, choices, kinds["answer_type"]), _answer(row, choices),
        image=row.first("decoded_image", "image"), choices=choices, tags=kinds | _tags(row, whole),
        extra={"answer_type": kinds["answer_type"], "precision": _precision(row, asked),
               **row.tags("extraction")})


def _precision(row: Row, asked: str) -> int:
    """Decimals, from the column or from what the hint says."""
    said = next((int(kind[-1]) for kind, hint in HINTS.items()
                 if kind.startswith("float") and hint in asked), 0)
    return row.integer("precision", said)


def _answer(row: Row, choices: tuple[str, ...]) -> str:
    answer = row.text("answer")
    if not choices:
        return answer
    if answer in choices:
        return LETTERS[choices.index(answer)]
    if "answer_option" in row:
        return letter_of(row, choices, "answer_option")
    raise RecordError(f"{row.where}: answer '{answer}' is none of the choices {choices!r}.")


def _tags(row: Row, flat: bool) -> dict[str, str]:
    """Out of `metadata`, or of columns of the same names."""
    metadata = row if flat and "metadata" not in row else row.need("metadata")
    if not isinstance(metadata, Mapping):
        raise RecordError(f"{row.where}: metadata must hold {', '.join(SPLIT_BY)} and skills, "
                          f"got {metadata!r:.60}.")
    tags = {key: str(metadata[key]) for key in SPLIT_BY if metadata.get(key)}
    skills = row.texts("skills") if metadata is row else metadata.get("skills") or ()
    return tags | {f"skill: {skill}": "yes" for skill in skills}


def _prompt(row: Row, choices: tuple[str, ...], kind: str) -> str:
    kind += str(row.integer("precision")) if kind == "float" else ""
    if kind not in HINTS:
        raise RecordError(f"{row.where}: answer_type '{kind}' is not known.{nearest(kind, HINTS)}")
    unit = f" (Unit: {row.text('unit')})" if "unit" in row else ""
    options = f"\nChoices:\n{listed(choices, '({}) {}')}" if choices else ""
    return (f"{HINT} Please answer the question {HINTS[kind]}\nQuestion: {row['question']}{unit}"
            f"{options}").strip()


BENCHMARK = Benchmark("math_vista", "MathVista", read, (JUDGE_FREE, OFFICIAL),
                      hub=("AI4Math/MathVista", None, "testmini"), max_new_tokens=1024)
