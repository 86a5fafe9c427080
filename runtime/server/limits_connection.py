"""How many connections there may be, and what one may take: time to send and to read, room for headers.

Of a slow reader's answer, at most a buffer is kept: the tokens after it wait where they are made. If nothing of the
buffer is taken for `write_timeout`, the connection is cut, and with it the generation ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.server.auth import PROBES
from runtime.server.errors import RETRY_SOON, ApiError, send_error
from runtime.server.settings import ServerSettings

WATCHERS = 16
"""So many connections beyond the limit are asked what they want: who watches the server is answered even then."""

LINGER_S = 1.0
"""For so long what a refused client still sends is read and dropped. Closed at once, it might miss the answer."""


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with time-outs, and with errors in the shape of all others."""

    def __init__(self, *arguments: Any, settings: ServerSettings, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._read_timeout = settings.read_timeout
        self._write_timeout = settings.write_timeout
        self._max_connections = settings.max_connections
        message = f"the server has {self._max_connections} connections, and takes no more"
        self._too_many = ApiError(
            503, message, code="too_many_connections", headers=RETRY_SOON | {"Connection": "close"}
        )
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected, and owes a request."""
        super().connection_made(transport)
        beyond = len(self.connections) - self._max_connections
        if beyond > WATCHERS:
            self._refuse(self._too_many)
            return
        if beyond > 0:
            self.app = self._answer_watchers
        self._await_request()

    def data_received(self, data: bytes) -> None:
        """More of a request has come."""
        if self._refused:
            return
        super().data_received(data)
        begun = self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]
        if begun or self.conn.their_state is h11.SEND_BODY:
            self._await_request()
        else:
            self._reading = _cancel(self._reading)

    def pause_writing(self) -> None:
        """The client does not keep up: the buffer is full."""
        super().pause_writing()
        self._writing = self.loop.call_later(self._write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has taken most of the buffer."""
        super().resume_writing()
        self._writing = _cancel(self._writing)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over, whoever has ended it."""
        self._reading, self._writing = _cancel(self._reading), _cancel(self._writing)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP/1.1 request, or one with headers that are too large."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # in the middle of an answer
            return
        fault = sys.exception()  # uvicorn calls this while it handles h11's error
        status = fault.error_status_hint if isinstance(fault, h11.RemoteProtocolError) else 400
        message = "the request's line and headers are too large" if status == 431 else msg
        self._refuse(ApiError(status, message, code="headers_too_large" if status == 431 else "bad_request"))

    def _refuse(self, error: ApiError) -> None:
        """Answers, before there is a request that the application could answer, and closes the connection."""
        body = json.dumps(error.body()).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        response = h11.Response(status_code=error.status, headers=list((headers | error.headers).items()))
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self._refused = True
        self.loop.call_later(LINGER_S, self.transport.close)

    async def _answer_watchers(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application for a connection beyond the limit."""
        if scope["path"] in PROBES | {"/metrics"}:
            await self.config.loaded_app(scope, receive, send)
            return
        while (await receive()).get("more_body", False):  # a client that is cut off while it sends misses the answer
            pass
        await send_error(self._too_many, scope, receive, send)

    def _await_request(self) -> None:
        if self._reading is None:
            self._reading = self.loop.call_later(self._read_timeout, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Stops a timer, if there is one; what is left of it is None."""
    if timer is not None:
        timer.cancel()
    return None
