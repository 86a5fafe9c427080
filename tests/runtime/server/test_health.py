"""What probes and waiting clients learn of a server that loads, and of engines that die or hang."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from sabotage import SLOW_LOADING, STEPS
from server_process import ServerProcess, running_server

BODY = {"prompt": "The cat", "max_tokens": 100, "ignore_eos": True}


def status(server: ServerProcess, path: str) -> int:
    return httpx.get(server.url + path, timeout=5).status_code


def within(seconds: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_probes_are_answered_while_the_model_is_loading(checkpoint: Path) -> None:
    before = SLOW_LOADING.format(seconds=1.5)
    with running_server(str(checkpoint), before=before, until="listening") as server:
        assert status(server, "/health") == 200
        for method, path in (("GET", "/ready"), ("GET", "/v1/models"), ("POST", "/v1/completions")):
            response = httpx.request(method, server.url + path, json=BODY if method == "POST" else None)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "model_loading"
            assert response.headers["retry-after"] == "1"
        assert "osp_build_info" in httpx.get(f"{server.url}/metrics").text
        server.log.wait_for("serving")
        assert status(server, "/ready") == 200
        assert httpx.post(f"{server.url}/v1/completions", json=BODY).status_code == 200


def test_a_signal_ends_the_loading(checkpoint: Path) -> None:
    with running_server(str(checkpoint), before=SLOW_LOADING.format(seconds=300), until="listening") as server:
        start = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start < 20


class Client(threading.Thread):
    """A client that waits for a whole answer, or streams one."""

    def __init__(self, server: ServerProcess, stream: bool) -> None:
        super().__init__()
        self.url = f"{server.url}/v1/completions"
        self.stream = stream
        self.begun = threading.Event()
        self.error: Any = None

    def run(self) -> None:
        with httpx.stream("POST", self.url, json={**BODY, "stream": self.stream}, timeout=60) as response:
            *lines, last = [self.begun.set() or line for line in response.iter_lines() if line]
        if self.stream:
            assert last == "data: [DONE]"
            last = lines[-1].removeprefix("data: ")
        self.error = json.loads(last)["error"]


@pytest.mark.parametrize(("sig", "reason"), [(signal.SIGUSR1, "killed"), (signal.SIGUSR2, "no step has ended")])
def test_an_engine_that_dies_or_hangs_is_seen_within_seconds(
    checkpoint: Path, sig: signal.Signals, reason: str
) -> None:
    arguments = (str(checkpoint), "--engine", "reference", "--stall-timeout", "1")
    with running_server(*arguments, before=STEPS.format(seconds=0.02)) as server:
        clients = [Client(server, stream) for stream in (True, False, True)]
        for client in clients:
            client.start()
        assert clients[0].begun.wait(20)
        assert status(server, "/health") == status(server, "/ready") == 200
        server.process.send_signal(sig)
        within(5, lambda: status(server, "/health") == 503)
        assert status(server, "/ready") == 503
        for client in clients:
            client.join(5)
            assert client.error["code"] == "engine_dead"
            assert reason in client.error["message"]
        refused = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=5)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_dead"
        server.log.wait_for(f"unhealthy: .*{reason}")
        if sig == signal.SIGUSR2:
            server.process.send_signal(sig)
            within(5, lambda: status(server, "/health") == 200)
            server.log.wait_for("healthy again")
            assert httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=30).status_code == 200
        assert server.stop() == 0


def test_a_process_ends_although_its_engine_hangs(checkpoint: Path) -> None:
    arguments = (str(checkpoint), "--engine", "reference", "--stall-timeout", "0.5", "--drain-timeout", "0.5")
    with running_server(*arguments, before=STEPS.format(seconds=0.02)) as server:
        client = Client(server, stream=True)
        client.start()
        assert client.begun.wait(20)
        server.process.send_signal(signal.SIGUSR2)
        assert server.stop() == 0
        client.join(5)
        assert client.error["code"] in ("engine_dead", "shutting_down")
