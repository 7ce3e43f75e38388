"""What all sections share: known keys only, strict kinds of values, one-line errors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema

from taid_vlm.config.messages import UnknownKey, one_line
from taid_vlm.errors import RecipeError

Kind = TypeVar("Kind", bound="Section")


class Section(BaseModel):
    """A mapping of a file, checked.

    In Python, too: `DataSource(path="a.jsonl", split=3)` raises RecipeError in one line. A copy,
    `section.model_copy(update={...})`, is not checked again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)
    bare: ClassVar[str] = ""  # the key that a text in place of the mapping stands for
    blank_is_absent: ClassVar[bool] = False  # a key without a value is as one that is left out

    def __init__(self, bare: str | None = None, /, **keys: Any) -> None:
        value = keys if bare is None else {self.bare: bare, **keys}
        try:
            self.__pydantic_validator__.validate_python(value, self_instance=self)
        except ValidationError as error:
            raise RecipeError(one_line(error, type(self).__name__, tree=value, kind=type(self))
                              ) from None

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # not for inner sections

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if isinstance(value, str) and cls.bare:
            value = {cls.bare: value}
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f" must be a mapping, got {value!r:.60}.")
        for key in value:
            if key not in cls.model_fields:
                raise UnknownKey(cls.called(), key, cls.model_fields)
        return {key: inner for key, inner in value.items()
                if inner is not None or not cls.blank_is_absent}

    @classmethod
    def called(cls) -> str:
        """What follows its path in a message about its keys."""
        return ""

    @classmethod
    def summary(cls) -> str:
        return (cls.__doc__ or "").partition("\n\n")[0]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Give the fields the descriptions and units that the docstring has under `Args:`."""
        docs = [inspect.cleandoc(kind.__doc__ or "") for kind in reversed(cls.__mro__[:-2])]
        for name, unit, text in re.findall(
                r"^    (\w+)(?: \((.+?)\))?: (.+(?:\n {8}.+)*)", "\n".join(docs), re.MULTILINE):
            if name in cls.model_fields:
                cls.model_fields[name].description = " ".join(text.split())
                cls.model_fields[name].json_schema_extra = {"unit": unit} if unit else None

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        reference = handler(schema)
        plain = handler.resolve_ref_schema(reference)
        plain["description"] = cls.summary()
        if cls.bare:  # a text in its place
            mapping = dict(plain)
            plain.clear()
            text = mapping["properties"][cls.bare]
            names = {key: text[key] for key in ("const", "enum") if key in text}
            plain["anyOf"] = [{"type": "string", **names}, mapping]
        return reference


def check(kind: type[Kind] | TypeAdapter[Any], value: Any, whole: str = "",
          at: Sequence[str] = ()) -> Kind:
    """What a file's value stands for; raises RecipeError as `messages.one_line` has it."""
    try:
        if isinstance(kind, TypeAdapter):
            return kind.validate_python(value)
        return kind.model_validate(value)
    except ValidationError as error:
        section = None if isinstance(kind, TypeAdapter) else kind
        raise RecipeError(one_line(error, whole, at, value, section)) from None
