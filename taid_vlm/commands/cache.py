"""`taid-vlm cache`: a teacher's hidden states on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from taid_vlm.commands.options import option, say_and_part
from taid_vlm.commands.recipes import RecipeOptions
from taid_vlm.errors import TaidError

INTERRUPTED = "; the same command goes on after the shards that are whole"


class CacheOptions(RecipeOptions):
    output: Path = option("new, or of a build that was interrupted", "FOLDER", ...)
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "of the hidden states on disk; auto: as the teacher gives them, which loses nothing",
        default="auto")
    signal: Literal["hidden", "topk", "sampled"] = option(
        "what is kept of data.train: hidden states (exact), the k most likely tokens with the rest "
        "of the mass, or k sampled ones (of data.eval always hidden states)", default="hidden")
    k: PositiveInt | None = option("tokens of topk (64) or sampled (12)", "N")
    teacher: str | None = option(
        "of a recipe with several teachers: which one is asked, about its own records", "NAME")
    batch_size: PositiveInt | None = option(
        "records at a time (default: train.per_device_eval_batch_size)", "N")


def run(options: CacheOptions) -> None:
    recipe = options.load()

    from taid_vlm.runs.cache import build_cache
    from taid_vlm.teachers.sparse import DEFAULT_K, Signal

    if options.k is not None and options.signal == "hidden":
        raise TaidError(f"--k = {options.k} has no effect on --signal hidden.")
    signal = Signal(options.signal, options.k or DEFAULT_K.get(options.signal, 0))
    built = build_cache(recipe, options.output, options.dtype, options.batch_size, signal=signal,
                        teacher=options.teacher)
    say_and_part(lambda: str(built))
