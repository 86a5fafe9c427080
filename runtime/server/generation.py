"""One sequence, or several side by side, from an engine's tokens to pieces of text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from runtime.engine.base import FinishReason, GenerationRequest, TokenChunk
from runtime.server.catalog import ServedModel
from runtime.server.errors import ApiError
from runtime.server.telemetry import SequenceTimer
from runtime.text.detokenizer import Detokenizer
from runtime.text.stop import StopMatcher
from runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """A sequence to generate.

    Attributes:
        index: its place in the HTTP request.
        request: what the engine needs.
        arrival: when the HTTP request arrived, by `time.perf_counter`.
        stops: the strings that end its text.
    """

    index: int
    request: GenerationRequest
    arrival: float
    stops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TextChunk:
    """The next piece of a sequence. `text` may be empty: the tokens so far may end within a character."""

    index: int
    text: str
    tokens: int
    finish_reason: FinishReason | None = None


async def generate(model: ServedModel, plans: Sequence[SequencePlan]) -> AsyncGenerator[TextChunk, None]:
    """Runs all sequences at once and yields their pieces as they come. Closing it aborts what still runs.

    Raises:
        RequestRejectedError, EngineDeadError, GenerationError: see `Engine.generate`. One failed sequence ends all.
        ApiError: the engine was told to shut down before the sequence was finished.
    """
    streams = [_generate_one(model, plan) for plan in plans]
    # Most requests have one prompt, and need no task for each of its tokens.
    merged = streams[0] if len(streams) == 1 else _merge(streams)
    async with aclosing(merged):
        async for chunk in merged:
            yield chunk


async def _generate_one(model: ServedModel, plan: SequencePlan) -> AsyncGenerator[TextChunk, None]:
    assembler = _TextAssembler(model.tokenizer, plan)
    with SequenceTimer(model.telemetry, len(plan.request.prompt_token_ids), plan.arrival) as timer:
        try:
            async for token_chunk in model.engine.generate(plan.request):
                if token_chunk.finish_reason is FinishReason.ABORT:
                    raise ApiError(503, "the server is shutting down; the text is cut off", code="shutting_down")
                chunk = assembler.accept(token_chunk)
                timer.tokens(chunk.tokens)
                if chunk.finish_reason is not None:
                    # Before the piece goes out: a client that has its whole answer finds it counted.
                    timer.finished(chunk.finish_reason)
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            # The engine does not know of stop strings, nor of clients that leave. It ignores ids that are done.
            await model.engine.abort(plan.request.request_id)


class _TextAssembler:
    """Makes text of one sequence's tokens, and ends it at a stop string."""

    def __init__(self, tokenizer: Tokenizer, plan: SequencePlan) -> None:
        self._index = plan.index
        self._end_token_ids = plan.request.sampling.stop_token_ids
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopMatcher(plan.stops)

    def accept(self, chunk: TokenChunk) -> TextChunk:
        """The text of the next tokens, up to the stop string that they complete, if they do."""
        text, tokens = "", 0
        for token_id in chunk.token_ids:
            tokens += 1
            # Most end tokens have no text. Those that do have it left out: they end the text, as stop strings do.
            if token_id not in self._end_token_ids:
                text += self._stops.push(self._detokenizer.push(token_id))
            if self._stops.matched is not None:
                break
        if chunk.finish_reason is not None:
            text += self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        reason = chunk.finish_reason if self._stops.matched is None else FinishReason.STOP
        return TextChunk(self._index, text, tokens, reason)


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
