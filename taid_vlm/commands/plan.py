"""`taid-vlm plan`: how much memory a recipe needs."""

from __future__ import annotations

from taid_vlm.commands.options import option
from taid_vlm.commands.recipes import RecipeOptions
from taid_vlm.errors import TaidError


class PlanOptions(RecipeOptions):
    memory: str | None = option("of one device, for example 24GB or 80GiB", "SIZE")
    processes: int = option("of a data-parallel run, one per device", "N", 1)
    json_: bool = option("print JSON instead of text", default=False)


def run(options: PlanOptions) -> None:
    recipe = options.load()

    from tqdm.auto import tqdm

    from taid_vlm.plan.advice import advise
    from taid_vlm.plan.plan import Seen, plan_recipe
    from taid_vlm.plan.sizes import parse_bytes
    from taid_vlm.plan.text import as_json, as_text, human

    memory = None if options.memory is None else parse_bytes(options.memory)
    seen: Seen = {}
    with tqdm(unit=" plans", leave=False, disable=None) as bar:
        def progress(what: str) -> None:
            bar.set_description(what)
            bar.update()

        bar.set_description("the recipe as it is")
        plans = plan_recipe(recipe, options.processes, seen)
        advice = None if memory is None else advise(
            options.load, plans, memory, options.processes, seen, progress)
    print((as_json if options.json_ else as_text)(plans, advice))
    if advice is not None and not advice.fits:
        raise TaidError(f"--memory = '{options.memory}', but this recipe needs "
                        f"{human(advice.peak)} on each device.")
