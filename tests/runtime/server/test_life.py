"""How a server process starts, fails to start, and ends."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from checkpoints import write_4bit, write_byte_level_tokenizer
from server_process import EVENT_A_TOKEN, osp_serve, running_server

from quant.format import QUANTIZED_WEIGHTS_FILE


def failure_of(*arguments: str, **environment: str) -> str:
    """The one sentence on stderr of an `osp serve` that must end with exit code 1."""
    process = osp_serve(*arguments, **environment)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    assert "Traceback" not in stderr
    [line] = [line for line in stderr.splitlines() if not line.startswith("INFO ")]
    assert line.startswith("Error: ")
    return line


def test_a_port_in_use(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        message = failure_of(str(checkpoint), "--port", port)
        assert port in message
        assert "in use" in message
        assert failure_of(str(checkpoint), OSP_PORT=port) == message


@pytest.mark.parametrize("host", ["nosuch.invalid", "x" * 300, "a..b", "::zz"])
def test_a_host_that_is_none(checkpoint: Path, host: str) -> None:
    assert f"cannot listen on {host}" in failure_of(str(checkpoint), "--port", "0", "--host", host)


def test_a_model_that_is_not_there() -> None:
    assert "neither a directory" in failure_of("nosuch", "--port", "0")
    assert "Hugging Face" in failure_of("owner/nosuch", "--port", "0")
    assert "home directory" in failure_of("~nosuchuser/x", "--port", "0")
    assert "too long" in failure_of("x" * 300, "--port", "0")


def test_a_directory_that_is_no_checkpoint(tmp_path: Path) -> None:
    assert "config.json" in failure_of(str(tmp_path), "--port", "0")


def truncate_weights(model: Path) -> None:
    with (model / QUANTIZED_WEIGHTS_FILE).open("r+b") as file:
        file.truncate(file.seek(0, 2) - 100)


def other_tokenizer(model: Path) -> None:
    write_byte_level_tokenizer(model, 320)
    file = model / "tokenizer.json"
    file.write_text(file.read_text() + "\n")


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def damaged_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "added_tokens": []}')
    provenance = json.loads((model / "osp.json").read_text())
    (model / "osp.json").write_text(json.dumps({**provenance, "tokenizer_sha256": None}))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate_weights, QUANTIZED_WEIGHTS_FILE),
        (other_tokenizer, "tokenizer.json"),
        (no_tokenizer, "tokenizer.json"),
        (damaged_tokenizer, "tokenizer.json"),
    ],
)
def test_a_damaged_checkpoint(checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], named: str) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "model")
    damage(model)
    message = failure_of(str(model), "--port", "0")
    assert named in message
    assert str(model) in message


def test_an_unknown_engine(checkpoint: Path) -> None:
    assert "reference" in failure_of(str(checkpoint), "--port", "0", "--engine", "warp")


def test_a_server_needs_neither_torch_nor_the_trainer() -> None:
    code = "import sys, runtime.server.lifecycle; print({'torch', 'transformers', 'trainer'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_a_running_answer_finish(checkpoint: Path, sig: signal.Signals) -> None:
    body = {"prompt": "The cat", "max_tokens": 100, "ignore_eos": True, "stream": True}
    with (
        running_server(str(checkpoint), "--served-model-name", "cat", *EVENT_A_TOKEN) as server,
        httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "model": "cat"}, timeout=60) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        ended = threading.Thread(target=server.stop, args=(sig,))
        ended.start()
        events = [line for line in lines if line]
        ended.join()
        assert len(events) == 100  # 99 more tokens, and the end
        assert events[-1] == "data: [DONE]"
        assert server.process.returncode == 0


def test_a_second_ctrl_c_insists(tmp_path: Path) -> None:
    # A hundred answers of 65 thousand tokens: far more than the server can finish before the timeouts below.
    context = 2**16
    shape = {"vocab_size": 320, "max_position_embeddings": context, "num_hidden_layers": 1}
    model = write_4bit(tmp_path / "model", write_tokenizer=write_byte_level_tokenizer, **shape)
    body = {"prompt": ["The cat"] * 100, "max_tokens": context - 100, "ignore_eos": True, "stream": True}
    with (
        running_server(str(model), "--drain-timeout", "86400") as server,
        httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response,
    ):
        lines = response.iter_lines()  # kept: without it the response is closed, and the server has nothing to drain
        next(lines)
        server.process.send_signal(signal.SIGINT)
        server.log.wait_for("shutting down")
        assert sum(1 for _ in zip(range(20), lines, strict=False)) == 20  # the first one lets it go on
        server.process.send_signal(signal.SIGINT)
        *_, error, done = [line for line in lines if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert done == "data: [DONE]"
        assert server.process.wait(timeout=60) == 0


def test_a_drain_that_takes_too_long_ends_in_an_error_event(checkpoint: Path) -> None:
    body = {"prompt": ["The cat"] * 128, "max_tokens": 110, "ignore_eos": True, "stream": True}
    with (
        running_server(str(checkpoint), OSP_DRAIN_TIMEOUT="0") as server,
        httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        *_, error, done = [line for line in lines if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert done == "data: [DONE]"
        assert server.process.wait(timeout=60) == 0
