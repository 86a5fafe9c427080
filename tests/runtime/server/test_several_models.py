"""Several models in one server: who answers, and under which name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import ml_dtypes
import pytest
from checkpoints import SERVED_CONTEXT, write_byte_level_tokenizer, write_full_precision
from server_process import ServerProcess, osp_serve, running_server


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "full"
    shape = {"vocab_size": 320, "max_position_embeddings": SERVED_CONTEXT, "num_hidden_layers": 1, "eos_token_id": 0}
    write_full_precision(folder, ml_dtypes.bfloat16, **shape)
    write_byte_level_tokenizer(folder, 320)
    return folder


@pytest.fixture(scope="module")
def pair(checkpoint: Path, full: Path) -> Iterator[ServerProcess]:
    with running_server(f"w4a4={checkpoint}", f"org/bf16={full}") as server:
        yield server
        assert server.stop() == 0


def post(server: ServerProcess, **body: Any) -> httpx.Response:
    body = {"prompt": "The cat", "max_tokens": 12, "temperature": 0, "ignore_eos": True} | body
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)


def test_the_request_picks_its_model(pair: ServerProcess, checkpoint: Path, full: Path) -> None:
    answers = {name: post(pair, model=name).json() for name in ("w4a4", "org/bf16")}
    assert {name: answer["model"] for name, answer in answers.items()} == {"w4a4": "w4a4", "org/bf16": "org/bf16"}
    texts = {name: answer["choices"][0]["text"] for name, answer in answers.items()}
    assert texts["w4a4"] != texts["org/bf16"]
    default = post(pair).json()
    assert (default["model"], default["choices"][0]["text"]) == ("w4a4", texts["w4a4"])
    for name, path in (("w4a4", checkpoint), ("org/bf16", full)):
        with running_server(str(path)) as alone:
            assert post(alone).json()["choices"][0]["text"] == texts[name]
    unknown = post(pair, model="other")
    assert unknown.status_code == 404
    assert "w4a4, org/bf16" in unknown.json()["error"]["message"]


def test_cards_and_metrics_tell_them_apart(pair: ServerProcess) -> None:
    cards = httpx.get(f"{pair.url}/v1/models").json()["data"]
    assert [(card["id"], card["precision"]) for card in cards] == [("w4a4", "w4a4"), ("org/bf16", "bfloat16")]
    assert httpx.get(f"{pair.url}/v1/models/org/bf16").json() == cards[1]
    post(pair, model="org/bf16", max_tokens=3)
    page = httpx.get(f"{pair.url}/metrics").text
    lines = [line for line in page.splitlines() if line.startswith("osp_generation_tokens_total{")]
    assert any('model_name="w4a4"' in line and 'precision="w4a4"' in line for line in lines)
    assert any('model_name="org/bf16"' in line and 'precision="bfloat16"' in line for line in lines)


def test_one_that_cannot_be_loaded_ends_the_start(checkpoint: Path) -> None:
    process = osp_serve(f"a={checkpoint}", "b=nosuch", "--port", "0")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("Error: no model 'nosuch'")
