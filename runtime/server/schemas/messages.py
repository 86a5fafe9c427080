"""The messages of a conversation, and the tools that it may speak of."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from runtime.server.schemas.base import NonEmpty, RequestModel, described_as, unsupported_unless


def _refuse_media(content: object) -> object:
    """Names what is no text, where a union of types would only say that nothing fits."""
    for place, part in enumerate(content) if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            hint = {"place": place, "kind": kind if len(kind) <= 40 else kind[:39] + "…"}
            raise PydanticCustomError(
                "unsupported", "has a part {place} of type {kind}; models here read text only", hint
            )
    return content


class TextPart(RequestModel):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


Content = Annotated[
    str | Annotated[list[TextPart], NonEmpty],
    described_as("Input must be a string or a list of text parts"),
    BeforeValidator(_refuse_media),
]


def _parsed(arguments: object) -> object:
    """The object that OpenAI's text of JSON stands for: templates want the object."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments) if arguments else {}
    except (ValueError, RecursionError):
        raise PydanticCustomError("malformed", "should be the text of a JSON object") from None


class FunctionCall(RequestModel):
    """A call of a function, by the assistant."""

    name: str
    arguments: Annotated[dict[str, Any], BeforeValidator(_parsed)]


class ToolCall(RequestModel):
    """A call of a tool, by the assistant."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(RequestModel):
    """One message. Templates get it as it was sent."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None
    reasoning_content: str | None = Field(None, description="What the assistant thought; an extension, as in vLLM.")
    content: Content | None = Field(None, validate_default=True)
    name: str | None = None
    tool_call_id: str | None = None
    audio: Annotated[Any, unsupported_unless()] = None
    function_call: Annotated[Any, unsupported_unless()] = None

    @field_validator("tool_calls", "reasoning_content")
    @classmethod
    def _by_the_assistant(cls, value: object, info: ValidationInfo) -> object:
        if value is not None and info.data.get("role", "assistant") != "assistant":
            raise PydanticCustomError("malformed", "belongs to messages of the assistant only")
        return value

    @field_validator("content")
    @classmethod
    def _says_something(cls, content: object, info: ValidationInfo) -> object:
        given = info.data
        silent = given.get("role") == "assistant" and (given.get("tool_calls") or given.get("refusal") is not None)
        if content is None and "role" in given and not silent:
            raise PydanticCustomError("missing", "is required")
        return content


class FunctionDefinition(RequestModel):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[Any, unsupported_unless(False)] = None


class Tool(RequestModel):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition
