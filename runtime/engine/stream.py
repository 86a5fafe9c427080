"""The way from an engine's thread to its clients, each of whom waits in an event loop."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable

from runtime.engine.base import TokenChunk

Event = TokenChunk | Exception


class Stream:
    """What one request has to hear. Belongs to the event loop in which it was made.

    Attributes:
        queued_s: seconds until the request's first step; 0 before it.
    """

    def __init__(self, request_id: str, sequences: int) -> None:
        self.request_id = request_id
        self.queued_s = 0.0
        self._submitted = time.monotonic()
        self._scheduled = False
        self._unfinished = sequences
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    async def next(self) -> Event:
        """The next event, when it is there."""
        return await self._events.get()

    def scheduled(self) -> None:
        """The request is part of a step that is about to begin."""
        if not self._scheduled:
            self._scheduled = True
            self.queued_s = time.monotonic() - self._submitted

    def ends_with(self, event: Event) -> bool:
        """Whether an event, which is about to be sent, is the last: an error, or the end of the last sequence."""
        if isinstance(event, Exception):
            return True
        self._unfinished -= event.finish_reason is not None
        return not self._unfinished

    @staticmethod
    def send(events: Iterable[tuple[Stream, Event]]) -> set[Stream]:
        """Sends events, from any thread; returns the streams that are over.

        Over is a stream that has had its last event, or whose event loop is closed, so that nobody listens any more.
        """
        over, letters = set(), defaultdict(list)
        for stream, event in events:
            letters[stream._loop].append((stream, event))
            if stream.ends_with(event):
                over.add(stream)
        for loop, letter in letters.items():
            try:
                loop.call_soon_threadsafe(_put, letter)  # one for all: each wakes the loop, which costs a system call
            except RuntimeError:
                over.update(stream for stream, _ in letter)
        return over


def _put(letter: list[tuple[Stream, Event]]) -> None:
    for stream, event in letter:
        stream._events.put_nowait(event)
