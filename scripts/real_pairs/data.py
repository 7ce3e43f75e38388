"""Training, validation and test records: no record is in two of them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taid_vlm.errors import TaidError
from taid_vlm.io.files import write_text

CHECKED = re.compile(r"<<[^>]*>>")  # a calculator's notes in gsm8k's answers
FILES = ("gsm8k_train.jsonl", "gsm8k_test.jsonl", "tinyshakespeare.txt",
         "mt_bench_questions.jsonl")
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Numbers of records, and how long one may be in characters (plain text: is, about)."""

    pool: int = 880
    validation: int = 24
    test: int = 64
    elsewhere: int = 12  # of each other kind of text
    characters: int = 280


def write_splits(source: Path, folder: Path, sizes: Sizes) -> None:
    """folder/gsm8k/train.jsonl, validation.jsonl; the same in text/; test.jsonl for all.

    The test records are of three kinds, by `category`. Raises TaidError for too few.
    """
    for name in FILES:
        if not (source / name).is_file():
            raise TaidError(f"--data = '{source}' has no {name}; it needs {', '.join(FILES)}.")
    learned, tested = (questions(source / f"gsm8k_{part}.jsonl", sizes.characters)
                       for part in ("train", "test"))
    passages = plays(source / "tinyshakespeare.txt", sizes.characters)
    cut = len(passages) * 9 // 10
    asked = turns(source / "mt_bench_questions.jsonl", sizes.characters)
    for name, rows in (("gsm8k", learned), ("text", passages[:cut])):
        train = taken(rows, sizes.pool + sizes.validation, name)
        write(train[:sizes.pool], folder / name / "train.jsonl")
        write(train[sizes.pool:], folder / name / "validation.jsonl")
    write([*taken(tested, sizes.test, "gsm8k"), *taken(passages[cut:], sizes.elsewhere, "text"),
           *taken(asked, sizes.elsewhere, "prompts")], folder / "test.jsonl")


def questions(path: Path, characters: int) -> list[Row]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answer = CHECKED.sub("", row["answer"])
        if len(row["question"]) + len(answer) <= characters:
            found.append({"prompt": row["question"], "completion": answer})
    return found


def plays(path: Path, characters: int) -> list[Row]:
    """Speeches joined until they have half of `characters`; longer ones are left out."""
    found, passage = [], ""
    for speech in path.read_text(encoding="utf-8").split("\n\n"):
        passage = f"{passage}\n\n{speech}".strip()
        if len(passage) >= characters // 2:
            if len(passage) <= characters:
                found.append({"text": passage})
            passage = ""
    return found


def turns(path: Path, characters: int) -> list[Row]:
    """First turns, as plain text: prompts, not answers."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [{"text": row["turns"][0]} for row in rows if len(row["turns"][0]) <= characters]


def taken(rows: Sequence[Row], number: int, category: str) -> list[Row]:
    """So many, drawn once and for all."""
    if len(rows) < number:
        raise TaidError(f"--data: {number} records of {category} are needed, but {len(rows)} are "
                        "short enough; take a larger --characters or fewer records.")
    return [{**row, "category": category} for row in random.Random(0).sample(rows, number)]


def write(rows: Sequence[Row], path: Path) -> None:
    write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), path)
