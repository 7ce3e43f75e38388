"""Questions with every model's answer, those that divide the methods first, and their images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from taid_vlm.compare.folders import Distillation, Method
from taid_vlm.compare.measures import BASE, TEACHER
from taid_vlm.config.data import DataSource, listed
from taid_vlm.config.recipe import load_recipe
from taid_vlm.errors import SampleDropped, TaidError
from taid_vlm.io.images import thumbnail
from taid_vlm.records import ImageRef, StreamedRecords, open_sources
from taid_vlm.report import Example
from taid_vlm.runs import results
from taid_vlm.runs.folders import RECIPE

logger = logging.getLogger(__name__)

SHOWN = 12  # questions of a benchmark on the page
HELD_OUT_SHOWN = 12

Images = Mapping[Any, Sequence[ImageRef]]


# ----- benchmarks ---------------------------------------------------------------------------


def benchmark_examples(
    task: str, title: str, methods: Sequence[Method], images: Images | None = None
) -> list[Example]:
    """Of every method's first seed; a third of them at most where the methods agree.

    Args:
        images: by question id; without them they are looked for where results.json says.
    """
    having = [method for method in methods if method.evaluated(task)]
    answers = {m.name: {row["id"]: row for row in m.evaluated(task)[0].answers(task)}
               for m in having}
    first = next(iter(answers.values()))
    keys = [key for key in first if all(key in rows for rows in answers.values())]
    competing = [answers[m.name] for m in having if m.trained] or list(answers.values())
    divided = {k for k in keys if len({rows[k]["score"] for rows in competing}) > 1}
    chosen = _spread([k for k in keys if k in divided], SHOWN)
    agreed = [k for k in keys if k not in divided]
    chosen += _spread(agreed, min(SHOWN - len(chosen), SHOWN // 3) if divided else SHOWN)
    if images is None:
        entry = having[0].evaluated(task)[0].results["tasks"][task]
        images = benchmark_images(entry) if chosen else {}
    return [Example(
        image=_first_image(images.get(key, ())), prompt=_plain(first[key].get("prompt", "")),
        reference=" | ".join(map(str, first[key].get("answers", ()))), category=title,
        answers={name: str(rows[key]["answer"]) for name, rows in answers.items()},
        scores={name: float(rows[key]["score"]) for name, rows in answers.items()
                if rows[key]["score"] is not None},
    ) for key in chosen]


def _spread(keys: Sequence[Any], number: int) -> list[Any]:
    """`number` of the keys, evenly spaced, so that no part of a benchmark stands for all of it."""
    if len(keys) <= number:
        return list(keys)
    return [keys[index * len(keys) // number] for index in range(number)]


def _plain(prompt: Any) -> str:
    return prompt.replace("<image>", "").strip() if isinstance(prompt, str) else \
        "".join(part for part in prompt if part)


def benchmark_images(entry: Mapping[str, Any]) -> Images:
    """The images of its questions by id, if the benchmark and its data are still what they were."""
    from taid_vlm.benchmarks.reading import read_questions
    from taid_vlm.benchmarks.registry import find_benchmark
    from taid_vlm.benchmarks.store import data_hash

    source = entry.get("source") or {}
    if not isinstance(source.get("path"), str):  # of several files no one hash is known
        return {}
    path = Path(source["path"]).expanduser()
    try:
        if not source.get("sha256") or data_hash(path) != source["sha256"]:
            return {}
        data = DataSource(path=str(path), split=source.get("split") or "train",
                          max_records=source.get("max_records"))
        questions = read_questions(find_benchmark(entry.get("benchmark", "")), data)
    except TaidError as error:
        logger.warning("No images of '%s': %s", path, error)
        return {}
    return {question.id: question.images for question in questions}


# ----- distillation runs --------------------------------------------------------------------


def held_out_examples(methods: Sequence[Method]) -> list[Example]:
    """The questions that every run was asked after training, answered by the first seeds."""
    runs = {method.name: method.runs[0] for method in methods if method.runs}
    examples = {name: {(e.source, e.turn): e for e in run.results.examples}
                for name, run in runs.items()}
    if not examples:
        return []
    first = next(iter(examples.values()))
    keys = [key for key in first if all(key in own for own in examples.values())][:HELD_OUT_SHOWN]
    images = run_images(next(iter(runs.values())), {source for source, _ in keys})
    return [Example(_first_image(images.get(key[0], ())), first[key].prompt, first[key].reference,
                    first[key].category, _answers(key, examples)) for key in keys]


def _answers(
    key: tuple[str, int], examples: Mapping[str, Mapping[Any, results.Example]]
) -> dict[str, str]:
    first = next(iter(examples.values()))[key].answers
    return {**{name: first[role] for role, name in (("teacher", TEACHER), ("before", BASE))
               if role in first},
            **{name: own[key].answers["after"] for name, own in examples.items()}}


def run_images(run: Distillation, wanted: set[str]) -> Images:
    """Images of held-out records by their source, if the data are still there."""
    try:
        recipe = load_recipe(run.folder / RECIPE)
        sources = listed(recipe.data.eval)
        if not sources or not all(recipe.start_of(source) for source in sources):
            return {}
        records = open_sources(sources, recipe.start_of, "data.eval", weighted=False)
    except (TaidError, OSError) as error:
        logger.warning("No images of '%s': %s", run.folder, error)
        return {}
    images: dict[str, Sequence[ImageRef]] = {}
    if not isinstance(records, StreamedRecords):
        rows = (i for i in range(len(records)) if records.where(i) in wanted)
        for _, index in zip(wanted, rows, strict=False):  # the last of them ends the search
            images[records.where(index)] = records[index].images
    return images


# ----- images -------------------------------------------------------------------------------


def _first_image(images: Sequence[ImageRef]) -> bytes | None:
    if not images:
        return None
    try:
        return thumbnail(images[0].still())
    except SampleDropped:
        return None
