"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from runtime.server.schemas.base import NonEmpty, RequestModel
from runtime.server.schemas.chat import ConversationOptions
from runtime.server.schemas.messages import Message


class TokenizeRequest(ConversationOptions):
    """A text or a conversation to be made tokens."""

    model: str | None = None
    messages: Annotated[list[Message], NonEmpty] | None = None
    prompt: str | None = Field(None, validate_default=True)
    return_token_strs: bool = False

    @field_validator("prompt")
    @classmethod
    def _one_of_both(cls, prompt: str | None, info: ValidationInfo) -> str | None:
        if "messages" in info.data and (prompt is None) == (info.data["messages"] is None):
            raise PydanticCustomError("malformed", "or messages must be given, and not both")
        return prompt


class TokenizeResponse(BaseModel):
    """The tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(None, description="As tokenizer.json spells them.")


class DetokenizeRequest(RequestModel):
    """Tokens to be made text."""

    model: str | None = None
    tokens: list[int] = Field(fail_fast=True)


class DetokenizeResponse(BaseModel):
    """The text, special tokens included."""

    prompt: str
