"""An engine that says what a test tells it to say, when it tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from runtime.engine.base import (
    EngineDeadError,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationRequest,
    QueueFullError,
    TokenChunk,
)
from runtime.engine.validation import check_request

Script = Callable[[GenerationRequest], Sequence[int]]


class ScriptedEngine:
    """Implements `Engine`. Each request gets the tokens of `script`, one a chunk, cut at `max_tokens`.

    Attributes:
        requests: all that were submitted.
        aborted: ids of those that ended early.
        dies_after: the engine is dead once a request has got this many tokens.
        stalls_after: a request gets no more than this many tokens, and no end.
        full: whether the queue is full.
    """

    def __init__(self, script: Script, *, context_length: int = 64, vocab_size: int = 300) -> None:
        self.info = EngineInfo("scripted", "w4a4", context_length, vocab_size)
        self.requests: list[GenerationRequest] = []
        self.aborted: list[str] = []
        self.dies_after: int | None = None
        self.stalls_after: int | None = None
        self.full = False
        self._script = script
        self._live: dict[str, asyncio.Event] = {}

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        check_request(request, self.info)
        if self.full:
            raise QueueFullError("the queue is full")
        self.requests.append(request)
        self._live[request.request_id] = aborted = asyncio.Event()
        tokens = list(self._script(request))[: request.sampling.max_tokens]
        try:
            for count, token in enumerate(tokens, 1):
                if self.dies_after is not None and count > self.dies_after:
                    raise EngineDeadError("the engine has died of a test")
                if self.stalls_after is not None and count > self.stalls_after:
                    await aborted.wait()
                if aborted.is_set():
                    yield TokenChunk((), FinishReason.ABORT)
                    return
                await asyncio.sleep(0)
                ended = token in request.sampling.stop_token_ids
                full = count == request.sampling.max_tokens
                reason = FinishReason.STOP if ended else FinishReason.LENGTH if full else None
                yield TokenChunk((token,), reason)
                if reason is not None:
                    del self._live[request.request_id]
                    return
            raise AssertionError("the script is shorter than max_tokens")
        finally:
            await self.abort(request.request_id)

    async def abort(self, request_id: str, index: int | None = None) -> None:
        if live := self._live.pop(request_id, None):
            self.aborted.append(request_id)
            live.set()

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self._live), waiting=0, kv_usage=0.25)

    async def start(self) -> None:
        pass

    def observe_steps(self, observer: Callable[[float, int], None]) -> None:
        """It has no steps."""

    async def check_health(self) -> None:
        if self.dies_after is not None:
            raise EngineDeadError("the engine has died of a test")

    async def shutdown(self, drain_s: float) -> None:
        for request_id in list(self._live):
            await self.abort(request_id)
