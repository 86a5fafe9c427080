"""Server-sent events, and clients that leave before their answer is complete."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from runtime.server.errors import CLIENT_CLOSED_REQUEST, ApiError, as_api_error

log = logging.getLogger(__name__)

DONE = "data: [DONE]\n\n"
Result = TypeVar("Result")


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Awaits `work`, and cancels it as soon as the client disconnects.

    Args:
        receive: of a request whose body has been read, so that nothing but the disconnect is left to come.

    Raises:
        ApiError: the client has left; the answer goes nowhere.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client has disconnected")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        # Not before the work has cleaned up after itself: it has an engine to tell.
        await asyncio.gather(working, leaving, return_exceptions=True)


async def open_event_stream(request: Request, events: AsyncGenerator[str, None]) -> EventStream:
    """Waits for the first event, then answers with all of them.

    So whatever goes wrong before the first token is an ordinary error with a status of its own: raises what `events`
    raises there.
    """
    first = await unless_disconnected(request.receive, anext(events))
    return EventStream(first, events)


class EventStream(StreamingResponse):
    """JSON texts as server-sent events, then `[DONE]`. An error midway is an event too: the status has gone out."""

    def __init__(self, first: str, rest: AsyncGenerator[str, None]) -> None:
        self._events = _framed(first, rest)
        # Proxies that buffer would deliver all tokens at the end; nginx can be asked not to.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Sends until the events end or the client leaves, even one that leaves while no event comes."""
        async with aclosing(self._events):
            try:
                await unless_disconnected(receive, self.stream_response(send))
            except ApiError as error:
                log.debug("stream ended: %s", error)


async def _framed(first: str, rest: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    async with aclosing(rest):
        yield f"data: {first}\n\n"
        try:
            async for event in rest:
                yield f"data: {event}\n\n"
        except Exception as error:
            answer = as_api_error(error)
            if answer.status == 500:
                log.exception("a stream has failed")
            yield f"data: {json.dumps(answer.body())}\n\n"
        yield DONE


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
