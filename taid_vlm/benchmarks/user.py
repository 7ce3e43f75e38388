"""A benchmark of your own, in a few lines of YAML:

    type: multiple_choice            # or short_answer, yes_no, caption
    data: charts.jsonl               # JSONL, JSON, Parquet, CSV, TSV, a folder or a hub name
    columns: {question: query, answer: label}        # ours: yours, where they differ
    prompt: "{question}\\n{options}\\nAnswer with the option's letter."
    tags: [category]                 # columns that figures are split by

Columns: `question`, `answer`, `image` (or `images`), `id`, `group` (questions about one item) and
`options` (a list, or the columns A, B, C ...). An answer is an option's letter, its place from 0 or
its text; yes or no; or one accepted text or a list of them. A prompt may name any column; where
`<image>` stands in it (or in a question) an image is shown, otherwise the images come first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

from taid_vlm.benchmarks.choices import choice_rules, letter_of, listed, options_of
from taid_vlm.benchmarks.metrics import yes_no
from taid_vlm.benchmarks.metrics.captions import CIDER, PROMPT
from taid_vlm.benchmarks.metrics.text import EXACT_MATCH
from taid_vlm.benchmarks.prompts import LETTER_LINE, SHORT_LINE
from taid_vlm.benchmarks.question import Benchmark, Question, Rule
from taid_vlm.benchmarks.rows import LETTERS, Row
from taid_vlm.errors import RecipeError, RecordError, nearest
from taid_vlm.records import ImageRef, parse_record
from taid_vlm.runs.recipe import build, known, read_yaml

COLUMNS = ("answer", "group", "id", "image", "options", "question")


@dataclass(frozen=True)
class BenchmarkSpec:
    """What the YAML file says; see the module's head.

    Args:
        type: one of KINDS.
        data: a path (from the working directory, or, if nothing is there, from the file's
            folder) or a name on the hub, with `split` and `subset` (its configuration).
        name: what results call it (default: the file's name).
        images: false for questions of text alone; otherwise every question must have an image.
    """

    type: str
    data: str
    split: str = "train"
    subset: str | None = None
    name: str | None = None
    title: str | None = None
    prompt: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Any = ()
    images: bool = True
    max_new_tokens: int | None = None

    def column(self, ours: str) -> str:
        """What the data call a column."""
        return self.columns.get(ours, ours)


def load_benchmark(path: str | Path) -> Benchmark:
    """Read and check a benchmark's YAML file; its data are not looked at yet.

    Raises:
        RecipeError: with file, key, value and what would be valid.
    """
    path = Path(path)
    tree = read_yaml(path, "benchmark")
    try:
        spec = build(BenchmarkSpec, tree, "benchmark")
        _check(spec)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    name = spec.name or path.stem
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise RecipeError(f"{path}: name = {name!r}, but it must be letters, digits, '_', '-' and "
                          "'.' (it names a file).")
    kind = KINDS[spec.type]
    return Benchmark(
        name, spec.title or name, lambda row: [_question(spec, row)], kind.rules,
        hub=(_place(spec.data, path.parent), spec.subset, spec.split),
        max_new_tokens=spec.max_new_tokens or kind.max_new_tokens, likelihood=kind.likelihood,
        file=str(path.resolve()))


def _check(spec: BenchmarkSpec) -> None:
    if spec.type not in KINDS:
        raise RecipeError(f"type = '{spec.type}'.{nearest(spec.type, KINDS)}")
    known(spec.columns, COLUMNS, "columns")
    for key, column in spec.columns.items():
        if not isinstance(column, str):
            raise RecipeError(f"columns.{key} = {column!r}, but it must be a column's name.")
    if not isinstance(spec.tags, (list, tuple)) or not all(isinstance(t, str) for t in spec.tags):
        raise RecipeError(f"tags = {spec.tags!r}, but it must be a list of columns.")
    if spec.max_new_tokens is not None and spec.max_new_tokens < 1:
        raise RecipeError(f"max_new_tokens = {spec.max_new_tokens}, but it must be at least 1.")
    if not (spec.prompt is None or spec.prompt.strip()):
        raise RecipeError("prompt is blank; leave it out for the usual one.")
    _pieces(spec)


def _pieces(spec: BenchmarkSpec) -> list[tuple[str, str | None]]:
    """The prompt as (text, column that follows or None)."""
    try:
        parsed = list(Formatter().parse(spec.prompt or KINDS[spec.type].prompt))
    except ValueError as error:
        raise RecipeError(f"prompt: {error}; write {{{{ and }}}} for braces.") from None
    for _, name, form, conversion in parsed:
        if name is not None and (form or conversion or not name.strip()):
            raise RecipeError(f"prompt: {{{name}{':' if form else ''}{form}}} must be a column's "
                              "name alone; write {{ and }} for braces.")
    return [(text, name) for text, name, _, _ in parsed]


def _place(data: str, folder: Path) -> str:
    """Where the data lie; a name of the hub as it is."""
    given = Path(data).expanduser()
    found = next((path for path in (given, folder / given) if path.exists()), None)
    return data if found is None else str(found.resolve())


# ----- one row ------------------------------------------------------------------------------


def _question(spec: BenchmarkSpec, row: Row) -> Question:
    choices, answers = KINDS[spec.type].answers(row, spec)
    images = _images(row, spec)
    text = "".join(literal + ("" if name is None else _filled(name, row, spec, choices))
                   for literal, name in _pieces(spec))
    places = [image.source for image in images]  # only where they stand is asked for
    record = parse_record({"messages": [{"role": "user", "content": text}], "images": places},
                          row.where)
    return Question(
        id=row.id(spec.column("id")), prompt=record.messages[0].parts, images=images,
        answers=answers, choices=choices, tags={tag: row.text(tag) for tag in spec.tags},
        group=row.text(spec.column("group"), ""))


def _filled(name: str, row: Row, spec: BenchmarkSpec, choices: tuple[str, ...]) -> str:
    return listed(choices) if name == "options" and choices else row.text(spec.column(name))


def _images(row: Row, spec: BenchmarkSpec) -> tuple[ImageRef, ...]:
    if not spec.images:
        return ()
    column = spec.column("image") if "image" in spec.columns else row.first("image", "images")
    row.need(column)
    return row.images(column)


def _chosen(row: Row, spec: BenchmarkSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The options, and the letter of the right one."""
    options, column = options_of(row, spec.column("options")), spec.column("answer")
    value = row.text(column)
    by_text = [letter for letter, option in zip(LETTERS, options, strict=False) if option == value]
    try:
        letter = letter_of(row, options, column)
    except RecordError:
        if len(by_text) != 1:
            raise
        letter = by_text[0]
    if by_text and letter not in by_text:
        raise RecordError(f"{row.where}: {column} = '{value}' is option {by_text[0]} by its text, "
                          f"but {letter} as a letter or a place from 0; write '{by_text[0]}' or "
                          f"'{letter}'.")
    return options, (letter,)


def _texts(row: Row, spec: BenchmarkSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (), row.golds(spec.column("answer"))


def _yes_or_no(row: Row, spec: BenchmarkSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    value = row.text(spec.column("answer"))
    value = {"true": "yes", "false": "no"}.get(value.lower(), value)
    return (), (yes_no.right_answer(value, row.where),)


@dataclass(frozen=True)
class Kind:
    """What a type of benchmark brings along; answers: a row's options and accepted answers."""

    prompt: str
    rules: tuple[Rule, ...]
    answers: Callable[[Row, BenchmarkSpec], tuple[tuple[str, ...], tuple[str, ...]]]
    max_new_tokens: int = 32
    likelihood: bool = False


KINDS = {
    "multiple_choice": Kind("{question}\n{options}\n" + LETTER_LINE, choice_rules(), _chosen,
                            likelihood=True),
    "short_answer": Kind("{question}\n" + SHORT_LINE, (EXACT_MATCH,), _texts),
    "yes_no": Kind("{question}\nPlease answer yes or no.", (yes_no.WORD,), _yes_or_no),
    "caption": Kind(PROMPT, (CIDER,), _texts, max_new_tokens=64),
}
