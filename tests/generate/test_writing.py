"""Questions shared out to processes, and how long all of them take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from taid_vlm.benchmarks.answering import Answer
from taid_vlm.benchmarks.question import Question
from taid_vlm.generate.writing import Shared, Writing


class Parrot:
    settings: dict[str, Any] = {}  # noqa: RUF012

    def answers(self, questions: Any, done: Any, seed: Any) -> Iterator[Any]:
        for question in questions:
            yield [(question, Answer(f"{question.id} {seed}"))]


def test_each_process_asks_its_part_and_one_says_how_long(
    capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [Question(str(index), ("a",)) for index in range(7)]

    def asked(rank: int) -> list[str]:
        shared = Shared(Parrot(), 2, 7, (rank, 2), main=rank == 0)
        return [q.id for given in shared.answers(questions, (), "0/1") for q, _ in given]

    assert asked(0) == ["0", "2", "4", "6"]
    assert capsys.readouterr().out.startswith("time          about 0 s")
    assert asked(1) == ["1", "3", "5"]
    assert not capsys.readouterr().out


def test_seeds_are_no_neighbours() -> None:
    """Answer 1 of seed 0 and answer 0 of seed 1 are other draws."""
    first, second = (Writing(n=2, temperature=1.0, seed=seed).seeds() for seed in (0, 1))
    assert not {*first.values()} & {*second.values()}
