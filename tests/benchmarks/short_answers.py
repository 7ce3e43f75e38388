"""What the tests of short answers share: rows and questions by hand, and answers gone wrong."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taid_vlm.benchmarks.question import Benchmark, Judged, Question, Rule, Verdict
from taid_vlm.benchmarks.reading import read_questions
from taid_vlm.benchmarks.rows import Row
from taid_vlm.config.data import DataSource

BROKEN = {
    "blank": " \n\t", "letters": "a" * 200_000, "words": "a red dog " * 20_000,
    "commas": "1" + ",1" * 100_000, "only commas": "1" + "," * 200_000, "periods": "." * 200_000,
    "percent": "1" + "%" * 200_000, "digits": "9" * 200_000, "spaces": "a" + " " * 200_000 + "b",
    "apostrophes": "n't" * 66_000, "hyphens": "a-" * 100_000, "cyrillic": "красная собака " * 5000,
    "kana": "赤い犬が走っている。", "emoji": "🐶" * 1000, "nan": "NaN", "infinite": "-inf",
    "huge": "1e999", "zero byte": "\x00", "all letters": "A B C D", "brackets": "[" * 200_000,
    "underscores": "1_0",
}


def question(*golds: str, **tags: str) -> Question:
    return Question("1", ("What?",), answers=golds, tags=tags)


def verdict(rule: Rule, answer: str, *golds: str, **tags: str) -> Verdict:
    return rule.judge([question(*golds, **tags)], [answer])[0]


def judged(rule: Rule, asked: Sequence[Question], answers: Sequence[str]) -> list[Judged]:
    return [Judged(*each) for each in zip(asked, answers, rule.judge(asked, answers), strict=True)]


def survives(rule: Rule, answer: str, *golds: str, **tags: str) -> Verdict:
    """The verdict on a broken answer, which takes less than a second and is a plain number."""
    start = time.process_time()
    found = verdict(rule, answer, *golds, **tags)
    assert time.process_time() - start < 1
    assert math.isfinite(found.score) and 0 <= found.score <= 10
    if not answer.strip():
        assert found == Verdict(0.0, None)
    return found


def read(benchmark: Benchmark, **columns: Any) -> Question:
    """The one question of a row."""
    one, = benchmark.read(Row({"image": "a.png", "question": "what is It?", **columns}, "x.jsonl:1",
                              Path("images"), number=7))
    return one


def read_file(benchmark: Benchmark, rows: Sequence[dict[str, Any]], folder: Path) -> list[Question]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_questions(benchmark, DataSource(str(path)))
