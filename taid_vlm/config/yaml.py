"""YAML files that users write: strict, small, and never a trap.

1e-4 is a number, and a key may stand only once. Anchors may be used, but not to write a few lines
that stand for millions of values.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from taid_vlm.errors import RecipeError, nearest_sibling

LARGEST_FILE = 2**18  # bytes; beyond it is no recipe, but data
MOST_VALUES = 100_000  # once every alias is written out
DEEPEST = 50  # values inside values


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, and a key may stand only once."""


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that _Loader would take for numbers."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)([eE][-+]?[0-9]+)$"),
        list("-+0123456789."),
    )


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
        if name in seen and key.tag != "tag:yaml.org,2002:merge":
            raise RecipeError(f"the key '{key.value}' stands twice (line "
                              f"{key.start_mark.line + 1}).")
        seen.add(name)
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file holds; `what` it is, for the message where it cannot be read.

    Raises:
        RecipeError: no such file, a folder or a pipe, not UTF-8, or as `parse_yaml`.
    """
    try:
        if not path.is_file():
            raise RecipeError(f"{what} '{path}' {_no_file(path)}")
        if path.stat().st_size > LARGEST_FILE:
            raise RecipeError(f"{what} '{path}' is larger than {LARGEST_FILE:,} bytes; is it a "
                              "file of data?")
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8.") from None
    except OSError as error:
        raise RecipeError(f"{what} '{path}' cannot be read: {error.strerror}.") from None
    try:
        return parse_yaml(text)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def _no_file(path: Path) -> str:
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.y*ml"))
        return f"is a folder; name the YAML file{f' in it: {inside[0]}' if inside else ''}."
    if path.exists():
        return "is no regular file."
    return f"does not exist.{nearest_sibling(path, '*.y*ml')}"


def parse_yaml(text: str) -> Any:
    """What a text in YAML stands for.

    Raises:
        RecipeError: no YAML, a key that stands twice, values nested too deep or repeated too often.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {}, ())
        return loader.construct_document(node)
    except RecipeError:
        raise
    except RecursionError:
        raise RecipeError(f"values are nested more than {DEEPEST} deep.") from None
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        reason = ": ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"not valid YAML{line}: {reason}.") from None
    except (yaml.YAMLError, ValueError) as error:  # a date with a 13th month is a ValueError
        raise RecipeError(f"not valid YAML: {' '.join(str(error).split())}.") from None


def _measure(node: yaml.Node, sizes: dict[yaml.Node, int], above: tuple[yaml.Node, ...]) -> int:
    """How many values a node stands for, every alias written out."""
    if node in above:
        raise RecipeError(f"a value holds itself (line {node.start_mark.line + 1}).")
    if len(above) > DEEPEST:
        raise RecipeError(f"values are nested more than {DEEPEST} deep (line "
                          f"{node.start_mark.line + 1}).")
    if isinstance(node, yaml.ScalarNode) and "\0" in node.value:  # no path may hold one
        raise RecipeError(f"a text holds a null character (line {node.start_mark.line + 1}).")
    if node not in sizes:
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        pairs = isinstance(node, yaml.MappingNode)
        children = [child for item in inner for child in (item if pairs else (item,))]
        sizes[node] = 1 + sum(_measure(child, sizes, (*above, node)) for child in children)
        if sizes[node] > MOST_VALUES:
            raise RecipeError(f"it stands for more than {MOST_VALUES:,} values, every alias "
                              "written out.")
    return sizes[node]


def dump_yaml(tree: Any) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
