"""What one connection may take, over real sockets: headers, bodies, slow writers, slow readers."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live_app import live
from scripted_server import ScriptedServer, byte_token
from server_process import ServerProcess

from runtime.server.settings import ServerSettings
from runtime.text.tokenizer import Tokenizer

POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "x", "max_tokens": 2}'


def request(body: bytes = BODY) -> bytes:
    return POST + b"Content-Length: %d\r\n\r\n" % len(body) + body


def answer(connection: socket.socket) -> tuple[int, dict[str, object]]:
    """Status and JSON body of an answer with a Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536) or pytest.fail(f"the connection ended after {data!r}")
    head, _, body = data.partition(b"\r\n\r\n")
    headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(headers[b"content-length"]):
        body += connection.recv(65536)
    return int(head.split()[1]), json.loads(body)


def ended_after(connection: socket.socket) -> float:
    """Seconds until the other side ends the connection."""
    start = time.monotonic()
    connection.settimeout(20)
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - start


@pytest.fixture
def scripted(tokenizer: Tokenizer) -> ScriptedServer:
    return ScriptedServer(tokenizer, "hello")


@pytest.fixture
def port(scripted: ScriptedServer) -> Iterator[int]:
    settings = ServerSettings(read_timeout=0.5, write_timeout=0.5)
    with live(scripted.app, settings) as port:
        yield port


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


@pytest.mark.parametrize("size", [40_000, 1_000_000])
def test_headers_that_are_too_large(port: int, size: int) -> None:
    with connect(port) as connection:
        connection.sendall(POST + b"X-Large: " + b"x" * size + b"\r\n\r\n")
        status, body = answer(connection)
        assert status == 431
        assert body["error"]["code"] == "headers_too_large"  # type: ignore[index]
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


@pytest.mark.parametrize(
    "nonsense", [b"\x16\x03\x01 hello\r\n\r\n", b"GET / HTTP\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n"]
)
def test_what_is_no_http(port: int, nonsense: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(nonsense)
        status, body = answer(connection)
        assert status == 400
        assert set(body["error"]) == {"message", "type", "param", "code"}  # type: ignore[call-overload]


@pytest.mark.parametrize("begun", [b"", b"GET /hea", POST, POST + b"Content-Length: 100\r\n\r\n{"])
def test_a_client_that_does_not_finish_its_request_is_cut_off(port: int, begun: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(begun)
        assert 0.3 < ended_after(connection) < 10


def test_a_second_request_has_its_own_time_and_a_quiet_connection_stays(port: int) -> None:
    with connect(port) as connection:
        for _ in range(2):
            connection.sendall(request())
            assert answer(connection)[0] == 200
            time.sleep(0.8)  # longer than a request may take
        connection.sendall(b"GET /hea")
        assert 0.3 < ended_after(connection) < 10


def test_a_long_answer_is_not_cut_off(tokenizer: Tokenizer) -> None:
    scripted = ScriptedServer(tokenizer, "hello")
    scripted.engine.stalls_after = 1
    with live(scripted.app, ServerSettings(read_timeout=0.3, write_timeout=0.3)) as port, connect(port) as connection:
        connection.sendall(request())
        connection.settimeout(1.5)
        with pytest.raises(TimeoutError):
            connection.recv(1)


def test_a_slow_reader_is_cut_off_and_its_generation_ends(tokenizer: Tokenizer) -> None:
    context = 100_000
    tokens = [byte_token(tokenizer, ord("a"))] * context
    scripted = ScriptedServer(tokenizer, tokens, context_length=context)
    settings = ServerSettings(write_timeout=0.5)
    body = b'{"prompt": "x", "max_tokens": 90000, "stream": true}'
    with live(scripted.app, settings, send_buffer=8192) as port:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        with connection:
            connection.sendall(request(body))
            deadline = time.monotonic() + 20
            while not scripted.engine.aborted:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert ended_after(connection) < 10
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


def peak_memory_kb(server: ServerProcess) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_of_50_megabytes(server: ServerProcess, declared: bool) -> None:
    mega = b"x" * 1_000_000
    before = peak_memory_kb(server)
    content = mega * 50 if declared else (mega for _ in range(50))
    response = httpx.post(
        f"{server.url}/v1/completions", content=content, headers={"content-type": "application/json"}, timeout=60
    )
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"
    assert peak_memory_kb(server) - before < 20_000
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_body_just_small_enough(tokenizer: Tokenizer) -> None:
    scripted = ScriptedServer(tokenizer, "hello")
    with live(scripted.app, ServerSettings(max_body_bytes=1024)) as port:
        url = f"http://127.0.0.1:{port}/v1/completions"
        assert (
            httpx.post(url, content=BODY.ljust(1024), headers={"content-type": "application/json"}).status_code == 200
        )


def test_a_body_just_too_large(tokenizer: Tokenizer) -> None:
    scripted = ScriptedServer(tokenizer, "hello", ServerSettings(max_body_bytes=1024))
    with live(scripted.app) as port, connect(port) as connection:
        connection.sendall(request(BODY.ljust(1025)))
        assert answer(connection)[0] == 413
        connection.sendall(request(BODY.ljust(1024)))  # the same connection goes on
        assert answer(connection)[0] == 200
