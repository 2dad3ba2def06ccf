"""What all bodies of requests are made of: `Body`, and bounded texts, names and tokens."""

from __future__ import annotations

import functools
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..generation.bounds import MAX_TEXT, MAX_TOKEN_ID
from .known_fields import NotOffered, Place, asks_for_nothing, document, ignored, not_offered

MAX_PROMPTS = 256
_MOST_FIELDS = 1000  # no object has so many; pydantic would make an error of every one

NAME_PATTERN = r"^[a-z0-9_-][a-z0-9._-]{0,63}$"  # never begins with a dot: it becomes a file name

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Short = Annotated[str, StringConstraints(max_length=512)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
# fail_fast, here and elsewhere: only one error is reported, and those of a list of millions would take gigabytes
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class Body(BaseModel):
    """A JSON object: unknown fields are refused, nothing is converted, numbers are finite.

    `place` names the object in the tables of `known_fields`, whose harmless fields are dropped.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    place: ClassVar[Place | None] = None

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        dropped, refused = _tables_of(cls)
        if len(value) > _MOST_FIELDS:
            known = _own(cls) | dropped | refused.keys()
            unknown = next(name for name in value if name not in known)
            raise ValidationError.from_exception_data(
                cls.__name__, [{"type": "extra_forbidden", "loc": (unknown,), "input": None}]
            )
        for name in refused.keys() & value.keys():
            if not asks_for_nothing(value[name], refused[name]):
                error = PydanticCustomError("not_offered", f"not offered; {refused[name].cure}")
                raise ValidationError.from_exception_data(
                    cls.__name__, [{"type": error, "loc": (name,), "input": value[name]}]
                )
        return {name: item for name, item in value.items() if name not in dropped and name not in refused}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core_schema)
        if cls.place is not None:
            document(handler.resolve_ref_schema(schema), cls.place, _own(cls))
        return schema


def _own(body: type[Body]) -> set[str]:
    return {field.alias or name for name, field in body.model_fields.items()}


@functools.cache
def _tables_of(body: type[Body]) -> tuple[frozenset[str], dict[str, NotOffered]]:
    """(harmless fields, refused fields) of an object, without those that it has."""
    if body.place is None:
        return frozenset(), {}
    own = _own(body)
    refused = {name: row for name, row in not_offered(body.place).items() if name not in own}
    return frozenset(ignored(body.place).keys() - own), refused


T = TypeVar("T")


def same(name: str, value: T | None, other_name: str, other: T | None) -> T | None:
    """The value that one of two names of a field gives. Raises ValueError if they differ."""
    if value is not None and other is not None and value != other:
        raise ValueError(f"{name} and {other_name} differ; give one of them")
    return other if value is None else value
