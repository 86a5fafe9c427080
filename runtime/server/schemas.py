"""Requests and responses as they are on the wire: OpenAI's fields, checked.

A field that is known but not supported is declared here too, with the values that change nothing; any other value is
refused by name. Nothing that a client asks for is silently left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, LiteralString, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000


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
Prompt = Annotated[
    str | Annotated[list[str], NonEmpty] | TokenIds | Annotated[list[TokenIds], NonEmpty],
    described_as("Input must be a string, a list of strings, a list of token ids or a list of such lists"),
]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stop = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)],
    described_as("Input must be a string or a list of up to 16 strings, each of 1 to 1000 characters"),
]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class RequestModel(BaseModel):
    """JSON from a client: no conversions ("16" is no number), no unknown fields, and null is the same as absent."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None or name not in cls.model_fields}


class StreamOptions(RequestModel):
    """`stream_options` of a streamed request."""

    include_usage: bool = False
    continuous_usage_stats: Annotated[Any, unsupported_unless(False)] = False
    include_obfuscation: Annotated[Any, unsupported_unless(False)] = False


class CompletionRequest(RequestModel):
    """The body of `POST /v1/completions`."""

    model: str | None = None
    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] = 16
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: Stop = Field(default_factory=list[str])
    seed: Int64 | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted for OpenAI's clients; has no effect.")
    ignore_eos: bool = Field(False, description="Go on past end tokens, up to `max_tokens`. An extension, as in vLLM.")

    # OpenAI's fields that are not supported.
    n: Annotated[Any, unsupported_unless(1)] = 1
    best_of: Annotated[Any, unsupported_unless(1)] = 1
    echo: Annotated[Any, unsupported_unless(False)] = False
    suffix: Annotated[Any, unsupported_unless("")] = ""
    logprobs: Annotated[Any, unsupported_unless()] = None
    logit_bias: Annotated[Any, unsupported_unless({})] = Field(default_factory=dict)
    presence_penalty: Annotated[Any, unsupported_unless(0)] = 0
    frequency_penalty: Annotated[Any, unsupported_unless(0)] = 0

    # vLLM's extensions that are not supported.
    top_k: Annotated[Any, unsupported_unless(0, -1)] = 0
    min_p: Annotated[Any, unsupported_unless(0)] = 0
    min_tokens: Annotated[Any, unsupported_unless(0)] = 0
    repetition_penalty: Annotated[Any, unsupported_unless(1)] = 1
    stop_token_ids: Annotated[Any, unsupported_unless([])] = Field(default_factory=list)
    include_stop_str_in_output: Annotated[Any, unsupported_unless(False)] = False
    skip_special_tokens: Annotated[Any, unsupported_unless(True)] = True
    spaces_between_special_tokens: Annotated[Any, unsupported_unless(True)] = True
    add_special_tokens: Annotated[Any, unsupported_unless(True)] = True
    prompt_logprobs: Annotated[Any, unsupported_unless()] = None
    truncate_prompt_tokens: Annotated[Any, unsupported_unless()] = None
    response_format: Annotated[Any, unsupported_unless({"type": "text"})] = Field(default_factory=dict)
    guided_json: Annotated[Any, unsupported_unless()] = None
    guided_regex: Annotated[Any, unsupported_unless()] = None
    guided_choice: Annotated[Any, unsupported_unless()] = None
    guided_grammar: Annotated[Any, unsupported_unless()] = None

    @field_validator("stream_options")
    @classmethod
    def _options_need_a_stream(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options is not None and info.data.get("stream") is False:
            raise PydanticCustomError("malformed", "needs stream to be true")
        return options

    def prompts(self) -> list[str | list[int]]:
        """The prompt as a list of prompts, each a text or token ids."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast("list[str | list[int]]", [self.prompt] if one else self.prompt)

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class Usage(BaseModel):
    """Tokens, summed over all prompts and choices of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    """The text for one prompt, or, in a stream, the next piece of it."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(BaseModel):
    """The answer to `POST /v1/completions`, or one event of a streamed one. Times are Unix seconds."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A served model. The fields after `owned_by` are extensions; the first of them is vLLM's."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "osp-runtime"
    max_model_len: int = Field(description="The context: most tokens of prompt and completion together.")
    engine: str
    precision: str
    scheme: dict[str, Any] | None = Field(description="What is quantized and how; null at full precision.")
    quality: dict[str, Any] | None = Field(description="What was measured when the checkpoint was made.")


class ModelList(BaseModel):
    """The answer to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
