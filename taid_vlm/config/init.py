"""A first recipe for two models and data, to be read and changed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from taid_vlm.config.data import FILE_TYPES
from taid_vlm.config.yaml import parse_yaml
from taid_vlm.errors import RecipeError, nearest, nearest_sibling

Trained = Literal["full", "lora", "projector"]
# a learning rate that is safe to begin with, and whose it is
RATES: dict[str, tuple[str, str]] = {
    "full": ("2e-5", "all weights: what LLaVA-1.5 and Vicuna were tuned with"),
    "lora": ("1e-4", "an adapter: as in ms-swift's and LLaMA-Factory's examples for Qwen-VL"),
    "projector": ("1e-3", "the projector alone: LLaVA's first stage"),
}
PEFT = """
  peft:                    # an adapter only; student/ then holds the adapter
    r: 16
    lora_alpha: 32
    target_modules: all-linear"""
FREEZE = """
  # a student whose head is tied to its input embeddings has no part of the name 'head'
  freeze: [tower, language_model, head]"""
CUT = """
  # for one that lost layers (shrink) 5e-4 was better than 2e-4: benchmarks/real_pairs.md"""
EVAL = """
  eval_strategy: steps
  eval_steps: 200"""


def init_recipe(
    teacher: str, student: str, train: str, eval: str | None = None, train_what: Trained = "full"
) -> str:
    """A recipe in YAML, with comments, that `load_recipe` takes.

    Args:
        teacher, student: folders or hub names.
        train, eval: files, folders or hub names.
        train_what: everything, a LoRA adapter, or the projector alone.

    Raises:
        RecipeError: a path that does not exist, with the nearest that does.
    """
    if train_what not in RATES:
        raise RecipeError(f"train_what = {train_what!r}.{nearest(train_what, RATES)}")
    names = {"teacher": teacher, "student": student, "train": train, "eval": eval}
    for key, value in names.items():
        if value is not None:
            _check(key, value)
    rate, source = RATES[train_what]
    page = Path(__file__).with_name("first.yaml").read_text(encoding="utf-8")
    return page.format(
        teacher=_scalar(teacher), student=_scalar(student), train=_scalar(train),
        eval_data=f"  eval: {_scalar(eval)}" if eval is not None else
        "  # eval: held_out.jsonl  # without it nothing is measured",
        rate=rate, source=source, cut=CUT if train_what == "full" else "",
        peft=PEFT if train_what == "lora" else "",
        freeze=FREEZE if train_what == "projector" else "",
        evaluation=EVAL if eval is not None else "",
        output=_scalar(f"runs/{Path(student).absolute().name}"))


def _check(key: str, value: str) -> None:
    """A path has to exist; what looks like a hub name may not."""
    path = Path(value).expanduser()
    beside = path.parent != Path(".") and path.parent.is_dir()
    hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", value) and path.suffix not in FILE_TYPES
    if not path.exists() and (beside or not hub):
        raise RecipeError(f"{key}: '{value}' does not exist.{nearest_sibling(path)}")


def _scalar(value: str) -> str:
    """A text as YAML reads it back, in quotes where it needs them."""
    plain = re.fullmatch(r"[\w.~/][\w.~/-]*", value) and parse_yaml(value) == value
    return value if plain else json.dumps(value, ensure_ascii=False)
