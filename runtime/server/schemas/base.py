"""How requests are checked: strictly, and field by field.

A field that is known but not supported is declared too, with the values that change nothing; any other value is
refused by name. Nothing that a client asks for is silently left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, LiteralString

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WrapValidator, model_validator
from pydantic_core import PydanticCustomError


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


def unsupported_unless(*neutral: object) -> AfterValidator:
    """Accepts only values that ask for nothing; for fields that this server does not implement."""
    hint = f"leave it out or send {' or '.join(map(str, neutral))}" if neutral else "leave it out"

    def check(value: object) -> object:
        # True == 1 in Python, but not to a client.
        if not any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in neutral):
            raise PydanticCustomError("unsupported", "is not supported by this server; {hint}", {"hint": hint})
        return value

    return AfterValidator(check)


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
