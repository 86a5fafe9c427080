"""An engine whose requests are measured as they pass through."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from time import perf_counter
from typing import cast

from runtime.engine.base import (
    CorruptLogitsError,
    Engine,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationRequest,
    TokenChunk,
)
from runtime.server.request_record import request_record
from runtime.server.telemetry import ModelTelemetry


class MeteredEngine:
    """Implements `Engine` around another one; records what the engine does for a request, and in which time.

    What a client sees of it, which depends on the text too, is `SequenceTimer`'s to record.
    """

    def __init__(self, engine: Engine, telemetry: ModelTelemetry) -> None:
        self._engine = engine
        self._telemetry = telemetry

    @property
    def info(self) -> EngineInfo:
        """See `Engine.info`."""
        return self._engine.info

    async def start(self) -> None:
        """See `Engine.start`."""
        await self._engine.start()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """See `Engine.generate`."""
        meter = _RequestMeter(request, self._telemetry)
        chunks = cast(AsyncGenerator[TokenChunk, None], self._engine.generate(request))
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    meter.chunk(chunk)
                    yield chunk
        except CorruptLogitsError:
            self._telemetry.corrupted.inc()
            raise

    async def abort(self, request_id: str, index: int | None = None) -> None:
        """See `Engine.abort`."""
        await self._engine.abort(request_id, index)

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return self._engine.stats()

    def observe_steps(self, observer: Callable[[float, int], None]) -> None:
        """See `Engine.observe_steps`."""
        self._engine.observe_steps(observer)

    async def check_health(self) -> None:
        """See `Engine.check_health`."""
        await self._engine.check_health()

    async def shutdown(self, drain_s: float) -> None:
        """See `Engine.shutdown`."""
        await self._engine.shutdown(drain_s)


class _RequestMeter:
    """What the first chunks of one request's sequences tell."""

    def __init__(self, request: GenerationRequest, telemetry: ModelTelemetry) -> None:
        self._request = request
        self._telemetry = telemetry
        self._submitted = perf_counter()
        self._silent = set(range(request.n))

    def chunk(self, chunk: TokenChunk) -> None:
        """Takes note of a chunk."""
        if chunk.index not in self._silent or chunk.finish_reason is FinishReason.ABORT:
            return
        if len(self._silent) == self._request.n:
            self._computed(chunk.cached_tokens)
        self._silent.remove(chunk.index)
        self._telemetry.queue_time.observe(chunk.queued_s)
        self._telemetry.prefill_time.observe(perf_counter() - self._submitted - chunk.queued_s)

    def _computed(self, cached_tokens: int) -> None:
        """The prompt has been computed, once for all sequences."""
        sampling = self._request.sampling
        self._telemetry.request_prompt_tokens.observe(len(self._request.prompt_token_ids))
        self._telemetry.request_max_tokens.observe(sampling.max_tokens)
        self._telemetry.prompt_tokens_cached.inc(cached_tokens)
        record = request_record()
        record.model, record.sampling = self._telemetry.model_name, sampling
        record.cached_tokens += cached_tokens
