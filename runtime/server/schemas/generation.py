"""What completions and chat completions share: how tokens are chosen, and what comes back with the text."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from runtime.engine.base import MAX_LOGPROBS
from runtime.server.schemas.base import Int64, NoEffect, RequestModel, TokenIds, described_as, unsupported_unless
from runtime.server.schemas.structured import Choices, JsonSchema, ResponseFormat, StructuredOutputs

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_N = 128

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stop = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)],
    described_as("Input must be a string or a list of up to 16 strings, each of 1 to 1000 characters"),
]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
MaxTokens = Annotated[int, Field(ge=1, lt=2**31)]
Name = Annotated[str, Field(min_length=1, max_length=128)]


def _check_biased_ids(biases: dict[str, float]) -> dict[str, float]:
    if not all(key.isascii() and key.isdigit() and len(key) < 20 for key in biases):
        raise PydanticCustomError(
            "malformed", "must have token ids for keys, such as {example}", {"example": '"50256"'}
        )
    return biases


Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[
    dict[str, Bias],
    described_as("Input must map token ids to biases from -100 to 100"),
    AfterValidator(_check_biased_ids),
]


class StreamOptions(RequestModel):
    """`stream_options` of a streamed request."""

    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="Every event has the usage of its choice so far.")
    include_obfuscation: Annotated[Any, unsupported_unless(False)] = False


class GenerationBody(RequestModel):
    """What both kinds of completion understand. OpenAI's fields first, then vLLM's."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    stop: Stop = Field(default_factory=list[str])
    seed: Int64 | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias = Field(default_factory=dict)
    response_format: ResponseFormat | None = None
    user: str | None = Field(None, description=NoEffect)

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    ignore_eos: bool = Field(False, description="Go on past end tokens, up to `max_tokens`.")
    stop_token_ids: list[int] = Field(default_factory=list, fail_fast=True)
    allowed_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = Field(True, description="Has no effect: no tokenizer here adds any.")
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        None, description="Keep so many tokens of the prompt; -1: as many as fit beside `max_tokens`."
    )
    truncation_side: Literal["left", "right"] = "left"
    prompt_logprobs: TopLogprobs | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    priority: Int64 = Field(0, description="Lower runs first.")
    cache_salt: Name | None = Field(None, description="Cached prefixes are shared only where it is the same.")
    request_id: Name | None = Field(None, description="Becomes part of the answer's id; need not be unique.")
    return_tokens_as_token_ids: bool = Field(False, description='Tokens in log-probabilities are "token_id:5".')
    return_token_ids: bool = Field(False, description="The answer has the ids of prompt and text.")

    # vLLM's fields that are not supported.
    bad_words: Annotated[Any, unsupported_unless([])] = Field(default_factory=list)
    use_beam_search: Annotated[Any, unsupported_unless(False)] = False
    length_penalty: Annotated[Any, unsupported_unless(1)] = 1
    logprob_token_ids: Annotated[Any, unsupported_unless([])] = Field(default_factory=list)

    # What vllm-router adds to every request.
    no_stop_trim: Annotated[Any, unsupported_unless(False)] = False
    return_hidden_states: Annotated[Any, unsupported_unless(False)] = False

    @field_validator("stream_options")
    @classmethod
    def _options_need_a_stream(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options is not None and info.data.get("stream") is False:
            raise PydanticCustomError("malformed", "needs stream to be true")
        return options

    @field_validator("prompt_logprobs")
    @classmethod
    def _not_in_a_stream(cls, count: int | None, info: ValidationInfo) -> int | None:
        if count is not None and info.data.get("stream"):
            raise PydanticCustomError("malformed", "needs stream to be false")
        return count

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with an event that holds the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every event of a stream holds the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
