"""A completions server that computes nothing and keeps time: the oracle of what a client should have seen.

By hand, for other clients: python tests/runtime/loadtest/fake_server.py --port 8001 --first-ms 60 --gap-ms 15
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import click


@dataclass
class FakeServer:
    """Answers every request with `tokens` tokens: the first after `first_s`, the others every `gap_s`.

    Attributes:
        stalls: (from, to), seconds of `time.perf_counter` during which nothing is sent.
        ends: how an answer ends: "well", or what goes wrong after its second token: "closed", "error", "no done".
        key: without which the answer is 401.
        whole: the answer to every completion, at once and as a whole, in place of a stream.
        closes_after: after so many requests every other one is cut off.
        room: for so many requests at a time; one more gets a 503.
        port: 0, a free one.
        bodies, most_at_once: what was asked, and how many requests were under way at the busiest moment.
        first_written_s: when the first token of each answer was written, in the order in which they were asked for.
    """

    first_s: float = 0.0
    gap_s: float = 0.0
    tokens: int = 4
    ends: str = "well"
    key: str | None = None
    owner: str = "osp-runtime"
    stalls: tuple[float, float] = (0.0, 0.0)
    whole: dict[str, Any] | None = None
    closes_after: int | None = None
    room: int = 1_000_000
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    first_written_s: list[float] = field(default_factory=list)
    url: str = ""
    _now: int = 0
    _connections: set[asyncio.Task[Any]] = field(default_factory=set)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[FakeServer]:
        server = await asyncio.start_server(self._connection, "127.0.0.1", self.port)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with server:
            yield self
            server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next((int(x[15:]) for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:")), 0)
                body = json.loads(await reader.readexactly(length)) if length else {}
                if self.key is not None and f"Bearer {self.key}".encode() not in head:
                    self._answer(writer, 401, {"error": {"message": "no such key", "code": "invalid_api_key"}})
                elif b"GET /v1/models " in head:
                    self._answer(writer, 200, {"data": [{"id": "fake", "owned_by": self.owner}]})
                elif b"POST /v1/completions " in head and self.whole is not None:
                    self._answer(writer, 200, self.whole)
                elif b"POST /v1/completions " in head:
                    await self._complete(writer, body)
                else:
                    self._answer(writer, 404, {"error": "no such route"})
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has left
        finally:
            writer.close()

    async def _complete(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        began = time.perf_counter()
        self.bodies.append(body)
        if self.closes_after is not None and len(self.bodies) > self.closes_after:
            writer.transport.abort()
            return
        if self._now >= self.room:
            self._answer(writer, 503, {"error": {"message": "too many requests", "code": "queue_full"}})
            return
        order = len(self.first_written_s)
        self.first_written_s.append(0.0)
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            tokens = min(self.tokens, body["max_tokens"])
            for number in range(tokens):
                await self._sleep_until(began + self.first_s + number * self.gap_s)
                if number == 2 and self.ends == "closed":
                    writer.transport.abort()
                    return
                if number == 2 and self.ends == "error":
                    self._event(writer, {"error": {"message": "the engine has died"}})
                if number == 0:
                    self.first_written_s[order] = time.perf_counter()
                self._event(writer, {"choices": [{"text": f"t{number} ", "token_ids": [number]}]})
                await writer.drain()
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens}
            self._event(writer, {"choices": [], "usage": usage})
            if self.ends != "no done":
                self._chunk(writer, b"data: [DONE]\n\n")
            self._chunk(writer, b"")
        finally:
            self._now -= 1

    async def _sleep_until(self, due_s: float) -> None:
        # An event loop's timer is late by up to a millisecond; the rest is waited for actively.
        await asyncio.sleep(max(0.0, due_s - time.perf_counter() - 0.0015))
        while time.perf_counter() < due_s:
            await asyncio.sleep(0)
        begins, ends = self.stalls
        if begins <= time.perf_counter() < ends:
            await asyncio.sleep(ends - time.perf_counter())

    def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        self._chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")

    def _chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _answer(self, writer: asyncio.StreamWriter, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)


@click.command()
@click.option("--port", required=True, type=int)
@click.option("--first-ms", default=60.0, show_default=True, help="From a request to the first token of its answer.")
@click.option("--gap-ms", default=15.0, show_default=True, help="Between two tokens.")
def main(port: int, first_ms: float, gap_ms: float) -> None:
    """Serve until Ctrl-C, as many tokens as are asked for."""
    server = FakeServer(first_s=first_ms / 1000, gap_s=gap_ms / 1000, tokens=1_000_000, port=port)

    async def serve() -> None:
        async with server.running():
            await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
