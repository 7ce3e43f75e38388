"""A benchmark of your own, in a few lines of YAML:

    type: multiple_choice            # or short_answer, number, relaxed, anls, yes_no, caption
    data: charts.jsonl               # JSONL, JSON, Parquet, CSV, TSV, a folder or a hub name
    columns: {question: query, answer: label}        # ours: yours, where they differ
    prompt: "{question}\\n{options}\\nAnswer with the option's letter."
    tags: [category]                 # columns that figures are split by

Columns: `question`, `answer`, `image` (or `images`), `video`, `id`, `group` (questions about one
item) and `options` (a list, or the columns A, B, C ...). An answer is an option's letter, its place
from 0 or its text; yes or no; or one accepted text or a list of them ("number": "$1,250", "10 %",
"3/4 cup"). A prompt may name any column;
where `<image>` stands in it (or in a question) an image is shown, otherwise the images come first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taid_vlm.benchmarks.choices import choice_rules, letter_of, listed, options_of
from taid_vlm.benchmarks.metrics import yes_no
from taid_vlm.benchmarks.metrics.captions import CIDER, PROMPT
from taid_vlm.benchmarks.metrics.numbers import (
    LAST_NUMBER,
    anls_rule,
    number_rule,
    read_quantity,
    relaxed_rule,
    text_rule,
)
from taid_vlm.benchmarks.metrics.text import EXACT_MATCH
from taid_vlm.benchmarks.prompts import LETTER_LINE, NUMBER_LINE, SHORT_LINE
from taid_vlm.benchmarks.question import Benchmark, Question, Rule
from taid_vlm.benchmarks.rows import LETTERS, Row
from taid_vlm.config.benchmark import BenchmarkSpec, prompt_pieces
from taid_vlm.config.section import check
from taid_vlm.config.yaml import read_yaml
from taid_vlm.errors import RecipeError, RecordError
from taid_vlm.records import ImageRef, parse_record


def load_benchmark(path: str | Path) -> Benchmark:
    """Read and check a benchmark's YAML file; its data are not looked at yet.

    Raises:
        RecipeError: with file, key, value and what would be valid.
    """
    path = Path(path)
    tree = read_yaml(path, "benchmark")
    if isinstance(tree, dict) and tree.get("name") is None:
        tree["name"] = path.stem
    try:
        spec = check(BenchmarkSpec, tree, "benchmark")
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    assert spec.name is not None
    kind = KINDS[spec.type]
    missing: list[RecordError] = []
    return Benchmark(
        spec.name, spec.title or spec.name, lambda row: [_question(spec, row, missing)],
        _rules(spec, kind, path),
        hub=(_place(spec.data, path.parent), spec.subset, spec.split),
        max_new_tokens=spec.max_new_tokens or kind.max_new_tokens, likelihood=kind.likelihood,
        complete=lambda questions: _with_some_image(questions, missing), file=str(path.resolve()))


def _rules(spec: BenchmarkSpec, kind: Kind, path: Path) -> tuple[Rule, ...]:
    """The type's rules, or the one with the places and the tolerance that the file names."""
    options: dict[str, Any] = {"final": spec.final, "tolerance": spec.tolerance}
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in kind.options:
            types = [name for name, other in KINDS.items() if key in other.options]
            raise RecipeError(f"{path}: {key} has no effect on a benchmark of type {spec.type}; it "
                              f"is for {', '.join(types)}.")
    if LAST_NUMBER in given.get("final", ()) and spec.type != "number":
        raise RecipeError(f"{path}: final: {LAST_NUMBER} is for the type number.")
    names = {"final": "places", "tolerance": "tolerance"}
    return (kind.rule(**{names[key]: value for key, value in given.items()}),) if given and \
        kind.rule else kind.rules


def _place(data: str, folder: Path) -> str:
    """Where the data lie; a name of the hub as it is."""
    given = Path(data).expanduser()
    found = next((path for path in (given, folder / given) if path.exists()), None)
    return data if found is None else str(found.resolve())


# ----- one row ------------------------------------------------------------------------------


def _question(spec: BenchmarkSpec, row: Row, missing: list[RecordError]) -> Question:
    choices, answers = KINDS[spec.type].answers(row, spec)
    images = _images(row, spec, missing)
    text = "".join(literal + ("" if name is None else _filled(name, row, spec, choices))
                   for literal, name in prompt_pieces(spec.prompt or KINDS[spec.type].prompt))
    places = {kind: [str(i) for i, image in enumerate(images) if image.kind == kind]
              for kind in ("image", "video")}  # only where they stand is asked for
    record = parse_record({"messages": [{"role": "user", "content": text}],
                           "images": places["image"], "videos": places["video"]}, row.where)
    return Question(
        id=row.id(spec.column("id")), prompt=record.messages[0].parts,
        images=tuple(images[int(str(place.value))] for place in record.images),
        answers=answers, choices=choices, tags={tag: row.text(tag) for tag in spec.tags},
        group=row.text(spec.column("group"), ""))


def _filled(name: str, row: Row, spec: BenchmarkSpec, choices: tuple[str, ...]) -> str:
    return listed(choices) if name == "options" and choices else row.text(spec.column(name))


def _images(row: Row, spec: BenchmarkSpec, missing: list[RecordError]) -> tuple[ImageRef, ...]:
    """A row's images; a row without any is asked without, and why goes to `missing`."""
    if not spec.images:
        return ()
    video = spec.column("video")
    if video in row:
        return (*row.images(spec.column("image")), row.video(row[video]))
    column = spec.column("image") if "image" in spec.columns else row.first("image", "images")
    try:
        row.need(column)
    except RecordError as problem:
        missing.append(problem)
    return row.images(column)


def _with_some_image(questions: list[Question], missing: list[RecordError]) -> list[Question]:
    """Where no row has an image, the column has another name."""
    problems = missing.copy()
    missing.clear()
    if problems and not any(question.images for question in questions):
        raise problems[0]
    return questions


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


def _numbers(row: Row, spec: BenchmarkSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    column = spec.column("answer")
    golds = row.golds(column)
    for gold in golds:
        if read_quantity(gold) is None:
            raise RecordError(f"{row.where}: {column} = '{gold:.60}' is no number; a benchmark of "
                              "numbers and texts is of the type relaxed.")
    return (), golds


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
    rule: Callable[..., Rule] | None = None  # of the keys in `options`
    options: tuple[str, ...] = ()


KINDS = {
    "multiple_choice": Kind("{question}\n{options}\n" + LETTER_LINE, choice_rules(), _chosen,
                            likelihood=True),
    "short_answer": Kind("{question}\n" + SHORT_LINE, (EXACT_MATCH,), _texts, rule=text_rule,
                         options=("final",)),
    "number": Kind("{question}\n" + NUMBER_LINE, (number_rule(),), _numbers, rule=number_rule,
                   options=("final", "tolerance")),
    "relaxed": Kind("{question}\n" + SHORT_LINE, (relaxed_rule(),), _texts, rule=relaxed_rule,
                    options=("final", "tolerance")),
    "anls": Kind("{question}\n" + SHORT_LINE, (anls_rule(),), _texts, rule=anls_rule,
                 options=("final",)),
    "yes_no": Kind("{question}\nPlease answer yes or no.", (yes_no.WORD,), _yes_or_no),
    "caption": Kind(PROMPT, (CIDER,), _texts, max_new_tokens=64),
}
