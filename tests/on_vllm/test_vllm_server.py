"""`osp serve --engine vllm` as a process, when vLLM's own process is killed under it. Runs where vLLM is installed."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import pytest
from server_process import EVENT_A_TOKEN, ServerProcess, osp_serve, running_server

pytest.importorskip("vllm", reason="vLLM is not installed here; docs/vllm.md says how")
psutil = pytest.importorskip("psutil")  # vLLM brings it

OPTIONS = ("demo-16bit", "--engine", "vllm", "--vllm.enforce-eager", "--vllm.max-num-seqs=16")
BODY = {"prompt": "The history of", "max_tokens": 400, "ignore_eos": True}


class Waiting(threading.Thread):
    """A client that waits for a whole answer."""

    def __init__(self, server: ServerProcess) -> None:
        super().__init__()
        self.url = f"{server.url}/v1/completions"
        self.answer: httpx.Response | None = None
        self.answered = 0.0

    def run(self) -> None:
        self.answer = httpx.post(self.url, json=BODY, timeout=120)
        self.answered = time.monotonic()


def test_a_killed_engine_fails_who_waits_and_ends_the_server() -> None:
    with running_server(*OPTIONS, *EVENT_A_TOKEN, start_s=240) as server:
        assert httpx.post(f"{server.url}/v1/completions", json={**BODY, "max_tokens": 2}, timeout=60).status_code == 200
        clients = [Waiting(server) for _ in range(3)]
        for client in clients:
            client.start()
        while "osp_num_requests_running{" not in (text := httpx.get(f"{server.url}/metrics").text) or not any(
            line.startswith("osp_num_requests_running{") and float(line.split()[-1]) >= 3 for line in text.splitlines()
        ):
            time.sleep(0.05)
        engines = [c for c in psutil.Process(server.process.pid).children(recursive=True) if "EngineCore" in name(c)]
        killed = time.monotonic()
        for engine in engines:
            engine.kill()
        assert engines
        for client in clients:
            client.join(20)
            assert client.answer is not None
            assert client.answer.status_code == 503
            assert client.answer.json()["error"]["code"] == "engine_dead"
            assert client.answered - killed < 5
        assert server.process.wait(30) == 1
        server.log.wait_for("Error: vLLM's process has ended")


def name(process: Any) -> str:
    """Its title, which vLLM sets; empty once it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--vllm.max-num-seq=4", "vllm.max_num_seq is no engine argument of vLLM; did you mean max_num_seqs?"),
        ("--vllm.max-num-seqs=many", "argument --max-num-seqs: "),
        ("--vllm.generation-config=auto", "vllm.generation_config is set by osp serve itself"),
    ],
)
def test_an_argument_that_cannot_be_ends_the_start(argument: str, said: str) -> None:
    process = osp_serve(*OPTIONS, argument, "--port", "0")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said in stderr
    assert "Traceback" not in stderr
