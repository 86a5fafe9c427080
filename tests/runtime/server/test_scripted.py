"""What clients see when the engine does something particular: deterministic, in one process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from scripted_server import ScriptedServer, byte_token, events

from runtime.text.tokenizer import Tokenizer


def texts(chunks: list[dict[str, Any]]) -> list[str]:
    return [chunk["choices"][0]["text"] for chunk in chunks]


def aborted(server: ScriptedServer) -> list[str]:
    return server.engine.aborted


async def metric(server: ScriptedServer, line_start: str) -> float:
    lines = (await server.request("GET", "/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(line_start))


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 30))


def test_a_stop_string_over_three_chunks(tokenizer: Tokenizer) -> None:
    server = ScriptedServer(tokenizer, "one STOP two")
    chunks = events(run(server.post(stop="STOP", max_tokens=12, stream=True)))
    assert texts(chunks) == ["o", "n", "e", " ", "", "", "", ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert len(aborted(server)) == 1  # the engine would have gone on


def test_a_stop_string_that_does_not_come_true_is_text(tokenizer: Tokenizer) -> None:
    server = ScriptedServer(tokenizer, "a STAR, STO")
    chunks = events(run(server.post(stop=["STOP"], max_tokens=11, stream=True)))
    assert "".join(texts(chunks)) == "a STAR, STO"
    assert texts(chunks)[-1] == "STO"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_streamed_and_whole_answers_agree(tokenizer: Tokenizer) -> None:
    for stop in (["lo w"], ["rld", "world"], []):
        server = ScriptedServer(tokenizer, "hello world")
        whole = run(server.post(stop=stop, max_tokens=11)).json()
        chunks = events(run(server.post(stop=stop, max_tokens=11, stream=True, stream_options={"include_usage": True})))
        assert "".join(texts(chunks[:-1])) == whole["choices"][0]["text"]
        assert chunks[-1]["usage"] == whole["usage"]
        assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_no_half_characters(tokenizer: Tokenizer) -> None:
    server = ScriptedServer(tokenizer, "a😀é")
    assert texts(events(run(server.post(max_tokens=7, stream=True)))) == ["a", "", "", "", "😀", "", "é"]
    assert texts(events(run(server.post(max_tokens=3, stream=True)))) == ["a", "", "\N{REPLACEMENT CHARACTER}"]


def test_an_end_token_ends_the_text_unless_told_not_to(tokenizer: Tokenizer) -> None:
    letter = byte_token(tokenizer, ord("a"))
    server = ScriptedServer(tokenizer, [letter, 0, letter])
    ended = run(server.post(max_tokens=3)).json()
    assert ended["choices"][0] == {
        "index": 0,
        "text": "a",
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    assert ended["usage"]["completion_tokens"] == 2
    went_on = run(server.post(max_tokens=3, ignore_eos=True)).json()
    assert went_on["choices"][0]["text"] == "aa"
    assert went_on["choices"][0]["finish_reason"] == "length"
    assert went_on["usage"]["completion_tokens"] == 3


def test_seeds_of_a_list_count_up(tokenizer: Tokenizer) -> None:
    server = ScriptedServer(tokenizer, "text")
    run(server.post(prompt=["a", "b", "c"], max_tokens=4, seed=10))
    assert sorted(request.sampling.seed for request in server.engine.requests) == [10, 11, 12]


def test_an_engine_that_dies_before_the_first_token_is_a_503(tokenizer: Tokenizer) -> None:
    for stream in (False, True):
        server = ScriptedServer(tokenizer, "hello")
        server.engine.dies_after = 0
        response = run(server.post(max_tokens=5, stream=stream))
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_dead"
        assert run(server.request("GET", "/health")).status_code == 503


def test_an_engine_that_dies_midway_is_an_error_event(tokenizer: Tokenizer) -> None:
    server = ScriptedServer(tokenizer, "hello")
    server.engine.dies_after = 3
    response = run(server.post(prompt=["a", "b"], max_tokens=5, stream=True))
    assert response.status_code == 200
    *chunks, error = events(response)
    assert 3 <= len(chunks) <= 6
    assert error["error"]["type"] == "server_error"
    assert error["error"]["code"] == "engine_dead"
    assert run(server.post(max_tokens=5)).json()["error"]["code"] == "engine_dead"


def test_a_fault_of_ours_is_a_500_that_tells_no_secrets(tokenizer: Tokenizer) -> None:
    server = ScriptedServer(tokenizer, "hel")  # shorter than max_tokens, so that the script fails
    response = run(server.post(max_tokens=5, stream=True))
    assert events(response)[-1]["error"]["code"] == "internal_error"
    assert "shorter" not in response.text


@pytest.mark.parametrize("prompt", ['"x"', '["x", "y"]'])
def test_latencies_count_from_the_arrival(tokenizer: Tokenizer, prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ScriptedServer(tokenizer, "hello")
    encode = Tokenizer.encode

    def slow_encode(self: Tokenizer, text: str, **options: bool) -> tuple[int, ...]:
        time.sleep(0.2)
        return encode(self, text, **options)

    async def slow_body() -> AsyncIterator[bytes]:
        await asyncio.sleep(0.2)
        yield b'{"max_tokens": 5, "prompt": %s}' % prompt.encode()

    async def post() -> Any:
        return await server.request(
            "POST", "/v1/completions", content=slow_body(), headers={"content-type": "application/json"}
        )

    monkeypatch.setattr(Tokenizer, "encode", slow_encode)
    assert run(post()).status_code == 200
    prompts = prompt.count('"') // 2
    before_the_engine = 0.2 + 0.2 * prompts
    for name in ("time_to_first_token", "e2e_request_latency"):
        assert run(metric(server, f"osp_{name}_seconds_count")) == prompts
        assert run(metric(server, f"osp_{name}_seconds_sum")) >= before_the_engine * prompts


def test_a_full_queue_is_a_503(tokenizer: Tokenizer) -> None:
    server = ScriptedServer(tokenizer, "hello")
    server.engine.full = True
    for stream in (False, True):
        response = run(server.post(max_tokens=5, stream=stream))
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "queue_full"
        assert response.headers["retry-after"] == "1"
    assert run(metric(server, "osp_request_success_total")) == 0  # it never ran


@pytest.mark.parametrize(("stream", "stalls_after"), [(False, 0), (False, 2), (True, 0), (True, 2)])
def test_a_client_that_leaves_aborts_its_sequences(tokenizer: Tokenizer, stream: bool, stalls_after: int) -> None:
    server = ScriptedServer(tokenizer, "hello")
    server.engine.stalls_after = stalls_after

    async def leave_midway() -> None:
        gone = asyncio.Event()
        body = b'{"prompt": ["a", "b"], "max_tokens": 5, "stream": %s}' % (b"true" if stream else b"false")
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            pass

        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"",
            "root_path": "", "scheme": "http", "headers": [(b"content-type", b"application/json")],
            "server": ("test", 80), "client": ("test", 1),
        }  # fmt: skip
        request = asyncio.ensure_future(server.app(scope, receive, send))
        while len(server.engine.requests) < 2:
            await asyncio.sleep(0.001)
        assert not aborted(server)
        gone.set()
        await request

    run(leave_midway())
    assert len(aborted(server)) == 2
    assert run(metric(server, "osp_num_requests_running")) == 0
    assert run(metric(server, 'osp_request_success_total{engine="scripted",finished_reason="abort"')) == 2


def test_a_shutdown_cuts_streams_off_with_an_error_event(tokenizer: Tokenizer) -> None:
    server = ScriptedServer(tokenizer, "hello")
    server.engine.stalls_after = 2

    async def shut_down_midway() -> Any:
        request = asyncio.ensure_future(server.post(max_tokens=5, stream=True))
        while await metric(server, "osp_generation_tokens_total") < 2:
            await asyncio.sleep(0.001)
        await server.engine.shutdown(0)
        return await request

    *chunks, error = events(run(shut_down_midway()))
    assert texts(chunks) == ["h", "e"]
    assert error["error"]["code"] == "shutting_down"
