"""`taid-vlm init`: a recipe to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from taid_vlm.commands.options import Options, option, positional
from taid_vlm.errors import TaidError


class InitOptions(Options):
    recipe: Path = positional("YAML file to write")
    teacher: str = option("folder or hub name", "MODEL", ...)
    student: str = option("folder or hub name", "MODEL", ...)
    train: str = option("records: a file, a folder or a hub name", "DATA", ...)
    eval: str | None = option("held-out records; without them nothing is measured", "DATA")
    train_what: Literal["full", "lora", "projector"] = option(
        "all weights (the default), an adapter, or the projector alone", default="full")


def run(options: InitOptions) -> None:
    from taid_vlm.config.init import init_recipe
    from taid_vlm.io.files import write_text

    path = options.recipe
    if path.exists():
        raise TaidError(f"'{path}' is there already; choose another name.")
    write_text(init_recipe(**options.model_dump(exclude={"recipe"})), path)
    print(f"{path} written; next: taid-vlm inspect {path}")
