"""The keys of transformers' TrainingArguments, read from its source: importing it takes seconds."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Argument:
    """One key: the kinds of its annotation ("int", "None", ...), default and help as written."""

    kinds: tuple[str, ...]
    default: Any = None
    help: str = ""


@cache
def trainer_arguments() -> dict[str, Argument]:
    """Every key of the installed transformers' TrainingArguments."""
    spec = importlib.util.find_spec("transformers")
    folder = Path(str(spec and spec.origin)).parent
    tree = ast.parse((folder / "training_args.py").read_text(encoding="utf-8"))
    found = [node for node in tree.body
             if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"]
    if not found or found[0].bases:  # not all of its keys are written here
        from transformers import TrainingArguments

        return {field.name: Argument(("Any",)) for field in fields(TrainingArguments) if field.init}
    return dict(_arguments(found[0].body))


def _arguments(body: list[ast.stmt]) -> Iterator[tuple[str, Argument]]:
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            facts = {word.arg: word.value for word in getattr(node.value, "keywords", ())}
            metadata: Any = facts.get("metadata", ast.Dict([], []))
            told = zip(metadata.keys, metadata.values, strict=True)
            help = [_literal(value) for key, value in told if _literal(key) == "help"]
            yield node.target.id, Argument(
                tuple(_kinds(node.annotation)), _literal(facts.get("default")), *help)


def _kinds(annotation: ast.expr) -> Iterator[str]:
    """`int | None` -> int, None; `list[str]` -> list."""
    if isinstance(annotation, ast.BinOp):
        yield from _kinds(annotation.left)
        yield from _kinds(annotation.right)
    else:
        yield ast.unparse(annotation).partition("[")[0]


def _literal(node: ast.expr | None) -> Any:
    """What is written, or None where it has to be worked out."""
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None
