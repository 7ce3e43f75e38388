"""What the options of all commands have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from taid_vlm.errors import TaidError, nearest


def option(
    description: str | None = None, metavar: str | None = None, default: Any = None, *,
    positional: bool = False, many: bool = False, also: str | None = None,
) -> Any:
    """A field, and how it stands on the command line.

    Args:
        description: the help. metavar: what stands there for its value.
        default: `...` where there is none, and a value has to be given.
        positional: it has no --name. many: several values stand behind it. also: another name.
    """
    return Field(default, description=description, json_schema_extra={
        "metavar": metavar, "positional": positional, "many": many, "also": also})


def positional(description: str, metavar: str | None = None, **how: Any) -> Any:
    """A field that stands on the command line without its name, and has to."""
    return option(description, metavar, ..., positional=True, **how)


class Options(BaseModel):
    """Options of one command, checked; raises TaidError with the option, its value, the mend.

    groups: headings of the help, by the first option that stands under each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    groups: ClassVar[Mapping[str, str]] = {}

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise TaidError(self._mistake(error.errors()[0])) from None

    def given(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of `names` that are not None."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def refuse(self, names: Iterable[str], why: str) -> None:
        for name in self.given(names):
            raise TaidError(f"{flag(name)} {why}.")

    @classmethod
    def _mistake(cls, error: Any) -> str:
        """pydantic's first complaint in this package's words."""
        if not error["loc"]:
            return str(error["ctx"]["error"])
        name, value, kind = error["loc"][0], error["input"], error["type"]
        if kind == "extra_forbidden":
            return f"no option '{flag(name)}'.{nearest(flag(name), map(flag, cls.model_fields))}"
        field = cls.model_fields[name]
        label = name if shown(field)["positional"] else flag(name)
        if kind == "missing":
            return f"{label} is missing."
        if kind == "literal_error":
            return f"{label} = '{value}'.{nearest(value, choices(field))}"
        what = {"int_parsing": "it must be a whole number", "float_parsing": "it must be a number"}
        why = what.get(kind, error["msg"].removeprefix("Value error, "))
        return f"{label} = '{value}', but {why}."


def flag(name: str) -> str:
    """--max-records of max_records; --json of json_, as pydantic has a `json` of its own."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def shown(field: FieldInfo) -> dict[str, Any]:
    """How a field stands on the command line, as `option` was told."""
    return {**field.json_schema_extra}  # type: ignore[dict-item]


def choices(field: FieldInfo) -> tuple[str, ...]:
    """What a Literal allows, or one that may be None; of other types nothing."""
    kinds = (field.annotation, *get_args(field.annotation))
    return get_args(next((kind for kind in kinds if get_origin(kind) is Literal), None))


def _listed(value: Any) -> Any:
    """One value as a list of one; paths as text."""
    if isinstance(value, (str, Path)):
        return [str(value)]
    return [*map(str, value)] if isinstance(value, Iterable) else value


def _numbers(value: Any) -> Any:
    try:
        return [*map(int, value.split(","))] if isinstance(value, str) else value
    except ValueError:
        raise ValueError("it must be a list of numbers like 0,1,5") from None


def _object(value: Any) -> Any:
    """An object written as JSON."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        value = None
    if not isinstance(value, Mapping):
        raise ValueError('it must be a JSON object like {"key": true}')
    return dict(value)


Object = Annotated[dict[str, Any], BeforeValidator(_object)]
Many = Annotated[list[str], BeforeValidator(_listed)]
Numbers = Annotated[list[int], BeforeValidator(_numbers)]  # 0,1,5 on the command line


def say_and_part(result: Callable[[], str]) -> None:
    """Print what a command has come to, once, and leave its other processes in order."""
    from accelerate import PartialState

    process = PartialState()
    if process.is_main_process:
        print(result())
    process.destroy_process_group()  # left to the interpreter's exit, processes can abort
