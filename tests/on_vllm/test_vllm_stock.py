"""What `osp export` writes, in plain `vllm serve`, beside the quantizer's simulation. Runs where vLLM is installed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from checkpoints import write_4bit

from quant.export import export_checkpoint
from quant.scheme import named

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytest.importorskip("transformers")

from benchmarks.check_vllm_export import EPSILON, LARGEST_DIFFERENCE, UnquantizedInputs
from quant.stream import log_likelihoods

START_S = 600
CONTEXT = 64
WINDOWS = [[int(token) for token in np.random.default_rng(seed).integers(1, 97, CONTEXT - 1)] for seed in range(4)]


@contextmanager
def vllm_serve(model: Path) -> Iterator[str]:
    """The URL of a stock server, without anything of ours on its command line."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    # What `vllm serve` runs. The program itself asks for a package called vllm, and CPU builds have other names.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "stock", "--port", str(port)]
    command += ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", str(CONTEXT)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
            while not _healthy(url):
                assert process.poll() is None, "vllm serve has ended; its words are above"
                assert time.monotonic() < deadline, "vllm serve does not answer"
                time.sleep(0.5)
            yield url
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_a_stock_server_computes_the_simulation_with_inputs_of_16_bits(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "max_position_embeddings": CONTEXT}
    source = write_4bit(tmp_path / "source", scheme=named("w4a4"), **shape)
    export_checkpoint(source, tmp_path / "export")
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t0"}
    (tmp_path / "export" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    found = []
    with vllm_serve(tmp_path / "export") as url:
        for window in WINDOWS:
            body = {"model": "stock", "prompt": window, "max_tokens": 1, "echo": True, "logprobs": 1}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status().json()
            found += answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(window)]
    expected = np.concatenate(log_likelihoods(UnquantizedInputs(source), WINDOWS))
    assert len(found) == len(expected)
    assert np.abs(np.array(found) - expected).max() <= LARGEST_DIFFERENCE * EPSILON["bfloat16"]
    assert np.exp(abs(np.mean(found) - expected.mean())) - 1 <= EPSILON["bfloat16"]
