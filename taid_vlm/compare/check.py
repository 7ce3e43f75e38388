"""Whether figures of several runs mean the same: what differs is named, or refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from taid_vlm.compare.folders import Distillation, Evaluation, Method
from taid_vlm.compare.measures import BASE, TEACHER, Measure
from taid_vlm.errors import TaidError, nearest

FEW = 10  # records or questions, below which intervals are too narrow


def check_methods(methods: Sequence[Method], baseline: str) -> None:
    """Names, and that there is something to compare."""
    names = [method.name for method in methods]
    for name, times in Counter(names).items():
        if times > 1:
            raise TaidError(f"{times} of the runs are called '{name}'. Name them: "
                            "taid-vlm compare TAID=runs/a KD=runs/b.")
        if name in (TEACHER, BASE):
            raise TaidError(f"'{name}' cannot be a method's name: it is a row of its own. Give "
                            f"its evaluation as --{name.lower()}.")
    if len(names) < 2:
        raise TaidError("a comparison needs at least two runs.")
    if baseline not in names:
        raise TaidError(f"--baseline '{baseline}' is none of the runs.{nearest(baseline, names)}")
    parts = [path.resolve() for method in methods for path in method.folders]
    twice = [str(path) for path, times in Counter(parts).items() if times > 1]
    if twice:
        raise TaidError(f"'{twice[0]}' is given twice; a run is no second seed of itself.")


def check_held_out(methods: Sequence[Method]) -> list[str]:
    """Warnings about distillation runs; raises TaidError where their data differ."""
    runs = [run for method in methods for run in method.runs]
    _same(runs, "the held-out data (sha256)", _data_hash)
    warnings = [
        _differs(runs, "teachers", _teacher,
                 "Figures against the teacher are shown, but not compared."),
        _differs(runs, "numbers of steps", lambda run: run.results.train.steps),
        *_versions(runs), *_same_seeds(methods),
    ]
    if any(_data_hash(run) is None for run in runs):
        warnings.append("Not all runs say what data they were measured on, so that this could not "
                        "be checked.")
    resumed = [str(run.folder) for run in runs if run.results.train.resumed_from]
    if resumed:
        warnings.append(f"Resumed, so that their time is that of the last part only: "
                        f"{', '.join(resumed)}.")
    return [warning for warning in warnings if warning]


def same_teacher(methods: Sequence[Method]) -> bool:
    return len({_teacher(run) for method in methods for run in method.runs}) == 1


def same_base(methods: Sequence[Method]) -> bool:
    """Whether all runs started from a student with the same held-out figures."""
    def nll(start: Mapping[str, float]) -> float:
        value = start.get("nll", 0.0)
        return 0.0 if math.isnan(value) else value

    starts = [run.before for method in methods for run in method.runs]
    return bool(starts) and all(
        start.keys() == starts[0].keys() and
        math.isclose(nll(start), nll(starts[0]), rel_tol=1e-4) for start in starts)


def check_benchmark(task: str, methods: Sequence[Method]) -> list[str]:
    """Warnings about one benchmark; raises TaidError where rule or data differ."""
    evaluations = [e for method in methods for e in method.evaluated(task)]

    def value(*keys: str) -> Callable[[Evaluation], Any]:
        return lambda e: _inside(e.results["tasks"][task], keys)

    for what, keys in (("rule", ("rule",)), ("the rule's version", ("rule_version",)),
                       ("the data (sha256)", ("source", "sha256")),
                       ("the number of questions", ("n",))):
        _same(evaluations, f"{task}: {what}", value(*keys))
    warnings = [
        _differs(evaluations, f"{task}: prompts", value("prompt_hash")),
        _differs(evaluations, f"{task}: ways of answering", value("answering")),
    ]
    return [warning for warning in warnings if warning]


def check_sizes(measures: Sequence[Measure]) -> list[str]:
    """What stands on too few questions to be drawn from."""
    sizes = {m.column.label: len(set(m.items.groups)) for m in measures if m.items is not None}
    few = sorted({size for size in sizes.values() if size < FEW})
    names = [label for label, size in sizes.items() if size < FEW]
    return [f"Only {few[0]} records or independent questions ({', '.join(names)}): intervals are "
            "too narrow, and nothing should be decided by them."] if few else []


def check_evaluations(methods: Sequence[Method]) -> list[str]:
    warnings = _versions([e for method in methods for e in method.evaluations])
    for method in methods:
        names = Counter(e.results["model"]["name"] for e in method.evaluations)
        tasks = Counter(task for e in method.evaluations for task in e.results["tasks"])
        if max(names.values(), default=0) > 1 and max(tasks.values()) > 1:
            warnings.append(f"{method.name}: '{names.most_common(1)[0][0]}' is evaluated more "
                            "than once; another evaluation of one model is no second seed.")
    return warnings


# ----- parts --------------------------------------------------------------------------------


def _same(parts: Sequence[Any], what: str, value: Callable[[Any], Any]) -> None:
    known = [(part, value(part)) for part in parts if value(part) is not None]
    for part, other in known[1:]:
        if other != known[0][1]:
            raise TaidError(f"{what} is not the same: {_plain(known[0][1])} in "
                            f"'{known[0][0].folder}', {_plain(other)} in '{part.folder}'. Figures "
                            "of these cannot be compared.")


def _differs(parts: Sequence[Any], what: str, value: Callable[[Any], Any], so: str = "") -> str:
    for part in parts[1:]:
        if value(part) != value(parts[0]):
            return (f"Different {what}: {_plain(value(parts[0]))} ({parts[0].folder.name}), "
                    f"{_plain(value(part))} ({part.folder.name}). {so}").strip()
    return ""


def _versions(parts: Sequence[Any]) -> list[str]:
    names = dict.fromkeys(name for part in parts for name in part.versions)
    warnings = (_differs(parts, f"versions of {name}",
                         lambda part, name=name: part.versions.get(name))  # type: ignore[misc]
                for name in names)
    return [warning for warning in warnings if warning]


def _same_seeds(methods: Sequence[Method]) -> list[str]:
    warnings = []
    for method in methods:
        seeds = Counter(run.results.seed for run in method.runs)
        if len(method.runs) > 1 and max(seeds.values()) > 1:
            warnings.append(f"{method.name}: {max(seeds.values())} runs have the seed "
                            f"{seeds.most_common(1)[0][0]}, so they say little about other seeds.")
    return warnings


def _data_hash(run: Distillation) -> str | None:
    data = run.results.data["eval"]
    return None if data is None else data.sha256


def _teacher(run: Distillation) -> str | None:
    teacher = run.results.models.get("teacher")
    if teacher is None or teacher.quantization is None:
        return None if teacher is None else teacher.name
    return f"{teacher.name} in {teacher.quantization}"


def _inside(tree: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
