"""The flow of `/v1/completions`: a request, the sequences that it asks for, their text, the answer."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from runtime.engine.base import GenerationRequest
from runtime.server.answer import TokenCount, collect, finish_reason
from runtime.server.catalog import ServedModel
from runtime.server.errors import ApiError
from runtime.server.generation import PromptPlan, generate
from runtime.server.logprobs import LogprobWriter
from runtime.server.sampling import sampling_params, text_options
from runtime.server.schemas.completions import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from runtime.server.schemas.usage import Usage
from runtime.server.structured import compile_guide
from runtime.server.tokenization import check_ids, check_length, encode_text, spelled, truncate
from runtime.text.assembler import TextChunk


@dataclass(frozen=True, slots=True)
class CompletionPlan:
    """A checked request: nothing that can be known beforehand stands against it any more."""

    id: str
    created: int
    model: ServedModel
    body: CompletionRequest
    prompts: list[PromptPlan]

    def answer(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        """A response, or an event of a stream."""
        return Completion(id=self.id, created=self.created, model=self.model.name, choices=choices, usage=usage)

    def choice(self, chunk: TextChunk, *, begins: bool) -> CompletionChoice:
        """A piece of a choice, which has the prompt in front where it `begins` the choice and the prompt is wanted."""
        body, prompt = self.body, self.prompts[chunk.index // self.body.n]
        echoed = body.echo and begins
        prompt_ids, ids = prompt.request.prompt_token_ids, chunk.token_ids
        choice = CompletionChoice(
            index=chunk.index,
            text=prompt.echo + chunk.text if echoed else chunk.text,
            logprobs=None if body.logprobs is None else self._logprobs(chunk, prompt, echoed=echoed),
            finish_reason=finish_reason(chunk),
            stop_reason=chunk.stop_reason,
        )
        if body.prompt_logprobs is not None and chunk.prompt_logprobs is not None:
            choice.prompt_logprobs = self._writer(body.prompt_logprobs).prompt(chunk.prompt_logprobs)
        if body.return_token_ids:
            choice.token_ids = list(ids)
            choice.prompt_token_ids = list(prompt_ids) if begins else None
        return choice

    def _logprobs(self, chunk: TextChunk, prompt: PromptPlan, *, echoed: bool) -> CompletionLogprobs:
        ids, logprobs = chunk.token_ids, chunk.logprobs or ()
        offsets = [len(prompt.echo) * self.body.echo + offset for offset in chunk.offsets]
        writer = self._writer(self.body.logprobs or 0)
        if not echoed:
            return writer.completion(ids, logprobs, offsets)
        return writer.completion(
            (*prompt.request.prompt_token_ids, *ids),
            (*(chunk.prompt_logprobs or ()), *logprobs),
            (*prompt.echo_offsets, *offsets),
        )

    def _writer(self, top: int) -> LogprobWriter:
        return LogprobWriter(self.model.tokenizer, top, self.body.return_tokens_as_token_ids)


async def plan_completion(
    body: CompletionRequest, model: ServedModel, *, max_choices: int, arrival: float
) -> CompletionPlan:
    """Turns a request into sequences; prompt `i` of a list gets the seed `seed + i`.

    Args:
        max_choices: most choices of one request.
        arrival: when the request arrived, by `time.perf_counter`.

    Raises:
        ApiError: 400, a prompt is empty, too long, not text or not of the vocabulary, there are too many, or a field
            asks for what cannot be.
    """
    prompts = body.prompts()
    if len(prompts) * body.n > max_choices:
        message = f"{len(prompts)} prompts with n = {body.n} are too many; at most {max_choices} choices are allowed"
        raise ApiError(400, message, param="prompt" if len(prompts) > 1 else "n")
    guide = await compile_guide(body, model)
    request_id = f"cmpl-{uuid.uuid4().hex}"
    sampling = sampling_params(
        body,
        model,
        max_tokens=body.max_tokens,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        guide=guide,
        logprobs=body.logprobs,
        prompt_logprobs=_scored_tokens(body),
    )
    plans = []
    for index, prompt in enumerate(prompts):
        token_ids, echo, offsets = await _prompt(prompt, body, model)
        check_length(len(token_ids), body.max_tokens, model, params=("prompt", "max_tokens"))
        request = GenerationRequest(
            request_id=f"{request_id}-{index}",
            prompt_token_ids=token_ids,
            sampling=replace(sampling, seed=sampling.seed + index),
            n=body.n,
            priority=body.priority,
            cache_salt=body.cache_salt,
        )
        plans.append(PromptPlan(index * body.n, request, arrival, text_options(body, model), echo, offsets))
    id = request_id if body.request_id is None else f"cmpl-{body.request_id}"
    return CompletionPlan(id, int(time.time()), model, body, plans)


async def complete(plan: CompletionPlan) -> Completion:
    """The whole answer at once. Raises as `generate` does."""
    count = TokenCount(plan.prompts)
    async with aclosing(generate(plan.model, plan.prompts)) as chunks:
        whole = await collect(chunks)
    for chunk in whole:
        count.add(chunk)
    return plan.answer([plan.choice(chunk, begins=True) for chunk in whole], count.usage())


async def stream(plan: CompletionPlan) -> AsyncGenerator[str, None]:
    """The answer piece by piece, as JSON texts. Raises as `generate` does.

    Where the usage is wanted, a last event without choices holds it; the other events then say null there.
    """
    body, count, begun = plan.body, TokenCount(plan.prompts), set[int]()
    unasked: dict[str, Any] = unasked_fields(body)
    if not (body.include_usage or body.continuous_usage):
        unasked["usage"] = True
    async with aclosing(generate(plan.model, plan.prompts)) as chunks:
        async for chunk in chunks:
            count.add(chunk)
            usage = count.usage_of(chunk.index) if body.continuous_usage else None
            choice = plan.choice(chunk, begins=chunk.index not in begun)
            begun.add(chunk.index)
            yield plan.answer([choice], usage).model_dump_json(exclude=unasked)
    if body.include_usage:
        yield plan.answer([], count.usage()).model_dump_json()


def unasked_fields(body: CompletionRequest) -> dict[str, Any]:
    """What is left out of an answer, in pydantic's notation: fields that only those know who ask for them."""
    unasked = set[str]()
    if body.prompt_logprobs is None:
        unasked |= {"prompt_logprobs"}
    if not body.return_token_ids:
        unasked |= {"token_ids", "prompt_token_ids"}
    return {"choices": {"__all__": unasked}}


def _scored_tokens(body: CompletionRequest) -> int | None:
    """How many alternatives to the prompt's tokens the engine is asked for. Where it makes no text, it scores them."""
    asked = [body.prompt_logprobs, body.logprobs if body.echo else None, 0 if body.max_tokens == 0 else None]
    return max((count for count in asked if count is not None), default=None)


async def _prompt(
    prompt: str | list[int], body: CompletionRequest, model: ServedModel
) -> tuple[tuple[int, ...], str, tuple[int, ...]]:
    """The token ids of a prompt, its text and where in it each token begins; the latter two only if they are wanted."""
    if isinstance(prompt, str):
        whole = await encode_text(prompt, model, add_special_tokens=body.add_special_tokens)
    else:
        whole = tuple(prompt)
        check_ids(whole, model, "prompt")
    room = model.engine.info.context_length - body.max_tokens
    token_ids = truncate(whole, body.truncate_prompt_tokens, body.truncation_side, room)
    if not body.echo:
        return token_ids, "", ()
    as_sent = isinstance(prompt, str) and token_ids == whole
    begins_text = body.truncation_side == "right" or token_ids == whole
    skip = as_sent or body.skip_special_tokens
    text, offsets = spelled(model.tokenizer, token_ids, skip_special_tokens=skip, begins_text=begins_text)
    # A text comes back as it was sent, even where the tokenizer's normalizer has changed it.
    echo = prompt if as_sent and isinstance(prompt, str) else text
    return token_ids, echo, tuple(min(offset, len(echo)) for offset in offsets)
