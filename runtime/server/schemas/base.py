"""How requests are checked: strictly, and field by field.

A field that is known but not supported is declared too, with the values that change nothing; any other value is
refused by name. Nothing that a client asks for is silently left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, LiteralString

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function


class RequestModel(BaseModel):
    """JSON from a client: no conversions ("16" is no number), no unknown fields, and null is the same as absent."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, populate_by_name=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {name: value for name, value in data.items() if value is not None or name not in known}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """As pydantic writes it, with null wherever a field may be left out."""
        reference = handler(schema)
        written = handler.resolve_ref_schema(reference)
        optional = written.get("properties", {}).keys() - set(written.get("required", ()))
        for name in optional:
            written["properties"][name] = _or_null(written["properties"][name])
        return reference


def _or_null(schema: JsonSchemaValue) -> JsonSchemaValue:
    null = {"type": "null"}
    if "anyOf" in schema:
        return schema if null in schema["anyOf"] else {**schema, "anyOf": [*schema["anyOf"], null]}
    if None in schema.get("enum", ()):
        return schema
    about: JsonSchemaValue = {key: schema[key] for key in ("title", "description", "default") if key in schema}
    bare = {key: value for key, value in schema.items() if key not in about}
    return about | {"anyOf": [bare, null]}


class unsupported_unless:  # noqa: N801 - an annotation, written as a call
    """Accepts only values that ask for nothing; for fields that this server does not implement."""

    def __init__(self, *neutral: object) -> None:
        self._neutral = neutral
        self._hint = f"leave it out or send {' or '.join(map(str, neutral))}" if neutral else "leave it out"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Checks after whatever else checks."""
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Exactly the values that are accepted."""
        return {"enum": [*self._neutral, None]}

    def _check(self, value: object) -> object:
        # True == 1 in Python, but not to a client.
        if not any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in self._neutral):
            raise PydanticCustomError("unsupported", "is not supported by this server; {hint}", {"hint": self._hint})
        return value


def described_as(message: LiteralString) -> WrapValidator:
    """One sentence about the whole, instead of the errors of every branch of a union."""

    def check(value: object, validate: Callable[[object], object]) -> object:
        try:
            return validate(value)
        except ValidationError:
            raise PydanticCustomError("malformed", message) from None

    return WrapValidator(check)


NonEmpty = Field(min_length=1, fail_fast=True)
"""For lists of up to a million items: the first fault is enough."""

TokenIds = Annotated[list[int], NonEmpty]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]

NoEffect = "Accepted for OpenAI's clients; has no effect."
