"""`taid-vlm schema`: what an editor completes and checks recipes by."""

from __future__ import annotations

from typing import Literal

from taid_vlm.commands.options import Options, positional


class SchemaOptions(Options):
    file: Literal["recipe", "benchmark"] = positional("whose: a recipe's, or your own benchmark's")


def run(options: SchemaOptions) -> None:
    from taid_vlm.config import schema
    from taid_vlm.io.files import as_json

    print(as_json(getattr(schema, f"{options.file}_schema")()))
