"""MATH-Vision: competition problems with a picture; answers are a letter or a value."""

from __future__ import annotations

from taid_vlm.benchmarks.choices import letter_of, listed, options_of
from taid_vlm.benchmarks.metrics.math_vision import OFFICIAL, OPTIONS
from taid_vlm.benchmarks.prompts import about_image
from taid_vlm.benchmarks.question import Benchmark, Question
from taid_vlm.benchmarks.rows import Row

TASK = ('Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a '
        'multiple choice question, only one letter is allowed in the "\\boxed{}".\n')


def read(row: Row) -> list[Question]:
    """One question; options that are no more than letters in the picture are not written out.

    VLMEvalKit's table calls options `choices` and the subject `category`.
    """
    held = row.first("options", "choices")
    choices = options_of(row, held) if row.texts(held) else ()
    shown = f"{listed(choices, '({}) {}')}\n" if "".join(choices) not in ("", OPTIONS) else ""
    tags = {"level": str(row.integer("level"))} if "level" in row else {}
    return about_image(
        row, row.id("id", "index"), f"{TASK}{row.text('question')}\n{shown}",
        letter_of(row, choices) if choices else row.text("answer"), choices=choices,
        image=row.first("decoded_image", "image"),
        tags={**tags, "subject": row.text(row.first("subject", "category"))})


BENCHMARK = Benchmark("math_vision", "MATH-Vision", read, (OFFICIAL,),
                      hub=("MathLLMs/MathVision", None, "test"), max_new_tokens=2048)
