"""docs/reference.md: every key that a user can write, from the classes that check them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from taid_vlm.config.benchmark import BenchmarkSpec, Columns
from taid_vlm.config.data import DataSource, DataSpec, VideoSpec
from taid_vlm.config.evaluation import EvaluateSpec
from taid_vlm.config.model import ServerSpec, StudentSpec, TeacherSpec
from taid_vlm.config.objective import TERMS, Common, OnPolicy, Term, TokenWeights
from taid_vlm.config.recipe import Recipe, StageSpec
from taid_vlm.config.sampling import EngineSpec
from taid_vlm.config.training import ELSEWHERE, WITHOUT_EFFECT, TrainSpec

HEAD = """\
# Reference

Every key of a recipe and of a benchmark's file, and every option of a command, from the classes
that check them: an unknown one is refused with the nearest valid one, and no value is turned into
another kind (but 1e3 is a fine whole number).
"""
SECTIONS: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("A recipe", "", Recipe),
    ("`student`", "A text alone is `model_name_or_path`.", StudentSpec),
    ("`teacher`", "A text alone is `model_name_or_path`.", TeacherSpec),
    ("`teacher.server`", "Instead of weights in this process; `teacher.processor_name_or_path` "
     "then says where the configuration and the processor are.", ServerSpec),
    ("`data`", "", DataSpec),
    ("`data.train` and `data.eval`", "A text alone is `path`.", DataSource),
    ("`data.video`", "", VideoSpec),
    ("`objective`", "`name` with the keys of that loss, or `terms`: a list of losses, summed by "
     "their weights. A text alone is `name`. Beside either:", Common),
    ("`objective.token_weights`", "A text alone is `name`.", TokenWeights),
    ("`objective.on_policy`", "", OnPolicy),
    ("`objective.on_policy.engine`", "", EngineSpec),
    ("Every loss", "", Term),
)
_KINDS = {"string": "text", "boolean": "true or false", "integer": "whole number",
          "number": "number", "object": "mapping"}
_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def reference_page(commands: Mapping[str, type[BaseModel]] = {}) -> str:
    """The page as Markdown.

    Args:
        commands: by the name of a command, its options.
    """
    parts = [HEAD, *(_section(*section) for section in SECTIONS), _losses(),
             _section("`train`", "What distillation adds to transformers' `TrainingArguments`, and "
                      "those of them that are used often.", TrainSpec), _other_arguments(),
             _section("`evaluate`", "", EvaluateSpec),
             _section("`stages`", "A list; each stage is a whole run.", StageSpec),
             _section("A benchmark of your own", "One YAML file.", BenchmarkSpec),
             _section("`columns` of a benchmark", "", Columns)]
    parts += [_section(f"`taid-vlm {name}`", "", options, "--") for name, options in
              commands.items()]
    return "\n".join(parts)


def _section(title: str, text: str, kind: type[BaseModel], prefix: str = "") -> str:
    return "\n".join([f"## {title}", "", *([text, ""] if text else []), *_table(kind, prefix), ""])


def _table(kind: type[BaseModel], prefix: str = "", keys: Iterable[str] | None = None
           ) -> list[str]:
    schema = kind.model_json_schema()
    top = _mapping(_resolved(schema, schema.get("$defs", {})))
    rows = []
    for key, field in top["properties"].items():
        if keys is None or key in keys:
            name = f"{prefix}{key}"
            if prefix == "--":  # a command's option; what stands without its name has none
                dashed = key.rstrip("_").replace("_", "-")
                name = dashed.upper() if field.get("positional") else f"--{dashed}"
            default = "required" if key in top.get("required", ()) else _default(field)
            rows.append([f"`{name}`", _kind(field, schema.get("$defs", {})), default, _unit(field),
                         field.get("description", "")])
    return _markdown(["key", "type", "default", "unit", "meaning"], rows)


def _markdown(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def _losses() -> str:
    rows = [[f"`{name}`", ", ".join(f"`{alias}`" for alias in kind.names()[1:]),
             kind.summary().rstrip(".").replace("||", "‖")] for name, kind in TERMS.items()]
    own = [line for name, kind in TERMS.items() if kind.parameters()
           for line in _table(kind, f"{name}: ", kind.parameters())[2:]]
    return "\n".join(["## Losses", "", *_markdown(["loss", "also called", "meaning"], rows), "",
                      "Their own keys:", "", *_table(TERMS["ce"], keys=())[:2], *own, ""])


def _other_arguments() -> str:
    useless = ", ".join(f"`{name}`" for name in sorted(WITHOUT_EFFECT))
    elsewhere = ", ".join(f"`{name}` (`{place}`)" for name, place in ELSEWHERE.items())
    return ("And every other key of transformers' `TrainingArguments`, but for those that stand "
            f"elsewhere in a recipe, {elsewhere}, and those that have no effect on a distillation: "
            f"{useless}.\n")


# ----- JSON Schema in words -----------------------------------------------------------------


def _resolved(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in field:
        field = definitions[field["$ref"].rpartition("/")[2]]
    return field


def _mapping(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((s for s in schema.get("anyOf", ()) if "properties" in s), schema)


def _kind(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    field = _resolved(field, definitions)
    if "oneOf" in field:  # losses, each by its names or as a mapping; sources, of which a list
        several = any(option.get("type") == "array" for option in field["oneOf"])
        return "text, mapping or list" if several else "text or mapping"
    if "anyOf" in field:
        return " or ".join(_kind(option, definitions) for option in field["anyOf"]
                           if option.get("type") != "null")
    if "const" in field or "enum" in field:
        return ", ".join(f"`{name}`" for name in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}), definitions)}"
    limits = [f"{sign} {field[key]:g}" for key, sign in _LIMITS.items() if key in field]
    return " ".join([_KINDS.get(field.get("type", ""), "anything"), ", ".join(limits)]).strip()


def _default(field: Mapping[str, Any]) -> str:
    value = field.get("default")
    if value is None or value in ({}, []):
        return ""
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _unit(field: Mapping[str, Any]) -> str:
    inside = [option.get("unit", "") for option in field.get("anyOf", ())]
    return next(filter(None, [field.get("unit"), *inside]), "")
