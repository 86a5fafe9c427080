"""The engine around every local `ModelRunner`: one thread that schedules, computes, samples and delivers.

One lock guards the scheduler and the table of live requests. The event loop's side (`generate`, `abort`, `stats`)
holds it for microseconds; the worker lets go of it while the runner computes. An abort therefore takes effect at once:
what the running step yields for that request is dropped, and its blocks go to nobody before the step has ended.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from runtime.engine.base import (
    DrainingError,
    EngineDeadError,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationError,
    GenerationRequest,
    RequestRejectedError,
    TokenChunk,
)
from runtime.engine.kv_cache import BlockPool
from runtime.engine.runner import ModelRunner
from runtime.engine.scheduler import Scheduler, SchedulerLimits
from runtime.engine.step import OutcomeReader, Step
from runtime.engine.stream import Mailroom, Stream
from runtime.engine.validation import check_request

log = logging.getLogger(__name__)


class LocalEngine:
    """An `Engine` that runs a `ModelRunner` in a thread of its own. `shutdown` ends the thread."""

    def __init__(
        self, runner: ModelRunner, limits: SchedulerLimits | None = None, stream_interval_s: float = 0.0
    ) -> None:
        """`stream_interval_s`: see `Mailroom`; with 0 each token is delivered by itself, at once."""
        self._runner = runner
        self._limits = limits or SchedulerLimits()
        self._scheduler = Scheduler(BlockPool(runner.num_blocks, runner.block_size), self._limits)
        self._reader = OutcomeReader(runner.info.vocab_size)
        self._streams: dict[str, Stream] = {}
        self._mailroom = Mailroom(stream_interval_s)
        self._draining = self._stopping = False
        self._death: str | None = None
        self._step_began: float | None = None  # of the step that is under way
        self._progressed = time.monotonic()  # when a step last ended, or work came to an idle engine
        self._observe: Callable[[float, int], None] = lambda *_: None
        # The lock of all of the above but the steps' times, and the bell that is rung when any of it changes.
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, name=f"osp-engine-{runner.info.engine}", daemon=True)
        self._worker.start()

    @property
    def info(self) -> EngineInfo:
        """See `Engine.info`."""
        return self._runner.info

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """See `Engine.generate`."""
        check_request(request, self.info)
        stream = self._submit(request)
        unfinished = request.n
        try:
            while unfinished:
                event = await stream.next()
                if isinstance(event, Exception):
                    raise event
                unfinished -= event.finish_reason is not None
                yield event
        finally:
            # Without effect after a last event. Otherwise the client has closed the iterator or was cancelled.
            with self._changed:
                self._forget(stream)

    async def abort(self, request_id: str, index: int | None = None) -> None:
        """See `Engine.abort`."""
        with self._changed:
            self._abort(request_id, index)

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        with self._changed:
            return self._scheduler.stats()

    async def start(self) -> None:
        """See `Engine.start`: there is nothing left to do."""

    def observe_steps(self, observer: Callable[[float, int], None]) -> None:
        """See `Engine.observe_steps`. What the observer raises kills the engine."""
        self._observe = observer

    async def check_health(self) -> None:
        """See `Engine.check_health`. A step that hangs and ends after all makes the engine healthy again."""
        with self._changed:
            if self._death is None and not self._worker.is_alive():
                self._die("the engine's thread has ended")
            self._require_alive()
            if stall := self._stall():
                error = EngineDeadError(stall)
                for stream in self._mailroom.send((stream, error) for stream in list(self._streams.values())):
                    self._forget(stream)
                raise error

    async def shutdown(self, drain_s: float) -> None:
        """See `Engine.shutdown`. A step that hangs is left behind after `step_timeout_s`."""
        # Not in asyncio's own threads: there the drain would queue behind whatever else the process has put there.
        executor = ThreadPoolExecutor(1, "osp-drain")
        await asyncio.get_running_loop().run_in_executor(executor, self._drain_and_stop, drain_s)
        executor.shutdown()

    # The client's side.

    def _submit(self, request: GenerationRequest) -> Stream:
        stream = self._mailroom.open(request.request_id, request.n)
        with self._changed:
            self._require_alive()
            if stall := self._stall():
                raise EngineDeadError(stall)
            if self._draining:
                raise DrainingError("the engine is draining: it is about to shut down and takes no new requests")
            if request.request_id in self._streams:
                raise RequestRejectedError(f"a request with the id {request.request_id!r} is running already")
            idle = self._scheduler.idle and self._step_began is None
            self._scheduler.add(request)
            self._progressed = time.monotonic() if idle else self._progressed
            self._streams[request.request_id] = stream
            self._changed.notify_all()
        return stream

    def _require_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death)

    def _stall(self) -> str | None:
        """Why the engine, though alive, does not get on with its work; None: it does, or it has none."""
        waited, limit = time.monotonic() - self._progressed, self._limits.step_timeout_s
        if waited <= limit or (self._scheduler.idle and self._step_began is None):
            return None
        return f"no step has ended for {waited:.1f} s, more than step_timeout_s of {limit:g} s; it seems to hang"

    # Both sides; the lock is held.

    def _abort(self, request_id: str, index: int | None = None) -> None:
        # A dead engine has no streams, whatever its scheduler still holds.
        ended = self._scheduler.abort(request_id, index) if request_id in self._streams else []
        self._deliver((request_id, TokenChunk((), FinishReason.ABORT, i)) for i in ended)

    def _deliver(self, news: Iterable[tuple[str, TokenChunk | GenerationError]]) -> None:
        for stream in self._mailroom.send((self._streams[request_id], event) for request_id, event in news):
            self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        # The id may be another request's by now.
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
            self._scheduler.abort(stream.request_id)
            self._changed.notify_all()

    # The worker's side.

    def _work(self) -> None:
        try:
            while step := self._next_step():
                self._compute(step)
        except Exception as error:
            log.exception("the engine has died")
            self._die(f"the engine has died of {type(error).__name__}: {error}")
        else:
            self._die("the engine has been shut down")

    def _next_step(self) -> Step | None:
        """Sleeps until there is work. None: the engine is to stop."""
        with self._changed:
            while self._scheduler.idle and not self._stopping:
                self._changed.wait()
            if self._stopping:
                return None
            step = self._scheduler.schedule()
            for sequence in step.sequences:
                self._streams[sequence.request.request_id].scheduled()
            return step

    def _compute(self, step: Step) -> None:
        self._step_began = began = time.monotonic()
        if step.copies:
            sources, targets = zip(*step.copies, strict=True)
            self._runner.copy_blocks(sources, targets)
        outcomes = self._reader.read(step, self._runner.step(step.slices))
        self._step_began, self._progressed = None, time.monotonic()
        self._observe(self._progressed - began, sum(len(slice_.token_ids) for slice_ in step.slices))
        with self._changed:
            self._deliver(self._scheduler.advance(step, outcomes))

    def _die(self, reason: str) -> None:
        with self._changed:
            self._death = reason
            self._mailroom.send((stream, EngineDeadError(reason)) for stream in self._streams.values())
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
            patience = 0 if self._stall() else self._limits.step_timeout_s
        self._worker.join(patience)
        if self._worker.is_alive():
            log.error("the step under way hangs; its thread is left behind")
            self._die("the engine has been shut down; its last step hangs")
