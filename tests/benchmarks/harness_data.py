"""Small data for lm-eval's tasks, in the columns and folders that they have on the hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

THINGS = ("square", "circle", "cat", "dog", "table", "picture", "line", "house")
COLOURS = ("red", "blue", "green", "yellow")


def jsonl(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def arc(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"id": f"q{i}", "question": f"Which one is the {THINGS[i % 8]} {i}?",
             "choices": {"text": [f"{c} {THINGS[(i + k) % 8]}" + " now" * k
                                  for k, c in enumerate(COLOURS)],
                         "label": ["A", "B", "C", "D"]},
             "answerKey": "ABCD"[i % 4]} for i in range(start, start + count)]


def hellaswag(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"ind": i, "activity_label": "Drawing", "ctx_a": f"A {THINGS[i % 8]} is {i}.",
             "ctx_b": "then it", "ctx": "", "label": str(i % 4), "split": "val",
             "endings": [f"is [brackets] {c}" + " again" * k for k, c in enumerate(COLOURS)]}
            for i in range(start, start + count)]


def winogrande(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"sentence": f"The {THINGS[i % 8]} saw the {THINGS[(i + 3) % 8]}, for the _ is {i}.",
             "option1": THINGS[i % 8], "option2": THINGS[(i + 3) % 8], "answer": "12"[i % 2]}
            for i in range(start, start + count)]


def truthfulqa(count: int) -> list[dict[str, Any]]:
    def targets(i: int, right: int) -> dict[str, Any]:
        return {"choices": [f"It is {c}." for c in COLOURS],
                "labels": [int((k - i) % 4 < right) for k in range(4)]}

    return [{"question": f"What is {i}?", "mc1_targets": targets(i, 1),
             "mc2_targets": targets(i, 2)} for i in range(count)]


def mmlu(count: int) -> list[dict[str, Any]]:
    return [{"question": f"Is it {i}?", "subject": "", "choices": list(COLOURS), "answer": i % 4}
            for i in range(count)]


def gsm8k(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"}
            for i in range(start, start + count)]


def open_llm(folder: Path, subjects: Sequence[str]) -> Path:
    """Data of all six tasks, each as a copy of its repository on the hub."""
    both = {"arc_challenge/ARC-Challenge": (arc, 26, 5, "test"),
            "hellaswag/data": (hellaswag, 12, 4, "validation"),
            "winogrande/winogrande_xl": (winogrande, 6, 5, "validation"),
            "gsm8k/main": (gsm8k, 6, 3, "test")}
    for name, (rows, examples, asked, split) in both.items():
        parquet(rows(examples, 100), folder / name / "train-00000-of-00001.parquet")
        parquet(rows(asked), folder / name / f"{split}-00000-of-00001.parquet")
    jsonl(truthfulqa(4), folder / "truthfulqa_mc2" / "multiple_choice" / "validation.jsonl")
    for number, subject in enumerate(subjects):
        jsonl(mmlu(5), folder / "mmlu" / subject / "dev.jsonl")
        jsonl(mmlu(2 + number % 3), folder / "mmlu" / subject / "test.jsonl")
    return folder
