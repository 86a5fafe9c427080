"""The bundled 4-bit model in `osp serve --engine vllm`: what it computes, which kernels it runs, and how it ends when
vLLM's own process is killed under it. Runs where vLLM is installed.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from exposition import samples_of
from server_process import EVENT_A_TOKEN, ServerProcess, osp_serve, running_server

from benchmarks.served_perplexity import computed_scores, served_scores, tokenize
from quant.text import windows
from runtime.loadtest.endpoint import Endpoint
from runtime.loadtest.preflight import find_endpoint, open_session
from runtime.loadtest.quality import QualityProbe, measure_quality
from runtime.model_store import resolve_model

pytest.importorskip("vllm", reason="vLLM is not installed here; docs/vllm.md says how")
psutil = pytest.importorskip("psutil")  # vLLM brings it

# float32: what lies between the layers is then rounded as in the reference engine, and few inputs get another code.
OPTIONS = ("demo", "--engine", "vllm", "--vllm.enforce-eager", "--vllm.max-num-seqs=16", "--vllm.dtype=float32")
START_S = 600
TEXT = Path(__file__).parents[2] / "docs" / "training.md"
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


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """The last test that uses it kills its engine."""
    with running_server(*OPTIONS, *EVENT_A_TOKEN, start_s=START_S, VLLM_CPU_KVCACHE_SPACE="1") as running:
        yield running


def test_perplexity_is_the_reference_engine_s(server: ServerProcess) -> None:
    """vLLM has no 4-bit KV cache, so neither has the oracle."""
    with httpx.Client(base_url=server.url, timeout=120) as client:
        cut = list(windows([tokenize(client, TEXT.read_text("utf-8"))], 256))[:6]
        served = served_scores(client, cut)
    computed = computed_scores("reference", resolve_model("demo"), cut, kv_bits=16)
    assert len(served) == len(computed) > 1000
    assert math.exp(abs(served.mean() - computed.mean())) < 1.005
    # A sum in another order moves an input across a rounding boundary now and then, and that token's score with it.
    assert np.abs(served - computed).mean() < 0.05


def test_a_load_test_finds_the_kernel_and_measures_quality(server: ServerProcess) -> None:
    text = TEXT.read_text("utf-8")

    async def measure() -> tuple[Endpoint, dict[str, Any], list[int]]:
        async with open_session({}, 120) as session:
            endpoint = await find_endpoint(session, server.url, None, {}, {})
            probe = QualityProbe(session, endpoint, lambda: None)
            return endpoint, await measure_quality([probe], [text], most_tokens=1), await probe.tokenize(text)

    endpoint, quality, tokens = asyncio.run(measure())
    assert endpoint.kernel is not None
    assert endpoint.kernel.startswith("native int4 (")
    # One window, as long as vLLM takes it.
    assert endpoint.context_length is not None
    [scored] = list(windows([tokens], endpoint.context_length - 1))[:1]
    computed = computed_scores("reference", resolve_model("demo"), [scored], kv_bits=16)
    assert quality["perplexity"]["tokens"] == len(computed) == endpoint.context_length - 2
    assert quality["perplexity"]["A"] == pytest.approx(math.exp(-computed.mean()), rel=0.005)


def test_metrics_and_the_log_name_the_kernel_of_each_layer(server: ServerProcess) -> None:
    samples = samples_of(httpx.get(f"{server.url}/metrics").text)
    [labels] = [dict(labels) for name, labels in samples if name == "osp_engine_info"]
    assert (labels["engine"], labels["precision"]) == ("vllm", "w4a4-kv4-head8-embedding8")
    server.log.wait_for(r"engine vllm: kernel native int4 \(")
    # Four bits a weight in memory, as in the checkpoint; the demo model's head has eight.
    int4, int8 = labels["kernel"].split("; ")
    assert int4.startswith("native int4 (")
    assert int4.endswith("4 bits a weight (qkv_proj, o_proj, gate_up_proj, down_proj)")
    assert int8.startswith("native ")
    assert int8.endswith("8 bits a weight (lm_head)")


def test_a_killed_engine_fails_who_waits_and_ends_the_server(server: ServerProcess) -> None:
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
