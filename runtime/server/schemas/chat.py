"""`POST /v1/chat/completions`: OpenAI's fields and vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationInfo, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from runtime.server.schemas.base import NoEffect, NonEmpty, RequestModel, unsupported_unless
from runtime.server.schemas.completions import PromptLogprobs
from runtime.server.schemas.generation import GenerationBody, MaxTokens, TopLogprobs
from runtime.server.schemas.messages import Message, Tool
from runtime.server.schemas.usage import Usage


class ConversationOptions(RequestModel):
    """How a model's chat template makes a prompt of messages."""

    tools: Annotated[list[Tool], Field(min_length=1)] | None = Field(
        None, description="Shown to the template. What the model makes of them comes back as text."
    )
    add_generation_prompt: bool | None = Field(
        None, description="End the prompt where the assistant speaks; by default, unless a message is continued."
    )
    continue_final_message: bool = Field(False, description="Leave the last message open, to be continued.")
    add_special_tokens: bool | None = Field(
        None, description="Put a BOS in front, unless there is one: by default, of a text, but not of messages."
    )
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="More variables for the template.")
    documents: list[dict[str, str]] | None = None
    chat_template: Annotated[Any, unsupported_unless()] = None
    mm_processor_kwargs: Annotated[Any, unsupported_unless({})] = None
    media_io_kwargs: Annotated[Any, unsupported_unless({})] = None

    @field_validator("continue_final_message")
    @classmethod
    def _one_or_the_other(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("add_generation_prompt"):
            raise PydanticCustomError("malformed", "and add_generation_prompt exclude each other")
        return value


class ChatRequest(GenerationBody, ConversationOptions):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], NonEmpty]
    max_tokens: MaxTokens | None = Field(None, description="OpenAI's old name of max_completion_tokens.")
    max_completion_tokens: MaxTokens | None = Field(None, description="By default, the rest of the context.")
    logprobs: bool = False
    top_logprobs: TopLogprobs = 0
    tool_choice: Annotated[Any, WithJsonSchema({"enum": ["none", "auto", None]})] = Field(
        None, description="none or auto; none keeps the tools from the template."
    )
    reasoning_effort: str | None = Field(None, description="A variable for the template.")

    # OpenAI's fields that do nothing here, and lose nothing by it.
    metadata: dict[str, str] | None = Field(None, description=NoEffect)
    separate_reasoning: bool = Field(True, description="vllm-router adds it. No effect: no reasoning is told apart.")
    stream_reasoning: bool = Field(True, description="As `separate_reasoning`.")
    safety_identifier: str | None = Field(None, description=NoEffect)
    prompt_cache_key: str | None = Field(None, description=NoEffect)

    # OpenAI's and vLLM's fields that are not supported.
    audio: Annotated[Any, unsupported_unless()] = None
    echo: Annotated[Any, unsupported_unless(False)] = False
    function_call: Annotated[Any, unsupported_unless()] = None
    functions: Annotated[Any, unsupported_unless()] = None
    include_reasoning: Annotated[Any, unsupported_unless(True)] = True
    modalities: Annotated[Any, unsupported_unless(["text"])] = None
    parallel_tool_calls: Annotated[Any, unsupported_unless(True)] = True
    prediction: Annotated[Any, unsupported_unless()] = None
    service_tier: Annotated[Any, unsupported_unless("auto", "default")] = None
    store: Annotated[Any, unsupported_unless(False)] = False
    verbosity: Annotated[Any, unsupported_unless("medium")] = None
    web_search_options: Annotated[Any, unsupported_unless()] = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_tokens") not in (None, value):
            raise PydanticCustomError("malformed", "and max_tokens differ; max_tokens is the old name, leave it out")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _tops_of_something(cls, value: int, info: ValidationInfo) -> int:
        if value and not info.data.get("logprobs", True):
            raise PydanticCustomError("malformed", "needs logprobs to be true")
        return value

    @field_validator("tool_choice")
    @classmethod
    def _free_choice(cls, value: object, info: ValidationInfo) -> object:
        if value not in (None, "none", "auto"):
            raise PydanticCustomError("unsupported", "is supported as none or auto only")
        if value == "auto" and info.data.get("tools", ()) is None:
            raise PydanticCustomError("malformed", "needs tools")
        return value


class TokenLogprob(BaseModel):
    """A token and its log-probability. Its bytes may be a part of a character; its text then has them escaped."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TokenLogprob):
    """A token of the answer."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of the answer's tokens."""

    content: list[ContentLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """The assistant's answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class FirstDelta(BaseModel):
    """The beginning of an answer."""

    role: Literal["assistant"] = "assistant"
    content: Literal[""] = ""


class Delta(BaseModel):
    """The next piece of an answer."""

    content: str


class ChatChoice(BaseModel):
    """One answer. The last two fields are vLLM's."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatChunkChoice(BaseModel):
    """The next piece of one answer."""

    index: int
    delta: FirstDelta | Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """The answer to `POST /v1/chat/completions`. The last two fields are vLLM's."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class ChatCompletionChunk(BaseModel):
    """One event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
