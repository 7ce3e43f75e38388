"""`taid-vlm merge`: an adapter and its base model as one stock checkpoint."""

from __future__ import annotations

from pathlib import Path

from taid_vlm.commands.options import Options, option, positional
from taid_vlm.config.model import Dtype


class MergeOptions(Options):
    adapter: str = positional("folder of a LoRA adapter, for example RUN/student")
    output_dir: Path = option(default=...)
    dtype: Dtype = option("of the weights (default: the base model's)", default="auto")
    dequantize: bool = option(
        "merge into a quantized base's weights as they are after rounding", default=False)


def run(options: MergeOptions) -> None:
    from taid_vlm.students.merge import merge

    print(merge(**options.model_dump()).table())
