"""pydantic's errors as our messages: one line with the key's path, its value, and the mend.

A check of our own raises ValueError, whose text follows the key's path: behind a colon, or, where
it begins with a space or a dot, as it is (" has no key 'x'.", ".head = 0, but ...").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError

from taid_vlm.config.secrets import redact_text
from taid_vlm.errors import nearest

TAG = "@"  # begins what stands in pydantic's paths, but in no file: which loss is meant
MOST_PLACES = 3  # that a message names of a key
# what other tools and scripts call keys of a recipe
SYNONYMS = {
    **dict.fromkeys(("lr", "rate"), "learning_rate"),
    **dict.fromkeys(("epochs", "num_epochs", "max_epochs"), "num_train_epochs"),
    **dict.fromkeys(("steps", "num_steps", "max_train_steps"), "max_steps"),
    **dict.fromkeys(("batch_size", "train_batch_size", "micro_batch_size", "per_gpu_batch_size"),
                    "per_device_train_batch_size"),
    **dict.fromkeys(("grad_accum", "accumulation_steps", "gradient_accumulation"),
                    "gradient_accumulation_steps"),
    **dict.fromkeys(("r", "lora", "lora_r", "lora_rank", "lora_alpha", "lora_dropout",
                     "target_modules", "use_peft"), "peft"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), "quantization"),
    **dict.fromkeys(("loss", "method"), "objective"),
    **dict.fromkeys(("warmup", "num_warmup_steps"), "warmup_steps"),
}
_WANTED = {
    "int_type": "a whole number", "float_type": "a number", "finite_number": "a finite number",
    "bool_type": "true or false", "string_type": "text", "dict_type": "a mapping",
    "list_type": "a list", "greater_than_equal": "at least {ge}", "wanted": "{wanted}",
}


class UnknownKey(ValueError):
    """A mapping has no such key; perhaps another place of the same file has."""

    def __init__(self, called: str, key: object, valid: Iterable[str]) -> None:
        super().__init__(f"{called} has no key '{key}'.")
        self.key, self.valid = str(key), list(valid)

    def told(self, keys: Sequence[Any], kind: type[BaseModel] | None) -> str:
        """With what may have been meant: the same key of another section before the nearest one
        of this, and before a similar one of another.

        Args:
            keys: path of the mapping.
            kind: what the whole file is; None where that is not known.
        """
        if keys and keys[0] == "stages":
            keys = keys[2:]
        places = _places(kind) if kind else {}
        near = [SYNONYMS[self.key], self.key] if self.key in SYNONYMS else [self.key]
        if not places.keys() & near and not get_close_matches(self.key, self.valid, cutoff=0.5):
            near = get_close_matches(self.key, places, n=1, cutoff=0.8)
        here = ".".join(str(key) for key in [*keys, self.key])  # of another kind of loss
        instead = [place for name in near for place in places.get(name, ()) if place != here]
        return f"{self}{nearest(self.key, self.valid, instead[:MOST_PLACES])}"


@cache
def _places(kind: type[BaseModel]) -> dict[str, list[str]]:
    """By its name, where in a file a key may stand; what stands in lists is left out."""
    schema = kind.model_json_schema()
    places: dict[str, dict[str, None]] = {}

    def walk(part: Mapping[str, Any], path: str) -> None:
        if "$ref" in part:
            part = schema["$defs"][part["$ref"].rpartition("/")[2]]
        for option in [*part.get("anyOf", ()), *part.get("oneOf", ())]:
            walk(option, path)
        for name, inner in part.get("properties", {}).items():
            places.setdefault(name, {})[path + name] = None
            walk(inner, f"{path}{name}.")

    walk(schema, "")
    return {name: list(paths) for name, paths in places.items()}


def one_line(
    error: ValidationError, whole: str = "", at: Sequence[str] = (), tree: Any = None,
    kind: type[BaseModel] | None = None,
) -> str:
    """The first of pydantic's errors in a line.

    Args:
        whole: what the outermost mapping is called ("recipe").
        at: path of what was checked, where it is a part.
        tree: what was checked, for the names of stages.
        kind: what it was checked as, for the places of its keys.
    """
    first: Any = error.errors(include_url=False)[0]
    keys = [*at, *(key for key in first["loc"]
                   if not str(key).startswith(TAG) and key != "[key]")]
    if first["type"] == "missing":
        *keys, missing = keys
        text = f".{missing} is missing." if keys else f": '{missing}' is missing."
    elif isinstance(problem := first.get("ctx", {}).get("error"), UnknownKey):
        text = problem.told(keys, kind)
    else:
        text = _text(first)
    path = _path(keys, tree) or whole
    if path and text[0] not in " .:[":
        path += ": "
    return redact_text(f"{path}{text}" if path else text.lstrip(":. "))


def _text(error: Mapping[str, Any]) -> str:
    kind, value, facts = error["type"], error["input"], error.get("ctx", {})
    if kind == "value_error":
        return str(facts["error"])
    if kind == "literal_error":
        valid = re.findall(r"'([^']*)'", facts["expected"])
        return f" = {value!r:.60}.{nearest(value, valid)}"
    wanted = _WANTED[kind].format(**facts) if kind in _WANTED else error["msg"]
    if kind == "string_type" and isinstance(value, bool):
        wanted += "; YAML reads yes, no, on and off as true and false, so put quotes around them"
    return f" = {value!r:.60}, but it must be {wanted}."


def _path(keys: Sequence[Any], tree: Any) -> str:
    """`data.train.columns`, `stages[0].name`, and from there on `stages 'align': train.seed`."""
    if len(keys) > 2 and keys[0] == "stages" and keys[2] != "name":
        name = tree["stages"][keys[1]]["name"]
        return f"stages '{name}': {_path(keys[2:], None)}"
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")
