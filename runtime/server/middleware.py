"""What happens around every request, whatever its route: its record, its id, the last resort, the size of its body.

The layers, from the outside, are put together in `runtime.server.app`:
`RequestScope`, `SecurityHeaders`, CORS, `Authentication`, `RateLimits`, `SizeLimits`.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.server.errors import ApiError, send_error
from runtime.server.request_record import RequestRecord, begin_record, request_record

log = logging.getLogger(__name__)

RecordSink = Callable[[RequestRecord], None]

_FIT_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


class RequestScope:
    """ASGI middleware, the outermost: begins a request's record, and hands it to the sinks when all is over.

    A `X-Request-Id` that the client sent goes into the record and back to the client; one that is too long or has
    other signs than a name's is replaced, since it goes into logs. An error that nobody foresaw ends here.
    """

    def __init__(self, app: ASGIApp, sinks: Sequence[RecordSink]) -> None:
        self._app = app
        self._sinks = sinks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the request inside of its record."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = _record_of(scope)
        begin_record(record)
        # For the routes: latencies count from here, before the body is read.
        scope.setdefault("state", {})["arrival"] = record.arrival

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", record.id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            log.exception("request %s has failed", record.id)
            if record.status is not None:
                raise  # midway: the web server cuts the connection, so that nobody takes the rest for the whole
            await send_error(error, scope, receive, send_with_id)
        finally:
            record.route = getattr(scope.get("route"), "path", None)
            for sink in self._sinks:
                sink(record)


def _record_of(scope: Scope) -> RequestRecord:
    headers = Headers(scope=scope)
    given = headers.get("x-request-id", "")
    return RequestRecord(
        id=given if _FIT_ID.fullmatch(given) else uuid.uuid4().hex,
        method=scope["method"],
        path=scope.get("raw_path", b"").decode("latin-1"),
        client=(scope.get("client") or ("",))[0],
        traceparent=headers.get("traceparent"),
    )


class SizeLimits:
    """ASGI middleware: answers 431 to headers and 413 to a body that are larger than they may be.

    It reads the whole body, and stops where it becomes too large: so the memory that it takes is bounded, whether or
    not its length was declared. Headers that grow without an end do not get here: see `BoundedProtocol`.
    """

    def __init__(self, app: ASGIApp, max_header_bytes: int, max_body_bytes: int, *, keep: bool = False) -> None:
        """`keep`: whether the body goes into the request's record, for the log."""
        self._app = app
        self._max_header_bytes = max_header_bytes
        self._max_body_bytes = max_body_bytes
        self._keep = keep

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on with its body read, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _header_bytes(scope) > self._max_header_bytes:
            message = f"the request's line and headers are larger than {self._max_header_bytes} bytes"
            await send_error(ApiError(431, message, code="headers_too_large"), scope, receive, send)
            return
        # The web server has checked that it is a number.
        declared = int(Headers(scope=scope).get("content-length", "0"))
        body = await self._read(receive) if declared <= self._max_body_bytes else None
        if body is None:
            message = f"the body is larger than {self._max_body_bytes} bytes"
            await send_error(ApiError(413, message, code="body_too_large"), scope, receive, send)
            return
        if self._keep:
            request_record().body = body
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_body() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, receive_body, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, as far as a client that leaves has sent it; None: it is too large."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b"".join(parts)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body_bytes:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)


def _header_bytes(scope: Scope) -> int:
    """The request's line and headers, about as they were sent."""
    line = len(scope.get("raw_path", b"")) + len(scope["query_string"])
    return line + sum(len(name) + len(value) + 4 for name, value in scope["headers"])
