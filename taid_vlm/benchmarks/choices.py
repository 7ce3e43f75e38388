"""Questions with options: how they are put, which option is right, and the rules that judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from taid_vlm.benchmarks.metrics.letters import read_option, vlmevalkit_option
from taid_vlm.benchmarks.prompts import LETTER_LINE, about_image
from taid_vlm.benchmarks.question import Judged, Question, Rule, Verdict, accuracy, one_by_one
from taid_vlm.benchmarks.rows import LETTERS, Row
from taid_vlm.errors import RecordError
from taid_vlm.evaluation.statistics import Estimate

LMMS = "EvolvingLMMs-Lab/lmms-eval 0.7.3, tasks/"  # and a file: where a rule was read
Reader = Callable[[str, Sequence[str]], str | None]
Figures = Callable[[Sequence[Judged]], dict[str, Estimate]]


def listed(options: Sequence[str], form: str = "{}. {}") -> str:
    """The options, one a line: "A. cat"."""
    return "\n".join(map(form.format, LETTERS, options))


def choice_prompt(question: str, options: Sequence[str], context: str = "",
                  line: str = LETTER_LINE) -> str:
    """Context, question, options and the line that asks for a letter, each where there is one."""
    parts = (context, question, listed(options), line)
    return "\n".join(part for part in parts if part)


def choice_question(
    row: Row, name: str, options: Sequence[str], context: str = "", text: str | None = None,
    **more: Any,
) -> list[Question]:
    """The question of a row with one image and options; `text`: the whole of it, if not as usual.
    """
    text = choice_prompt(row.text("question"), options, context) if text is None else text
    return about_image(row, name, text, letter_of(row, options), choices=tuple(options), **more)


def options_of(row: Row, *columns: str) -> tuple[str, ...]:
    """The options of a row, from a column that holds a list or from the columns A, B, C ...

    Raises:
        RecordError: fewer than two options, or more than there are letters.
    """
    held = next((column for column in columns if column in row), None)
    options = row.options() if held is None else tuple(row.texts(held))
    if not 2 <= len(options) <= len(LETTERS):
        where = f"'{held}'" if held else " or ".join([*(f"'{c}'" for c in columns), "A, B, C ..."])
        raise RecordError(f"{row.where}: {len(options)} options in {where}; there must be "
                          f"2 to {len(LETTERS)}.")
    return tuple(option.strip() for option in options)


def letter_of(row: Row, options: Sequence[str], column: str = "answer") -> str:
    """The right option's letter, which the column holds as it is or as a place from 0."""
    value, letters = row.text(column), LETTERS[:len(options)]
    if len(value) == 1 and value.upper() in letters:
        return value.upper()
    if value.removesuffix(".0").isdecimal() and row.integer(column) < len(options):
        return letters[row.integer(column)]
    raise RecordError(f"{row.where}: {column} = '{value:.60}' is none of the {len(options)} "
                      f"options; it must be A to {letters[-1]}, or 0 to {len(options) - 1}.")


# ----- rules --------------------------------------------------------------------------------


def choice_rule(name: str, reader: Reader, source: str, figures: Figures = accuracy,
                version: int = 1) -> Rule:
    """A rule that is right where the letter read is the right one; one that is no option of the
    question counts as not read."""
    def judge(question: Question, answer: str) -> Verdict:
        read = reader(answer, question.choices)
        if read is None or read not in LETTERS[:len(question.choices)]:
            return Verdict(0.0, None)
        return Verdict(float(read in question.answers), read)

    return Rule(name, version, one_by_one(judge), figures, source)


def choice_rules(
    figures: Figures = accuracy, *others: Rule, lmms: tuple[Reader, str] | None = None
) -> tuple[Rule, ...]:
    """The package's own rule (see `read_option`), others, and VLMEvalKit's without a judge.

    Args:
        figures: of all but the others.
        lmms: one of lmms-eval's rules without a judge, and the file it is from.
    """
    lmms_rules = (choice_rule("lmms", lmms[0], LMMS + lmms[1], figures),) if lmms else ()
    return (choice_rule("letter", read_option, "own: the option's letter however it is put, or the "
                        "only option whose text occurs", figures),
            *others, *lmms_rules,
            choice_rule("vlmevalkit", vlmevalkit_option, "open-compass/VLMEvalKit 0.0.20, "
                        "vlmeval/utils/matching_util.py: can_infer", figures))
