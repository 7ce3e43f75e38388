"""VLMEvalKit's files of one model, read as an evaluation.

Of every dataset it writes MODEL_DATASET.xlsx (or .tsv, .json: PRED_FORMAT), with a row per question
and its `prediction`; its evaluation adds a file that also has what the answer is worth, `hit` or
`score`. Source: vlmeval/smp/file.py and vlmeval/dataset/image_*.py (ms-vlmeval 0.0.20).
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from taid_vlm.benchmarks.harness.converted import prompt_hash, questions_hash
from taid_vlm.benchmarks.scoring import KIND, SCHEMA
from taid_vlm.errors import TaidError
from taid_vlm.evaluation.statistics import mean_of
from taid_vlm.records.files import file_rows

FORMATS = (".json", ".tsv", ".xlsx")
HARNESS = "VLMEvalKit"
SCORES = ("hit", "score", "eval_score", "match")
RUN = re.compile(r"T\d+_G(\w+)")  # a folder for every run: its day and the harness's commit

Row = dict[str, Any]


def read_kit(folder: Path) -> tuple[dict[str, Any], dict[str, list[Row]]] | None:
    """What results.json would say of a model's datasets, and the rows of answers; None where the
    folder holds no predictions of it.

    Raises:
        TaidError: predictions that were never evaluated; .xlsx without openpyxl; a torn file.
    """
    runs = sorted((path for path in folder.iterdir() if path.is_dir() and RUN.match(path.name)),
                  key=lambda path: path.name)
    place = next((run for run in reversed(runs) if _predictions(run, folder.name)), folder)
    model = folder.parent.name if RUN.match(folder.name) else folder.name
    files = _predictions(place, model)
    if not files:
        return None
    found = {dataset: _scored(place, path) for dataset, path in files.items()}
    rows = {dataset: rows for dataset, rows in found.items() if rows}
    if not rows:
        raise TaidError(f"'{place}' has predictions of {', '.join(files)}, but none of them is "
                        "evaluated.", mend="Let VLMEvalKit evaluate them (run.py --mode eval).")
    commit = RUN.match(place.name)
    rule = f"{HARNESS} {commit[1]}" if commit else HARNESS
    return {
        "schema": SCHEMA, "kind": KIND, "name": folder.name, "model": {"name": model},
        "tasks": {dataset: _entry(dataset, own, rule) for dataset, own in rows.items()},
        "versions": {HARNESS: commit[1]} if commit else {}}, rows


def _predictions(folder: Path, model: str) -> dict[str, Path]:
    """{dataset: its file}; what an evaluation has added begins with one of these names."""
    files = {path.stem.removeprefix(f"{model}_"): path for path in sorted(folder.iterdir())
             if path.suffix in FORMATS and path.stem.startswith(f"{model}_")}
    return {name: path for name, path in files.items()
            if not any(name.startswith(f"{other}_") for other in files) and
            _is_prediction(path)}


def _is_prediction(path: Path) -> bool:
    """.json may hold anything; tables of this name are predictions."""
    return path.suffix != ".json" or any("prediction" in row for row in read_table(path)[:1])


def _scored(folder: Path, prediction: Path) -> list[Row]:
    """The rows of the file that has scores; [] where there is none."""
    more = sorted(path for path in folder.iterdir() if path.suffix in FORMATS
                  and path.stem.startswith(f"{prediction.stem}_"))
    for path in (*more, prediction):
        table = read_table(path)
        column = next((name for name in SCORES if table and name in table[0]), None)
        if column and "index" in table[0] and "prediction" in table[0]:
            return [_row(row, column) for row in table]
    return []


def _row(row: Mapping[str, Any], column: str) -> Row:
    choices = [str(row[letter]) for letter in "ABCDEFGHIJ" if not _empty(row.get(letter))]
    said = "" if _empty(row["prediction"]) else str(row["prediction"])
    return {"id": str(row["index"]).removesuffix(".0"), "group": "",
            "prompt": "\n".join(["" if _empty(row.get("question")) else str(row["question"]),
                                 *choices]),
            "answer": said, "read": said or None, "score": _number(row[column]),
            "answers": [] if _empty(row.get("answer")) else [str(row["answer"])],
            "tags": {tag: str(row[tag]) for tag in ("category", "split")
                     if not _empty(row.get(tag))}}


def _empty(cell: Any) -> bool:
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


def _number(cell: Any) -> float | None:
    """True and "True", too, as tables of text have it."""
    if isinstance(cell, str):
        cell = {"true": 1, "false": 0}.get(cell.lower(), cell)
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _entry(dataset: str, rows: Sequence[Row], rule: str) -> dict[str, Any]:
    scores = [0.0 if row["score"] is None else row["score"] for row in rows]
    return {
        "title": dataset, "rule": rule, "rule_version": None, "prompt_hash": prompt_hash(rows),
        "n": len(rows), "parse_failures": 0, "figures": {"accuracy": vars(mean_of(scores))},
        "decimals": 1 if all(0 <= score <= 1 for score in scores) else None,
        "answers": f"{dataset}.jsonl", "by_tag": {}, "answering": {"method": "generate"},
        "questions_hash": questions_hash(rows)}


# ----- tables -------------------------------------------------------------------------------


def read_table(path: Path) -> list[Row]:
    """Rows by column; raises TaidError with the file's name."""
    try:
        return list(_READERS[path.suffix](path))
    except (OSError, ValueError, KeyError, csv.Error, TypeError) as error:
        raise TaidError(f"'{path}' could not be read: {' '.join(str(error).split())[:200]}."
                        ) from None


def _json(path: Path) -> Iterator[Row]:
    tree = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(tree, list):
        yield from (row for row in tree if isinstance(row, dict))


def _xlsx(path: Path) -> Iterator[Row]:
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise TaidError(f"'{path}' needs openpyxl.", mend="pip install openpyxl, or let VLMEvalKit "
                        "write PRED_FORMAT=tsv.") from None
    book = load_workbook(path, read_only=True, data_only=True)
    try:
        rows = book.worksheets[0].iter_rows(values_only=True)
        head = [str(cell) for cell in next(rows, ())]
        yield from (dict(zip(head, row, strict=False)) for row in rows)
    finally:
        book.close()


_READERS = {".json": _json, ".tsv": file_rows, ".xlsx": _xlsx}
