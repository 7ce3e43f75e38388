"""Kinds of values: nothing is turned into another kind, but 1e3 is a fine whole number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    WrapValidator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


def wanted(text: str) -> WrapValidator:
    """Whatever is wrong with a value, it "must be `text`"."""

    def check(value: Any, inner: Callable[[Any], Any]) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise PydanticCustomError("wanted", "{wanted}", {"wanted": text}) from None

    return WrapValidator(check)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _steps(value: Any, inner: Callable[[Any], float]) -> float:
    number = inner(value)
    if number.is_integer() and number >= 0:
        return int(number)
    if 0 < number < 1:
        return number
    raise PydanticCustomError("wanted", "{wanted}", {"wanted": "a whole number, or a share of all "
                                                               "steps between 0 and 1"})


def _as_written(value: Any, inner: Callable[[Any], Any]) -> Any:
    """An integer where a number is wanted stays one, so that a recipe's hash stays the same."""
    inner(value)
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
AtLeastTwo = Annotated[int, Field(ge=2), BeforeValidator(_whole)]
AtLeast16 = Annotated[int, Field(ge=16), BeforeValidator(_whole)]
Steps = Annotated[float, Field(allow_inf_nan=False), WrapValidator(_steps)]
Number = Annotated[float, Field(allow_inf_nan=False), WrapValidator(_as_written)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), WrapValidator(_as_written),
                        wanted("a number of at least 0")]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False), WrapValidator(_as_written),
                 wanted("a number above 0")]
AboveOne = Annotated[float, Field(gt=1, allow_inf_nan=False), WrapValidator(_as_written),
                     wanted("a number above 1")]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False), wanted(">= 0")]
Finite = Annotated[float, Field(allow_inf_nan=False), wanted("a finite number")]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), wanted("in [0, 1]")]
HalfOpen = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), wanted("in [0, 1)")]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$"), wanted(
    "letters, digits, '_', '-' and '.' (it names a folder or file)")]


class AsWritten:
    """Checked as `kind`, but kept as the file has it: keys that were left out stay left out.

    Args:
        kind: gives the type (which is made only where it is needed).
        values: keep the values as they were checked (1e3 is 1000 then), or as they were written.
    """

    def __init__(self, kind: Callable[[], Any], values: bool = True) -> None:
        self.kind, self.values = kind, values

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler
                                     ) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(
            self._keep, handler.generate_schema(self.kind()),
            serialization=core_schema.simple_ser_schema("any"))

    def _keep(self, value: Any, inner: Callable[[Any], Any]) -> Any:
        checked = inner(value)
        if self.values and isinstance(value, Mapping):
            return {key: getattr(checked, key) for key in value}
        return value
