"""How many connections there may be at a time."""

from __future__ import annotations

import contextlib
import socket
import time

import httpx
from live_app import live
from scripted_server import ScriptedServer

from runtime.server.limits_connection import WATCHERS
from runtime.server.settings import ServerSettings
from runtime.text.tokenizer import Tokenizer


def test_one_too_many_is_told_so_and_there_is_room_again_later(tokenizer: Tokenizer) -> None:
    scripted = ScriptedServer(tokenizer, "hello")
    with live(scripted.app, ServerSettings(max_connections=3)) as port, contextlib.ExitStack() as held:
        url = f"http://127.0.0.1:{port}/v1/completions"
        body = {"prompt": "x", "max_tokens": 2}
        for _ in range(2):
            held.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert httpx.post(url, json=body).status_code == 200
        held.enter_context(socket.create_connection(("127.0.0.1", port)))
        for size in (1, 3_000_000):
            refused = httpx.post(url, json=body | {"prompt": "x" * size})
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"] == {
                "message": "the server has 3 connections, and takes no more",
                "type": "server_error",
                "param": None,
                "code": "too_many_connections",
            }
        held.close()
        deadline = time.monotonic() + 10
        while httpx.post(url, json=body).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_who_watches_the_server_is_answered_though_it_is_full(tokenizer: Tokenizer) -> None:
    scripted = ScriptedServer(tokenizer, "hello")
    with live(scripted.app, ServerSettings(max_connections=1)) as port, contextlib.ExitStack() as held:
        held.enter_context(socket.create_connection(("127.0.0.1", port)))
        for path, status in {"/health": 200, "/ready": 200, "/metrics": 200, "/v1/models": 503}.items():
            assert httpx.get(f"http://127.0.0.1:{port}{path}").status_code == status, path
        for _ in range(WATCHERS):
            held.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 503
