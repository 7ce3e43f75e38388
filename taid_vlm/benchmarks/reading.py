"""A benchmark's questions from its data; what cannot be read is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row, logger, places_by_index
from taid_vlm.config.data import DataSource
from taid_vlm.errors import SampleDropped, TaidError
from taid_vlm.records import open_rows


def read_questions(benchmark: Benchmark, source: DataSource, base: Path | None = None,
                   left_out: Counter[str] | None = None) -> list[Question]:
    """All questions of a benchmark.

    Args:
        base: folder that a relative path starts from (default: the working directory).
        left_out: counts the rows that are no part of the benchmark, by reason; without it they
            are told of in a warning.

    Raises:
        TaidError: no data there, or ids that are not unique.
        RecordError: a row that does not have the benchmark's columns.
    """
    rows = open_rows(source, base)
    is_tsv = ".tsv" in map(str.lower, Path(source.paths[0]).suffixes)
    by_index = places_by_index(rows) if is_tsv else None
    questions: list[Question] = []
    dropped = Counter[str]()
    for index in range(len(rows)):
        row = Row(rows.columns_of(index), rows.where(index), rows.root, by_index, index, rows)
        try:
            questions.extend(benchmark.read(row))
        except SampleDropped as problem:
            dropped[problem.reason] += 1
    questions = benchmark.complete(questions)
    _check(questions, benchmark, source, dropped)
    if left_out is not None:
        left_out.update(dropped)
    elif dropped:
        logger.warning("%s: rows of '%s' left out: %s.", benchmark.name, source.shown,
                       _counts(dropped))
    return questions


def _check(questions: Sequence[Question], benchmark: Benchmark, source: DataSource,
           dropped: Counter[str]) -> None:
    """There must be questions, each with an id of its own."""
    if not questions:
        reason = f" (rows left out: {_counts(dropped)})" if dropped else ""
        raise TaidError(f"{benchmark.name}: '{source.shown}' holds no questions{reason}.")
    places: dict[str, int] = {}
    for number, question in enumerate(questions):
        if (first := places.setdefault(question.id, number)) != number:
            raise TaidError(f"{benchmark.name}: two questions of '{source.shown}' have the id "
                            f"'{question.id}' (questions {first} and {number}, from 0); their "
                            "answers could not be told apart.")


def _counts(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} with {reason}" for reason, count in dropped.most_common())
