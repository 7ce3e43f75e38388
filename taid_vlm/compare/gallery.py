"""Questions with every model's answer, those that divide the methods first, and their images."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from taid_vlm.compare.folders import Distillation, Method
from taid_vlm.compare.measures import BASE, TEACHER
from taid_vlm.config.data import DataSource
from taid_vlm.config.recipe import load_recipe
from taid_vlm.errors import SampleDropped, TaidError
from taid_vlm.records import ImageRef, Records, open_records
from taid_vlm.report import Example

logger = logging.getLogger(__name__)

SHOWN = 12  # questions of a benchmark on the page
HELD_OUT_SHOWN = 12
LARGEST = 320  # pixels of an image on the page, in either direction
LOSSLESS = 160  # images no larger are small drawings rather than photographs

Images = Mapping[Any, Sequence[ImageRef]]


# ----- benchmarks ---------------------------------------------------------------------------


def benchmark_examples(task: str, title: str, methods: Sequence[Method]) -> list[Example]:
    """Of every method's first seed; a third of them at most where the methods agree."""
    having = [method for method in methods if method.evaluated(task)]
    found = {m.name: {row["id"]: row for row in m.evaluated(task)[0].answers(task)}
             for m in having}
    first = next(iter(found.values()))
    keys = [key for key in first if all(key in rows for rows in found.values())]
    competing = [found[m.name] for m in having if m.trained] or list(found.values())
    divided = {k for k in keys if len({rows[k]["score"] for rows in competing}) > 1}
    chosen = _spread([k for k in keys if k in divided], SHOWN)
    agreed = [k for k in keys if k not in divided]
    chosen += _spread(agreed, min(SHOWN - len(chosen), SHOWN // 3) if divided else SHOWN)
    images = benchmark_images(having[0].evaluated(task)[0].results["tasks"][task]) if chosen else {}
    return [Example(
        image=_first_image(images.get(key, ())), prompt=_plain(first[key].get("prompt", "")),
        reference=" | ".join(map(str, first[key].get("answers", ()))), category=title,
        answers={name: str(rows[key]["answer"]) for name, rows in found.items()},
        scores={name: float(rows[key]["score"]) for name, rows in found.items()
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
    path = Path(source.get("path") or "").expanduser()
    try:
        if not (source.get("path") and source.get("sha256")) or data_hash(path) != source["sha256"]:
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
    found = {name: {(e["source"], e["turn"]): e for e in run.results.get("examples", [])}
             for name, run in runs.items()}
    if not found:
        return []
    first = next(iter(found.values()))
    keys = [key for key in first if all(key in given for given in found.values())]
    images = run_images(next(iter(runs.values())))
    return [_held_out_example(key, found, images) for key in keys[:HELD_OUT_SHOWN]]


def _held_out_example(
    key: tuple[str, int], found: Mapping[str, Mapping[Any, Mapping[str, Any]]], images: Images
) -> Example:
    first = next(iter(found.values()))[key]
    answers = {name: first["answers"][role] for role, name in (("teacher", TEACHER),
                                                               ("before", BASE))
               if role in first["answers"]}
    answers |= {name: given[key]["answers"]["after"] for name, given in found.items()}
    return Example(_first_image(images.get(key[0], ())), first["prompt"], first["reference"],
                   first["category"], answers)


def run_images(run: Distillation) -> Images:
    """Images of the held-out records by their source, if the data are still there."""
    try:
        recipe = load_recipe(run.folder / "recipe.yaml")
        source = recipe.data.eval
        if source is None or not Path(source.path).exists():
            return {}
        records = open_records(source, recipe.start_of(source))
    except (TaidError, OSError) as error:
        logger.warning("No images of '%s': %s", run.folder, error)
        return {}
    wanted = {example["source"] for example in run.results.get("examples", [])}
    return _images_of(records, wanted) if isinstance(records, Records) else {}


def _images_of(records: Records, wanted: set[str]) -> Images:
    found: dict[str, Sequence[ImageRef]] = {}
    for index in range(len(records)):
        if len(found) == len(wanted):
            break
        if records.where(index) in wanted:
            found[records.where(index)] = records[index].images
    return found


# ----- images -------------------------------------------------------------------------------


def _first_image(images: Sequence[ImageRef]) -> bytes | None:
    if not images:
        return None
    try:
        return thumbnail(images[0].load())
    except SampleDropped:
        return None


def thumbnail(image: Image.Image) -> bytes:
    """Small enough for a page that holds many: PNG for small drawings, JPEG for the others."""
    buffer = io.BytesIO()
    if max(image.size) <= LOSSLESS:
        image.save(buffer, "PNG")
        return buffer.getvalue()
    image = image.copy()
    image.thumbnail((LARGEST, LARGEST))
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
