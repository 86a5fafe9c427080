"""The flow of `/v1/chat/completions`: a conversation, the sequences that it asks for, their text, the answer."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from runtime.engine.base import GenerationRequest
from runtime.server.answer import TokenCount, collect, finish_reason
from runtime.server.catalog import ServedModel
from runtime.server.chat_prompt import encode_chat, template_variables
from runtime.server.errors import ApiError
from runtime.server.generation import PromptPlan, generate
from runtime.server.logprobs import LogprobWriter
from runtime.server.sampling import sampling_params, text_options
from runtime.server.schemas.chat import (
    AnswerMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatRequest,
    Delta,
    FirstDelta,
)
from runtime.server.schemas.usage import Usage
from runtime.server.structured import compile_guide
from runtime.server.tokenization import check_length, truncate
from runtime.text.assembler import TextChunk


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A checked request: nothing that can be known beforehand stands against it any more."""

    id: str
    created: int
    model: ServedModel
    body: ChatRequest
    prompt: PromptPlan

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt, as the template has made it."""
        return list(self.prompt.request.prompt_token_ids)

    def logprobs(self, chunk: TextChunk) -> ChatLogprobs | None:
        """Of a piece, if they are wanted."""
        return self.writer(self.body.top_logprobs).chat(chunk.logprobs or ()) if self.body.logprobs else None

    def writer(self, top: int) -> LogprobWriter:
        """Writes log-probabilities, with the `top` likeliest tokens."""
        return LogprobWriter(self.model.tokenizer, top, self.body.return_tokens_as_token_ids)

    def token_ids(self, chunk: TextChunk) -> list[int] | None:
        """Of a piece, if they are wanted."""
        return list(chunk.token_ids) if self.body.return_token_ids else None

    def event(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatCompletionChunk:
        """An event of a stream."""
        return ChatCompletionChunk(
            id=self.id, created=self.created, model=self.model.name, choices=choices, usage=usage
        )


async def plan_chat(body: ChatRequest, model: ServedModel, *, max_choices: int, arrival: float) -> ChatPlan:
    """Turns a request into sequences.

    Args:
        max_choices: most choices of one request.
        arrival: when the request arrived, by `time.perf_counter`.

    Raises:
        ApiError: 400, the conversation cannot be made a prompt, is too long, or a field asks for what cannot be.
    """
    if body.n > max_choices:
        raise ApiError(400, f"n is {body.n}; at most {max_choices} choices are allowed", param="n")
    guide = await compile_guide(body, model)
    limit = body.max_completion_tokens or body.max_tokens
    limit_name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    context = model.engine.info.context_length
    token_ids = truncate(
        await encode_chat(body.messages, body, model, _variables(body)),
        body.truncate_prompt_tokens,
        body.truncation_side,
        context - (limit or 1),
    )
    check_length(len(token_ids), limit or 1, model, params=("messages", limit_name))
    sampling = sampling_params(
        body,
        model,
        max_tokens=limit or context - len(token_ids),
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        guide=guide,
        logprobs=body.top_logprobs if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    request_id = f"chatcmpl-{uuid.uuid4().hex}"
    request = GenerationRequest(request_id, token_ids, sampling, body.n, body.priority, body.cache_salt)
    id = request_id if body.request_id is None else f"chatcmpl-{body.request_id}"
    return ChatPlan(id, int(time.time()), model, body, PromptPlan(0, request, arrival, text_options(body, model)))


async def complete_chat(plan: ChatPlan) -> ChatCompletion:
    """The whole answer at once. Raises as `generate` does."""
    body, count = plan.body, TokenCount([plan.prompt])
    async with aclosing(generate(plan.model, [plan.prompt])) as chunks:
        whole = await collect(chunks)
    for chunk in whole:
        count.add(chunk)
    choices = [
        ChatChoice(
            index=chunk.index,
            message=AnswerMessage(content=chunk.text),
            logprobs=plan.logprobs(chunk),
            finish_reason=finish_reason(chunk),
            stop_reason=chunk.stop_reason,
            token_ids=plan.token_ids(chunk),
        )
        for chunk in whole
    ]
    answer = ChatCompletion(
        id=plan.id, created=plan.created, model=plan.model.name, choices=choices, usage=count.usage()
    )
    if body.prompt_logprobs is not None and whole[0].prompt_logprobs is not None:
        answer.prompt_logprobs = plan.writer(body.prompt_logprobs).prompt(whole[0].prompt_logprobs)
    if body.return_token_ids:
        answer.prompt_token_ids = plan.prompt_token_ids
    return answer


async def stream_chat(plan: ChatPlan) -> AsyncGenerator[str, None]:
    """The answer piece by piece, as JSON texts, and before that one with the role. Raises as `generate`.

    Where the usage is wanted, a last event without choices holds it; the other events then say null there.
    """
    body, count, begun = plan.body, TokenCount([plan.prompt]), set[int]()
    unasked = unasked_fields(body)
    if not (body.include_usage or body.continuous_usage):
        unasked["usage"] = True
    async with aclosing(generate(plan.model, [plan.prompt])) as chunks:
        async for chunk in chunks:
            if chunk.index not in begun:
                begun.add(chunk.index)
                yield _role(plan, count, chunk.index).model_dump_json(exclude=unasked)
            count.add(chunk)
            choice = ChatChunkChoice(
                index=chunk.index,
                delta=Delta(content=chunk.text),
                logprobs=plan.logprobs(chunk),
                finish_reason=finish_reason(chunk),
                stop_reason=chunk.stop_reason,
                token_ids=plan.token_ids(chunk),
            )
            usage = count.usage_of(chunk.index) if body.continuous_usage else None
            yield plan.event([choice], usage).model_dump_json(exclude=unasked)
    if body.include_usage:
        yield plan.event([], count.usage()).model_dump_json(exclude=unasked)


def _variables(body: ChatRequest) -> dict[str, Any]:
    """What the template gets to see beside the messages; tools only if they may be called."""
    variables = template_variables(None if body.tool_choice == "none" else body.tools, body)
    return variables if body.reasoning_effort is None else {**variables, "reasoning_effort": body.reasoning_effort}


def _role(plan: ChatPlan, count: TokenCount, choice: int) -> ChatCompletionChunk:
    """The first event of a choice: who speaks, and no text yet."""
    event = plan.event([ChatChunkChoice(index=choice, delta=FirstDelta())])
    if plan.body.continuous_usage:
        event.usage = count.usage_of(choice)
    if plan.body.return_token_ids:
        event.prompt_token_ids = plan.prompt_token_ids
    return event


def unasked_fields(body: ChatRequest) -> dict[str, Any]:
    """What is left out of an answer, in pydantic's notation: fields that only those know who ask for them."""
    unasked: dict[str, Any] = {}
    if body.prompt_logprobs is None:
        unasked["prompt_logprobs"] = True
    if not body.return_token_ids:
        unasked |= {"prompt_token_ids": True, "choices": {"__all__": {"token_ids"}}}
    return unasked
