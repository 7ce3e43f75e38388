"""How large the miniature is: minutes on two CPU cores, or more on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from miniature.students import Shape

STUDENT = Shape(4, 16)
TEACHERS = (Shape(4, 24), Shape(6, 48), Shape(10, 96), Shape(16, 192))
RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # tried for every objective alike


@dataclass(frozen=True)
class Exact:
    """The exact language's side: all of it on one device, seeds side by side in one tensor.

    steps: of every training with an objective.
    teachers: models of growing size for the capacity gap.
    """

    symbols: int = 32
    student: Shape = STUDENT
    steps: int = 1000
    batch: int = 128
    seeds: int = 8
    tuning_seeds: int = 3
    warm_rate: float = 1e-2
    rates: tuple[float, ...] = RATES
    teachers: tuple[Shape, ...] = TEACHERS
    device: str = "cpu"

    @property
    def warm_steps(self) -> int:
        """Of text, from scratch: what every student has had before any objective."""
        return -(-3 * self.steps // 10)

    @property
    def teacher_steps(self) -> int:
        return -(-3 * self.steps // 2)


@dataclass(frozen=True)
class Models:
    """The small VLMs' and LLMs' side: ordinary recipes, in processes of one CPU thread each.

    steps: of every arm, and of the teacher of plain text. records: held out; questions: how many
    of theirs are answered freely.
    """

    seeds: int = 3
    steps: int = 200
    records: int = 300
    questions: int = 400


@dataclass(frozen=True)
class Scale:
    exact: Exact
    models: Models


SCALES = {
    "cpu": Scale(Exact(), Models()),
    "gpu": Scale(
        Exact(symbols=64, student=Shape(6, 32), steps=5000, batch=512, seeds=16, tuning_seeds=5,
              device="cuda",
              teachers=(Shape(6, 48), Shape(10, 96), Shape(16, 192), Shape(32, 512))),
        Models(seeds=5, steps=1000, records=600, questions=1000)),
}
