"""The way from an engine's thread to its clients, each of whom waits in an event loop.

Waking an event loop, and a client in it, costs about as much as a small model takes for a token. So a `Mailroom`
brings what has come for all streams of a loop at once, and no more often than every `interval_s`. Only the first and
the last event of a sequence, and errors, do not wait. A model that takes longer than that for a step is not delayed.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import NamedTuple
from weakref import WeakKeyDictionary

from runtime.engine.base import FinishReason, TokenChunk

Event = TokenChunk | Exception
ABORT = FinishReason.ABORT


class Letter(NamedTuple):
    """An event on its way.

    Attributes:
        urgent: an error, or a sequence's first or last chunk.
        last: an error, or the end of the last sequence.
    """

    event: Event
    urgent: bool
    last: bool


class Stream:
    """What one request has to hear. Belongs to the event loop in which it was made."""

    def __init__(self, request_id: str, sequences: int, *, gathers: bool) -> None:
        self.request_id = request_id
        self._gathers = gathers
        self.loop = asyncio.get_running_loop()
        self._submitted = time.monotonic()
        self._queued_s = 0.0  # until the first step; 0 before it
        self._unfinished = sequences
        self._silent = set(range(sequences))
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()

    async def next(self) -> Event:
        """The next event, when it is there; if the stream gathers, with all chunks of its sequence that are there."""
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        first = self._events.popleft()
        if isinstance(first, Exception) or not (self._gathers and self._events):
            return first
        same, others = [first], deque[Event]()
        for event in self._events:
            # Not an abort: it takes no tokens with it.
            if isinstance(event, TokenChunk) and event.index == first.index and event.finish_reason is not ABORT:
                same.append(event)
            else:
                others.append(event)
        self._events = others
        return _joined(same)

    def put(self, event: Event) -> None:
        """Called in the stream's event loop."""
        self._events.append(event)
        self._arrived.set()

    def scheduled(self) -> None:
        """The request is part of a step that is about to begin."""
        if not self._queued_s:
            self._queued_s = time.monotonic() - self._submitted

    def letter(self, event: Event) -> Letter:
        """An event as it is about to be sent: a sequence's first chunk learns how long the request had to wait."""
        if isinstance(event, Exception):
            return Letter(event, urgent=True, last=True)
        first, ends = event.index in self._silent, event.finish_reason is not None
        if first:
            self._silent.remove(event.index)
            event = replace(event, queued_s=self._queued_s)
        self._unfinished -= ends
        return Letter(event, urgent=first or ends, last=not self._unfinished)


class Mailroom:
    """Brings events to streams. `send` may be called from any thread, by one caller at a time."""

    def __init__(self, interval_s: float) -> None:
        """Takes the least time between two deliveries to an event loop; 0 delivers each event by itself, at once."""
        self._interval_s = interval_s
        self._rounds: WeakKeyDictionary[asyncio.AbstractEventLoop, _Round] = WeakKeyDictionary()

    def open(self, request_id: str, sequences: int) -> Stream:
        """The way to a client in the running event loop; what that one is slow to take is gathered too."""
        return Stream(request_id, sequences, gathers=self._interval_s > 0)

    def send(self, events: Iterable[tuple[Stream, Event]]) -> set[Stream]:
        """Sends events; returns the streams that are over.

        Over is a stream that has had its last event, or whose event loop is closed, so that nobody listens any more.
        """
        over = set[Stream]()
        mail: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Event]]] = {}
        urgent = set[asyncio.AbstractEventLoop]()
        for stream, event in events:
            letter = stream.letter(event)
            mail.setdefault(stream.loop, []).append((stream, letter.event))
            if letter.urgent:
                urgent.add(stream.loop)
            if letter.last:
                over.add(stream)
        for loop, delivery in mail.items():
            if loop not in self._rounds:
                self._rounds[loop] = _Round(self._interval_s)
            try:
                self._rounds[loop].add(loop, delivery, urgent=loop in urgent)
            except RuntimeError:
                over.update(stream for stream, _ in delivery)
        return over


class _Round:
    """The deliveries to one event loop."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._mail: list[tuple[Stream, Event]] = []
        self._expected = False  # a delivery is under way to the loop, or its timer runs
        self._timer: asyncio.TimerHandle | None = None

    def add(self, loop: asyncio.AbstractEventLoop, delivery: list[tuple[Stream, Event]], *, urgent: bool) -> None:
        """Raises RuntimeError if the loop is closed."""
        with self._lock:
            self._mail += delivery
            wake = urgent or not self._expected
            self._expected = True
        if wake:
            loop.call_soon_threadsafe(self._deliver, loop)

    def _deliver(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            mail, self._mail = self._mail, []
            # The timer that finds nothing to deliver is the last: what comes then, comes at once.
            again = self._expected = bool(mail) and self._interval_s > 0
        for stream, event in mail:
            stream.put(event)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_later(self._interval_s, self._deliver, loop) if again else None


def _joined(chunks: list[TokenChunk]) -> TokenChunk:
    first, last = chunks[0], chunks[-1]
    return replace(
        first,
        token_ids=tuple(chain.from_iterable(chunk.token_ids for chunk in chunks)),
        finish_reason=last.finish_reason,
        logprobs=None if first.logprobs is None else tuple(chain.from_iterable(c.logprobs or () for c in chunks)),
    )
