"""The engine around every local `ModelRunner`: one thread that schedules, computes, samples and delivers.

One lock guards the scheduler and the table of live requests. The event loop's side (`generate`, `abort`, `stats`)
holds it for microseconds; the worker lets go of it while the runner computes. An abort therefore takes effect at once:
what the running step yields for that request is dropped, and its blocks go to nobody before the step has ended.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.engine.base import (
    DrainingError,
    EngineDeadError,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationError,
    GenerationRequest,
    ModelRunner,
    RequestRejectedError,
    TokenChunk,
)
from runtime.engine.kv_cache import BlockAllocator
from runtime.engine.sampler import LogitsError, sample
from runtime.engine.scheduler import RunningSequence, Scheduler, SchedulerLimits, Step
from runtime.engine.validation import check_request

log = logging.getLogger(__name__)

Event = TokenChunk | Exception


@dataclass(frozen=True, slots=True, eq=False)
class _Stream:
    """The way from the worker to one client: a queue that belongs to the client's event loop."""

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)

    def send(self, event: Event) -> bool:
        """Called from any thread. False: the client's event loop is closed, so nobody listens any more."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:
            return False
        return True


class LocalEngine:
    """An `Engine` that runs a `ModelRunner` in a thread of its own. `shutdown` ends the thread."""

    def __init__(self, runner: ModelRunner, limits: SchedulerLimits | None = None) -> None:
        self._runner = runner
        self._scheduler = Scheduler(BlockAllocator(runner.num_blocks, runner.block_size), limits or SchedulerLimits())
        self._streams: dict[str, _Stream] = {}
        self._draining = self._stopping = False
        self._death: str | None = None
        # The lock of all of the above, and the bell that is rung when any of it changes.
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, name=f"osp-engine-{runner.info.engine}", daemon=True)
        self._worker.start()

    @property
    def info(self) -> EngineInfo:
        return self._runner.info

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """See `Engine.generate`."""
        check_request(request, self.info)
        stream = self._submit(request)
        try:
            while True:
                event = await stream.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            # Without effect after a last event. Otherwise the client has closed the iterator or was cancelled.
            self._end(request.request_id, stream)

    async def abort(self, request_id: str, index: int | None = None) -> None:
        """See `Engine.abort`."""
        if index not in (None, 0):
            return
        with self._changed:
            self._abort(request_id)

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        with self._changed:
            return self._scheduler.stats()

    async def check_health(self) -> None:
        """See `Engine.check_health`."""
        with self._changed:
            self._require_alive()

    async def shutdown(self, drain_s: float) -> None:
        """See `Engine.shutdown`. May be called again, also to shorten a drain that is under way."""
        # Not in asyncio's own threads: there the drain would queue behind whatever else the process has put there.
        executor = ThreadPoolExecutor(1, "osp-drain")
        await asyncio.get_running_loop().run_in_executor(executor, self._drain_and_stop, drain_s)
        executor.shutdown()

    # The client's side.

    def _submit(self, request: GenerationRequest) -> _Stream:
        stream = _Stream()
        with self._changed:
            self._require_alive()
            if self._draining:
                raise DrainingError("the engine is draining: it is about to shut down and takes no new requests")
            if request.request_id in self._streams:
                raise RequestRejectedError(f"a request with the id {request.request_id!r} is running already")
            self._scheduler.add(request)
            self._streams[request.request_id] = stream
            self._changed.notify_all()
        return stream

    def _end(self, request_id: str, stream: _Stream) -> None:
        with self._changed:
            # The id may be another request's by now.
            if self._streams.get(request_id) is stream:
                self._drop(request_id)

    def _require_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death)

    # Both sides; the lock is held.

    def _abort(self, request_id: str) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            self._drop(request_id)
            stream.send(TokenChunk((), FinishReason.ABORT))

    def _drop(self, request_id: str) -> None:
        del self._streams[request_id]
        self._scheduler.abort(request_id)
        self._changed.notify_all()

    # The worker's side.

    def _work(self) -> None:
        try:
            while step := self._next_step():
                logits_NV = self._runner.step(step.slices).rows()
                self._deliver(step, _sample_all(step.sampled(), logits_NV))
        except Exception as error:
            log.exception("the engine has died")
            self._die(f"the engine has died of {type(error).__name__}: {error}")
        else:
            self._die("the engine has been shut down")

    def _next_step(self) -> Step | None:
        """Sleeps until there is work. None: the engine is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or not self._scheduler.idle)
            return None if self._stopping else self._scheduler.schedule()

    def _deliver(self, step: Step, outcomes: dict[RunningSequence, int | GenerationError]) -> None:
        with self._changed:
            for sequence, outcome in outcomes.items():
                if isinstance(outcome, GenerationError) and not sequence.finished:
                    self._streams[sequence.request.request_id].send(outcome)
                    self._drop(sequence.request.request_id)
            tokens = {sequence: outcome for sequence, outcome in outcomes.items() if isinstance(outcome, int)}
            for request_id, chunk in self._scheduler.advance(step, tokens).items():
                listening = self._streams[request_id].send(chunk)
                if chunk.finish_reason is not None or not listening:
                    self._drop(request_id)

    def _die(self, reason: str) -> None:
        with self._changed:
            self._death = reason
            for stream in self._streams.values():
                stream.send(EngineDeadError(reason))
            self._streams.clear()
            self._changed.notify_all()

    def _drain_and_stop(self, drain_s: float) -> None:
        with self._changed:
            self._draining = True
            self._changed.wait_for(lambda: not self._streams, timeout=drain_s)
            for request_id in list(self._streams):
                self._abort(request_id)
            self._stopping = True
            self._changed.notify_all()
        self._worker.join()


def _sample_all(
    sequences: list[RunningSequence], logits_NV: NDArray[np.float32]
) -> dict[RunningSequence, int | GenerationError]:
    """The next token of each sequence, or why there is none: one request's NaN is not the others' affair."""
    outcomes: dict[RunningSequence, int | GenerationError] = {}
    for sequence, logits_V in zip(sequences, logits_NV, strict=True):
        request = sequence.request
        try:
            outcomes[sequence] = sample(logits_V, request.sampling, position=len(sequence.tokens))
        except LogitsError as error:
            outcomes[sequence] = GenerationError(f"request {request.request_id!r} failed: {error}")
    return outcomes
