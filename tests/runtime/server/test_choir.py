"""Requests with several sequences: each ends for itself."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from choir_engine import ChoirEngine
from scripted_server import byte_token, events

from runtime.server.app import create_app
from runtime.server.catalog import ModelCatalog, ServedModel
from runtime.server.settings import ServerSettings
from runtime.server.telemetry import Telemetry
from runtime.text.tokenizer import Tokenizer


def answer(engine: ChoirEngine, tokenizer: Tokenizer, **body: Any) -> httpx.Response:
    telemetry = Telemetry()
    catalog = ModelCatalog([ServedModel("choir", engine, tokenizer, telemetry)])
    transport = httpx.ASGITransport(create_app(ServerSettings(), catalog, telemetry))

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
            return await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 20, **body})

    return asyncio.run(post())


def choir(tokenizer: Tokenizer, *texts: str, late: bool = False) -> ChoirEngine:
    return ChoirEngine([[byte_token(tokenizer, byte) for byte in text.encode()] for text in texts], late=late)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_its_own_sequence_only(tokenizer: Tokenizer, stream: bool) -> None:
    engine = choir(tokenizer, "never ends", "has a STOP and more", "STO is no stop")
    response = answer(engine, tokenizer, n=3, stop=["STOP"], stream=stream)
    if stream:
        texts, reasons = [""] * 3, [""] * 3
        for event in events(response):
            [choice] = event["choices"]
            texts[choice["index"]] += choice["text"]
            reasons[choice["index"]] += choice["finish_reason"] or ""
    else:
        texts = [choice["text"] for choice in response.json()["choices"]]
        reasons = [choice["finish_reason"] for choice in response.json()["choices"]]
    assert texts == ["never ends", "has a ", "STO is no stop"]
    assert reasons == ["length", "stop", "length"]
    [request] = engine.requests
    assert engine.aborted[0] == f"{request.request_id}/1"
    assert engine.generated == [10, 10, 14], "the stopped sequence got no token more"


def test_usage_leaves_out_what_nobody_waited_for(tokenizer: Tokenizer) -> None:
    engine = choir(tokenizer, "ab", "a!bcd")
    usage = answer(engine, tokenizer, n=2, stop="!").json()["usage"]
    assert usage["completion_tokens"] == 2 + 2


def test_all_stopped_ends_the_request(tokenizer: Tokenizer) -> None:
    engine = choir(tokenizer, "a!bcd", "ab!cd")
    response = answer(engine, tokenizer, n=2, stop="!")
    assert [choice["text"] for choice in response.json()["choices"]] == ["a", "ab"]
    assert engine.generated == [2, 3]


@pytest.mark.parametrize("late", [False, True])
def test_every_sequence_echoes_the_scored_prompt(tokenizer: Tokenizer, late: bool) -> None:
    engine = choir(tokenizer, "ab", "cd", late=late)
    for stream in (False, True):
        engine.generated = [0, 0]
        response = answer(engine, tokenizer, n=2, echo=True, logprobs=0, stream=stream)
        scored: dict[int, list[float | None]] = {0: [], 1: []}
        for event in events(response) if stream else [response.json()]:
            for choice in event["choices"]:
                scored[choice["index"]] += choice["logprobs"]["token_logprobs"]
        assert scored == {0: [None, -1.0, -0.5, -0.5], 1: [None, -1.0, -0.5, -0.5]}
