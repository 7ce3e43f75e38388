"""`taid-vlm shrink`: a student from its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from taid_vlm.commands.options import Numbers, Options, option, positional


class ShrinkOptions(Options):
    teacher: str = positional("folder or hub name, of a VLM or a text LLM")
    output_dir: Path = option(default=...)
    layers: int | None = option("how many layers of the language model to keep", "N")
    choose: Literal["even", "importance"] = option(
        "which: evenly spaced (the default), or those that change the hidden state most on "
        "--calibration", default="even")
    calibration: str | None = option("records, as data.train of a recipe", "DATA")
    calibration_records: int = option("how many of them (default 64)", "N", 64)
    keep: Numbers | None = option("exactly these layers, counted from 0", "I,J,...")
    tower_layers: int | None = option(
        "how many layers of the vision tower to keep, evenly spaced", "N")
    image_tokens: int | None = option("how many tokens an image (or tile) becomes", "N")
    revision: str = option("hub revision of the teacher", default="main")
    chat_template: str | None = option("jinja file, if it has none", "FILE")


def run(options: ShrinkOptions) -> None:
    from taid_vlm.config.model import ModelSpec
    from taid_vlm.students.shrink import shrink

    teacher = ModelSpec(model_name_or_path=options.teacher, revision=options.revision, dtype="auto",
                        chat_template=options.chat_template)
    rest = options.model_dump(exclude={"teacher", "revision", "chat_template"})
    print(shrink(teacher, **rest).table())
