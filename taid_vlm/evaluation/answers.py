"""eval_answers.jsonl: what every held-out answer measured before and after a run, so that runs can
be compared answer by answer."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taid_vlm.errors import RecordError, TaidError
from taid_vlm.evaluation.held_out import AnswerTotals
from taid_vlm.io.jsonl import dump_lines, need, read_lines

FILE = "eval_answers.jsonl"
DIGITS = 8  # float32 has 7
TEACHER = "teacher_"
KINDS = {"source": str, "turn": int, "category": str, "tokens": int, "teacher": dict,
         "before": dict, "after": dict}
KEPT = ("nll", "token_accuracy", "kl", "reverse_kl", "jsd", "agreement", "student_entropy",
        "head_mass", "tail_mass", "chunk_kl", "chunk_reverse_kl", "chunk_jsd", "teacher_nll",
        "teacher_entropy", "teacher_head_mass", "teacher_tail_mass")

Key = tuple[str, int, int]  # source, turn, and which of those that share both
Totals = Mapping[str, float | None]


@dataclass(frozen=True)
class AnswerPair:
    """One answer's figures, summed over its tokens, before and after training.

    key: source, turn, and 0 unless files of one name gave several answers the same ones. teacher:
    the figures that are the teacher's alone. counts: over how many tokens, for figures that are not
    defined at all of `tokens`. All of an answer that counts more or less is multiplied by that.
    """

    key: Key
    category: str
    tokens: float
    teacher: Totals
    before: Totals
    after: Totals
    counts: Mapping[str, float]

    def size(self, figure: str) -> float:
        """Over how many tokens a figure is summed; 0 where it is not defined."""
        if figure not in self.after and figure not in self.teacher:
            return 0
        return self.counts.get(figure, self.tokens)


def to_lines(before: Sequence[AnswerTotals], after: Sequence[AnswerTotals]) -> str:
    """One JSON object a line, in the order of the records whatever the number of processes."""
    start = {key: answer.totals for key, answer in _keyed(before).items()}
    lines = (_line(start.get(key, {}), answer) for key, answer in _keyed(after).items())
    return dump_lines(lines)


def _keyed(answers: Sequence[AnswerTotals]) -> dict[Key, AnswerTotals]:
    """In order; the sort is stable, so that those of one place stay as they came."""
    return dict(zip(_keys((a.source, a.turn) for a in sorted(answers, key=_place)),
                    sorted(answers, key=_place), strict=True))


def _keys(places: Iterable[tuple[str, int]]) -> Iterator[Key]:
    counts: Counter[tuple[str, int]] = Counter()
    for place in places:
        yield *place, counts[place]
        counts[place] += 1


def _line(before: Totals, answer: AnswerTotals) -> dict[str, Any]:
    teacher_names = [name for name in answer.totals if name.startswith(TEACHER)]
    student_names = [name for name in answer.totals if not name.startswith(TEACHER)]
    counts = {name: count for name, count in answer.counts.items() if name in KEPT}
    return {
        "source": answer.source, "turn": answer.turn, "category": answer.category,
        "tokens": answer.tokens, **({"counts": counts} if counts else {}),
        **({"weight": answer.weight} if answer.weight != 1.0 else {}),
        "teacher": _rounded(answer.totals, teacher_names),
        "before": _rounded(before, student_names), "after": _rounded(answer.totals, student_names),
    }


def _rounded(totals: Totals, names: Sequence[str]) -> Totals:
    """Null where a figure is not finite, as in results.json."""
    kept = {name: totals[name] for name in names if name in KEPT and name in totals}
    return {name: float(f"{value:.{DIGITS}g}") if value is not None and math.isfinite(value)
            else None for name, value in kept.items()}


def _place(answer: AnswerTotals) -> tuple[list[Any], int]:
    """ "eval.jsonl:9" stands before "eval.jsonl:10"."""
    parts = re.split(r"(\d+)", answer.source)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], answer.turn


def read_answers(path: Path) -> list[AnswerPair]:
    """The answers of a finished run; raises TaidError for a file that is none."""
    rows = [_row(row, where) for where, row in read_lines(path)]
    keys = _keys((row["source"], row["turn"]) for row in rows)
    return [_pair(key, row) for key, row in zip(keys, rows, strict=True)]


def _pair(key: Key, row: Mapping[str, Any]) -> AnswerPair:
    """Sums and numbers of tokens times what the answer counts."""
    weight = row.get("weight", 1)

    def counted(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: None if value is None else value * weight for name, value in values.items()}

    return AnswerPair(key, row["category"], row["tokens"] * weight, counted(row["teacher"]),
                      counted(row["before"]), counted(row["after"]),
                      counted(row.get("counts", {})))


def _row(row: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        need(row, where, KINDS)
        for name in ("teacher", "before", "after"):
            need(row[name], f"{where}: {name}", dict.fromkeys(row[name], float | int | None))
    except RecordError as error:
        problem = str(error).removeprefix(f"{where}: ").rstrip(".")
        raise TaidError(f"{where}: no line of {FILE} ({problem}).") from None
    return row
