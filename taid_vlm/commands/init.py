"""`taid-vlm init`: a recipe to begin with."""

from __future__ import annotations

from pathlib import Path

from taid_vlm.commands.options import Options, option, positional
from taid_vlm.errors import TaidError

REST = """\
objective: {name: taid}
train:                              # keys of transformers' TrainingArguments, and a few more
  num_train_epochs: 1
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 8
  learning_rate: 1e-5
  lr_scheduler_type: cosine
  warmup_steps: 0.03                # a share of all steps
  # bf16: true                      # on a GPU
  # gradient_checkpointing: true    # less memory, more time
"""


class InitOptions(Options):
    recipe: Path = positional("YAML file to write")
    teacher: str | None = option("folder or hub name; without one, SFT on the answers", "MODEL")
    student: str = option("folder or hub name", "MODEL", ...)
    train: str = option(
        "records: JSONL, Parquet, CSV, a folder of images, or a hub name", "DATA", ...)
    eval: str | None = option("held-out records; without them nothing is measured", "DATA")


def run(options: InitOptions) -> None:
    import yaml

    from taid_vlm.io.files import write_text

    path = options.recipe
    if path.exists():
        raise TaidError(f"'{path}' is there already; choose another name.")
    models, data = (options.model_dump(include=names, exclude_none=True)
                    for names in ({"teacher", "student"}, {"train", "eval"}))
    rest = REST if options.teacher else REST.replace("name: taid", "name: ce")
    tree = yaml.safe_dump({**models, "data": data}, sort_keys=False, allow_unicode=True)
    end = yaml.safe_dump({"output_dir": f"runs/{path.stem}"}, allow_unicode=True)
    write_text(tree + rest + end, path)
    print(f"{path} written; next: taid-vlm inspect {path}")
