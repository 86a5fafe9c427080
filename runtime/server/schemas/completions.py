"""`POST /v1/completions`: OpenAI's fields and vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from runtime.server.schemas.base import NonEmpty, TokenIds, described_as, unsupported_unless
from runtime.server.schemas.generation import GenerationBody, TopLogprobs
from runtime.server.schemas.usage import Usage

Prompt = Annotated[
    str | Annotated[list[str], NonEmpty] | TokenIds | Annotated[list[TokenIds], NonEmpty],
    described_as("Input must be a string, a list of strings, a list of token ids or a list of such lists"),
]
PromptLogprobs = list[dict[str, dict[str, Any]] | None]


class CompletionRequest(GenerationBody):
    """The body of `POST /v1/completions`."""

    prompt: Prompt
    echo: bool = False
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 16
    logprobs: TopLogprobs | None = None
    best_of: int | None = None
    add_special_tokens: bool = Field(True, description="Put a BOS in front of a text, if the model has one.")
    suffix: Annotated[Any, unsupported_unless("")] = ""

    @field_validator("max_tokens")
    @classmethod
    def _something_to_do(cls, max_tokens: int, info: ValidationInfo) -> int:
        if max_tokens > 0:
            return max_tokens
        if not info.data.get("echo") and info.data.get("prompt_logprobs") is None:
            raise PydanticCustomError("malformed", "must be at least 1, or 0 with echo or prompt_logprobs")
        if info.data.get("n", 1) > 1:
            raise PydanticCustomError("malformed", "must be at least 1 where n is more than 1")
        return max_tokens

    @field_validator("best_of")
    @classmethod
    def _best_of_all(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        if best_of not in (None, 1, info.data.get("n", 1)):
            raise PydanticCustomError("unsupported", "is not supported by this server, unless it is 1 or equal to n")
        return best_of

    def prompts(self) -> list[str | list[int]]:
        """The prompt as a list of prompts, each a text or token ids."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast("list[str | list[int]]", [self.prompt] if one else self.prompt)


class CompletionLogprobs(BaseModel):
    """Log-probabilities, one of each list's items a token."""

    text_offset: list[int] = Field(description="Where the token's text begins, in characters of the choice's text.")
    token_logprobs: list[float | None] = Field(description="Null for the first token of a prompt.")
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] = Field(description="The token itself and the likeliest ones.")


class CompletionChoice(BaseModel):
    """The text for one prompt, or, in a stream, the next piece of it. The last four fields are vLLM's."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = Field(None, description="The stop string, or the token of stop_token_ids.")
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Completion(BaseModel):
    """The answer to `POST /v1/completions`, or one event of a streamed one. Times are Unix seconds."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
