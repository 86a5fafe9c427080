"""Prompts side by side, from an engine's tokens to pieces of text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace

from runtime.engine.base import FinishReason, GenerationError, GenerationRequest, TokenChunk, TokenLogprobs
from runtime.server.catalog import ServedModel
from runtime.server.errors import ApiError
from runtime.server.telemetry import SequenceTimer
from runtime.text.assembler import TextAssembler, TextChunk, TextOptions


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """A prompt to continue, in one or several ways.

    Attributes:
        first_choice: the place of its first sequence among the choices of the HTTP request; the others follow.
        request: what the engine needs.
        arrival: when the HTTP request arrived, by `time.perf_counter`.
        text: how text is made of its tokens.
        echo: the text of the prompt, and where each of its tokens begins there.
    """

    first_choice: int
    request: GenerationRequest
    arrival: float
    text: TextOptions
    echo: str = ""
    echo_offsets: tuple[int, ...] = ()


async def generate(model: ServedModel, plans: Sequence[PromptPlan]) -> AsyncGenerator[TextChunk, None]:
    """Runs all sequences at once and yields their pieces as they come. Closing it aborts what still runs.

    Raises:
        RequestRejectedError, EngineDeadError, GenerationError: see `Engine.generate`. One failed sequence ends all.
        ApiError: the engine was told to shut down before the sequence was finished, or the request left no token
            that could have come next.
    """
    streams = [_continue(model, plan) for plan in plans]
    # Most requests have one prompt, and need no task for each of its tokens.
    merged = streams[0] if len(streams) == 1 else _merge(streams)
    async with aclosing(merged):
        async for chunk in merged:
            yield chunk


async def _continue(model: ServedModel, plan: PromptPlan) -> AsyncGenerator[TextChunk, None]:
    """The pieces of all sequences of one prompt."""
    request = plan.request
    unfinished = {i: TextAssembler(model.tokenizer, plan.text) for i in range(request.n)}
    with ExitStack() as timing:
        timers = [
            # The engine computes a prompt once, however many sequences it gets.
            timing.enter_context(SequenceTimer(model.telemetry, len(request.prompt_token_ids) * (i == 0), plan.arrival))
            for i in range(request.n)
        ]
        try:
            chunks = model.engine.generate(request)
            if request.sampling.prompt_logprobs is not None and request.n > 1:
                chunks = _with_scored_prompt(chunks)
            async for token_chunk in chunks:
                child = token_chunk.index
                if child not in unfinished:
                    continue  # ended here by a stop string; the engine reports its abort
                if token_chunk.finish_reason is FinishReason.ABORT:
                    raise ApiError(503, "the server is shutting down; the text is cut off", code="shutting_down")
                chunk = unfinished[child].accept(token_chunk, plan.first_choice + child)
                timers[child].tokens(len(chunk.token_ids))
                if chunk.finish_reason is not None:
                    # Before the piece goes out: a client that has its whole answer finds it counted.
                    timers[child].finished(chunk.finish_reason)
                    del unfinished[child]
                    if token_chunk.finish_reason is None and unfinished:
                        await model.engine.abort(request.request_id, child)
                yield chunk
                if not unfinished:
                    return
        except GenerationError as error:
            raise _blame(error, request) from error
        finally:
            # The engine does not know of stop strings, nor of clients that leave. It ignores ids that are done.
            await model.engine.abort(request.request_id)


def _blame(error: GenerationError, request: GenerationRequest) -> Exception:
    """The request's own fault, where it has narrowed down what may come until nothing was left."""
    sampling = request.sampling
    narrowed = sampling.guide is not None or sampling.allowed_token_ids is not None or sampling.banned_token_ids
    if type(error) is GenerationError and (narrowed or sampling.min_tokens):
        return ApiError(400, f"what the request demands of the text cannot be met: {error}", code="unsatisfiable")
    return error


async def _with_scored_prompt(chunks: AsyncIterator[TokenChunk]) -> AsyncIterator[TokenChunk]:
    """Each sequence's first chunk with the prompt's log-probabilities, which the engine tells sequence 0 only."""
    scored: tuple[TokenLogprobs | None, ...] | None = None
    begun: set[int] = set()
    waiting: list[TokenChunk] = []
    async for chunk in chunks:
        if scored is None and chunk.prompt_logprobs is None and chunk.finish_reason is not FinishReason.ABORT:
            waiting.append(chunk)
            continue
        scored = scored or chunk.prompt_logprobs
        for ready in (chunk, *waiting):
            yield ready if ready.index in begun else replace(ready, prompt_logprobs=scored)
            begun.add(ready.index)
        waiting = []


async def _merge(streams: Sequence[AsyncGenerator[TextChunk, None]]) -> AsyncGenerator[TextChunk, None]:
    """Yields from all streams as their items come; each is at most one item ahead of the reader."""
    waiting = {asyncio.ensure_future(anext(stream)): stream for stream in streams}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                stream = waiting.pop(future)
                try:
                    chunk = future.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(stream))] = stream
                yield chunk
    finally:
        for future in waiting:
            future.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
