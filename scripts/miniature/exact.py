"""Experiments on the exact language; every function here is one job of a worker process."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from miniature.exposure import POSITIONS, along, exposed
from miniature.intervals import interval
from miniature.language import Language, figures, make_language
from miniature.methods import EVERY, EXPOSED, METHODS, Method
from miniature.scale import Exact
from miniature.students import Course, Students, Trained, learned_by_text, train
from taid_vlm.objectives.schedule import PAPER_ALPHA_STEPS

# Seeds of students and of their data; those that learning rates are chosen on are never reported.
REPORTED, TUNING = 0, 1000
TEXT, LESSONS, TEACHERS = 1, 2, 3  # data of the warm start, of a training, of the teachers
CRITERION = "jeffreys"  # what learning rates are chosen by, for every objective alike
OWN_CRITERION = "own_jeffreys"  # the same, where the students' own texts are what is asked about
SWEEPS: dict[str, dict[str, Mapping[str, Any]]] = {
    "t_start": {f"{t:g}": {"t_start": t} for t in (0.0, 0.2, 0.4, 0.6, 0.8)},
    "t_end": {f"{t:g}": {"t_end": t} for t in (0.5, 0.7, 0.85, 1.0)},
    "alpha": {"linear (adaptive off)": {"adaptive": False}, "5e-4, as in the paper":
              {"alpha": 5e-4}, "auto": {}, "4 x auto": {"times_auto": 4}},
}


@functools.cache
def language(setup: Exact) -> Language:
    return make_language(setup.symbols).to(setup.device)


def truth(setup: Exact) -> Tensor:
    """The language itself as a teacher: logits of every context."""
    return language(setup).law.log().float()


@functools.cache
def starts(setup: Exact, first: int, count: int, warm: bool) -> Students:
    """Students `first`, `first` + 1, ...: after some text, or as they were drawn."""
    seeds = range(first, first + count)
    if not warm:
        return Students(setup.student, setup.symbols, seeds, setup.device)
    return learned_by_text(setup.student, language(setup), seeds, setup.warm_rate,
                           Course(setup.warm_steps, setup.batch, first + TEXT))


def facts(setup: Exact) -> dict[str, Any]:
    """What the language, the warm starts and the untrained students are like."""
    world = language(setup)
    found = {"truth": truth(setup)[None],
             "warm": starts(setup, REPORTED, setup.seeds, True).laws(),
             "scratch": starts(setup, REPORTED, setup.seeds, False).laws()}
    return {"symbols": setup.symbols, "laws": setup.symbols**2,
            "student_parameters": setup.student.parameters(setup.symbols),
            **{name: per_seed(world, laws) for name, laws in found.items()}}


Measure = Callable[[Language, Tensor], dict[str, Tensor]]


def per_seed(
    world: Language, laws: Tensor, measured: Measure = figures
) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in measured(world, laws).items()}


def tune(
    setup: Exact, method: Method, warm: bool = True, measured: Measure = figures,
    criterion: str = CRITERION,
) -> dict[str, Any]:
    """Every learning rate of the grid on seeds of their own, and the one to take."""
    rates, count = setup.rates, setup.tuning_seeds
    students = starts(setup, TUNING, count, warm).pick(
        [seed for _ in rates for seed in range(count)])
    train(students, method, language(setup), truth(setup),
          [rate for rate in rates for _ in range(count)],
          Course(setup.steps, setup.batch, TUNING + LESSONS))
    scores = measured(language(setup), students.laws())[criterion].view(len(rates), count)
    tried = {rate: row.mean().item() for rate, row in zip(rates, scores, strict=True)}
    rate = choose(tried)
    return {"tried": [[rate, score] for rate, score in tried.items()], "rate": rate,
            "at_the_edge": rate in (min(rates), max(rates))}


def choose(tried: Mapping[float, float]) -> float:
    """The learning rate with the lowest score; of equals the smaller; one that failed never.

    Raises:
        ArithmeticError: every one failed.
    """
    whole = {rate: score for rate, score in tried.items() if math.isfinite(score)}
    if not whole:
        raise ArithmeticError(f"no learning rate of {sorted(tried)} trains without overflow")
    return min(whole, key=lambda rate: (whole[rate], rate))


def taught(
    setup: Exact, method: Method, rate: float, teacher: Tensor, warm: bool = True
) -> tuple[Students, Trained]:
    """The reported seeds' students, trained."""
    students = starts(setup, REPORTED, setup.seeds, warm).pick(range(setup.seeds))
    return students, train(students, method, language(setup), teacher, [rate] * setup.seeds,
                           Course(setup.steps, setup.batch, REPORTED + LESSONS))


def measure(
    setup: Exact, method: Method, rate: float, teacher: Tensor, warm: bool = True
) -> dict[str, Any]:
    """A training on the reported seeds: figures per seed, curves, TAID's active share."""
    students, trained = taught(setup, method, rate, teacher, warm)
    return {"figures": per_seed(language(setup), students.laws()), "curves": trained.curves,
            "rate": rate, "active_share": trained.active_share}


def tuned(setup: Exact, name: str, warm: bool = True) -> dict[str, Any]:
    """One objective with the truth as its teacher, at the learning rate that suits it best."""
    found = tune(setup, EVERY[name], warm)
    return {**measure(setup, EVERY[name], found["rate"], truth(setup), warm), "tuning": found}


def exposure(setup: Exact, name: str) -> dict[str, Any]:
    """One objective on texts of the language, of the student or of both, and how far the student
    is from the truth in each."""
    method, world = EXPOSED[name], language(setup)
    found = tune(setup, method, measured=exposed, criterion=OWN_CRITERION)
    students, trained = taught(setup, method, found["rate"], truth(setup))
    laws = students.laws()
    positions = {kind: [(n, each[:, n - 1].mean().item()) for n in POSITIONS] for kind, each in
                 zip(("kl", "reverse_kl"), along(world, laws), strict=True)}
    return {"figures": per_seed(world, laws, exposed), "positions": positions,
            "rate": found["rate"], "active_share": trained.active_share, "tuning": found}


# ----- capacity gap ---------------------------------------------------------------------------


@functools.cache
def teachers(setup: Exact) -> tuple[Tensor, ...]:
    """Logits of teachers of growing size, each taught by the language's laws."""
    taught = []
    for shape in setup.teachers:
        model = Students(shape, setup.symbols, [TEACHERS], setup.device)
        train(model, METHODS["KL"], language(setup), truth(setup), [setup.warm_rate],
              Course(setup.teacher_steps, setup.batch, TEACHERS))
        taught.append(model.laws()[0])
    return tuple(taught)


def teacher_facts(setup: Exact) -> list[dict[str, Any]]:
    """Size and exact figures of every teacher."""
    return [{"parameters": shape.parameters(setup.symbols),
             "figures": {k: v[0] for k, v in per_seed(language(setup), logits[None]).items()}}
            for shape, logits in zip(setup.teachers, teachers(setup), strict=True)]


def gap(setup: Exact, name: str, rate: float) -> list[dict[str, Any]]:
    """One objective with every teacher, the same students and learning rate each time."""
    return [measure(setup, METHODS[name], rate, teacher) for teacher in teachers(setup)]


# ----- sweeps ---------------------------------------------------------------------------------


def sweep(setup: Exact, kind: str, value: str, rate: float) -> dict[str, Any]:
    """TAID with one setting of its schedule changed."""
    return measure(setup, Method("taid", sweep_schedule(setup, kind, value)), rate, truth(setup))


def sweep_schedule(setup: Exact, kind: str, value: str) -> dict[str, Any]:
    """Arguments of TaidSchedule; `times_auto` is alpha in units of what "auto" makes of it."""
    given = dict(SWEEPS[kind][value])
    if "times_auto" in given:
        given["alpha"] = min(1.0, given.pop("times_auto") * PAPER_ALPHA_STEPS / setup.steps)
    return given


def summary(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """95 % intervals of a result's figures."""
    return {name: interval(result["figures"][name]).as_json() for name in result["figures"]}
