"""`taid-vlm inspect`: the pair doctor."""

from __future__ import annotations

import sys
from pathlib import Path

from taid_vlm.commands.options import option
from taid_vlm.commands.recipes import RecipeOptions
from taid_vlm.errors import TaidError


class InspectOptions(RecipeOptions):
    record: int = option("which training record is shown token by token, from 0", "N", 0)
    all: bool = option(
        "go over all records: how many are left out, how long they are", default=False)
    measure_quantization: int | None = option(
        "load the teacher as it is, then quantized, and compare both on the first training "
        "records", "N")
    html: Path | None = option("write the same as a page", "FILE")
    json_: bool = option("print JSON instead of text", default=False)


def run(options: InspectOptions) -> None:
    recipe = options.load()

    from taid_vlm.doctor.doctor import inspect_recipe
    from taid_vlm.doctor.page import write_page
    from taid_vlm.doctor.text import as_text

    inspection = inspect_recipe(recipe, options.record, everything=options.all,
                                measured=options.measure_quantization)
    if options.html is not None:
        write_page(inspection, options.html)
    print(inspection.to_json() if options.json_ else
          as_text(inspection, colour=sys.stdout.isatty()))
    if inspection.problem:
        raise TaidError(inspection.problem)
