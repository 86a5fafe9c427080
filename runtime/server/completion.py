"""The flow of `/v1/completions`: a request, the sequences that it asks for, their text, the answer."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, cast

from runtime.engine.base import FinishReason, GenerationRequest, SamplingParams
from runtime.server.catalog import ServedModel
from runtime.server.errors import ApiError, shortened
from runtime.server.generation import SequencePlan, TextChunk, generate
from runtime.server.schemas import Completion, CompletionChoice, CompletionRequest, Usage


@dataclass(frozen=True, slots=True)
class CompletionPlan:
    """A checked request: nothing that can be known beforehand stands against it any more."""

    id: str
    created: int
    model: ServedModel
    sequences: list[SequencePlan]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(sequence.request.prompt_token_ids) for sequence in self.sequences)

    def answer(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        """A response, or an event of a stream."""
        return Completion(id=self.id, created=self.created, model=self.model.name, choices=choices, usage=usage)

    def usage(self, completion_tokens: int) -> Usage:
        """The tokens of the whole request."""
        total = self.prompt_tokens + completion_tokens
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=completion_tokens, total_tokens=total)


async def plan_completion(
    body: CompletionRequest, model: ServedModel, *, max_prompts: int, arrival: float
) -> CompletionPlan:
    """Turns a request into sequences; prompt `i` of a list gets the seed `seed + i`.

    Args:
        arrival: when the request arrived, by `time.perf_counter`.

    Raises:
        ApiError: 400, a prompt is empty, too long, not text or not of the vocabulary, or there are too many.
    """
    prompts = body.prompts()
    if len(prompts) > max_prompts:
        raise ApiError(400, f"prompt has {len(prompts)} prompts; at most {max_prompts} are allowed", param="prompt")
    completion_id = f"cmpl-{uuid.uuid4().hex}"
    seed = body.seed if body.seed is not None else secrets.randbits(63)
    sequences = []
    for index, prompt in enumerate(prompts):
        token_ids = await _token_ids(prompt, model)
        _check_length(len(token_ids), body.max_tokens, model.engine.info.context_length)
        sampling = SamplingParams(
            max_tokens=body.max_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            seed=seed + index,
            stop_token_ids=frozenset() if body.ignore_eos else model.tokenizer.end_token_ids,
        )
        request = GenerationRequest(f"{completion_id}-{index}", token_ids, sampling)
        sequences.append(SequencePlan(index, request, arrival, body.stops()))
    return CompletionPlan(completion_id, int(time.time()), model, sequences)


async def complete(plan: CompletionPlan) -> Completion:
    """The whole answer at once. Raises as `generate` does."""
    choices = [CompletionChoice(index=sequence.index, text="") for sequence in plan.sequences]
    completion_tokens = 0
    async with aclosing(generate(plan.model, plan.sequences)) as chunks:
        async for chunk in chunks:
            choice = choices[chunk.index]
            choice.text += chunk.text
            choice.finish_reason = _finish_reason(chunk)
            completion_tokens += chunk.tokens
    return plan.answer(choices, plan.usage(completion_tokens))


async def stream(plan: CompletionPlan, *, include_usage: bool) -> AsyncGenerator[str, None]:
    """The answer piece by piece, as JSON texts, one a token. Raises as `generate` does.

    Args:
        include_usage: adds an event without choices that holds the usage; the other events then say null there.
    """
    excluded = None if include_usage else {"usage"}
    completion_tokens = 0
    async with aclosing(generate(plan.model, plan.sequences)) as chunks:
        async for chunk in chunks:
            choice = CompletionChoice(index=chunk.index, text=chunk.text, finish_reason=_finish_reason(chunk))
            completion_tokens += chunk.tokens
            yield plan.answer([choice]).model_dump_json(exclude=excluded)
    if include_usage:
        yield plan.answer([], plan.usage(completion_tokens)).model_dump_json()


async def _token_ids(prompt: str | list[int], model: ServedModel) -> tuple[int, ...]:
    if isinstance(prompt, str):
        try:
            # In a thread: a long text takes its time, and the other clients' tokens must not wait for it.
            token_ids = await asyncio.to_thread(model.tokenizer.encode, prompt)
        except UnicodeEncodeError:
            message = "prompt holds half of a surrogate pair, which is no character"
            raise ApiError(400, message, param="prompt") from None
    else:
        token_ids = tuple(prompt)
    if not token_ids:
        raise ApiError(400, "prompt is empty, and this model's tokenizer puts no token in front of it", param="prompt")
    vocabulary = model.engine.info.vocab_size
    foreign = next((id for id in token_ids if not 0 <= id < vocabulary), None)
    if foreign is not None:
        message = f"prompt holds the token id {shortened(str(foreign))}; this model's ids are 0 to {vocabulary - 1}"
        raise ApiError(400, message, param="prompt")
    return token_ids


def _check_length(prompt_tokens: int, max_tokens: int, context: int) -> None:
    if prompt_tokens + max_tokens <= context:
        return
    raise ApiError(
        400,
        f"this model's context is {context} tokens; the prompt has {prompt_tokens} and max_tokens asks for "
        f"{max_tokens} more",
        param="max_tokens" if prompt_tokens < context else "prompt",
        code="context_length_exceeded",
    )


def _finish_reason(chunk: TextChunk) -> Literal["stop", "length"] | None:
    """OpenAI's word for it. An abort never gets here: it is an error."""
    if chunk.finish_reason is None or chunk.finish_reason is FinishReason.ABORT:
        return None
    return cast(Literal["stop", "length"], chunk.finish_reason.value)
