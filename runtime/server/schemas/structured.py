"""What a request may demand of the form of its text: OpenAI's `response_format`, and vLLM's ways."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from runtime.server.schemas.base import NonEmpty, RequestModel, described_as, unsupported_unless

JsonSchema = Annotated[dict[str, Any] | str | bool, described_as("Input must be a JSON schema, or its JSON text")]
Choices = Annotated[list[str], NonEmpty]


class JsonSchemaFormat(RequestModel):
    """`json_schema` of a `response_format`. The schema is always followed, `strict` or not."""

    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestModel):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(RequestModel):
    """vLLM's `structured_outputs`: one of the first five."""

    json_schema: JsonSchema | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: Annotated[Any, unsupported_unless(False)] = False
    whitespace_pattern: str | None = None
    structural_tag: Annotated[Any, unsupported_unless()] = None
