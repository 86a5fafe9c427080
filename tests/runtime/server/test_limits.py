"""Rate limits: the budget against a simulation, and what clients of a server see."""

from __future__ import annotations

import asyncio
from fractions import Fraction
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import ScriptedServer

from runtime.server import limits
from runtime.server.auth import ApiKeys
from runtime.server.limits import Budget
from runtime.server.settings import ServerSettings
from runtime.text.tokenizer import Tokenizer


@given(
    per_minute=st.integers(1, 1000),
    events=st.lists(st.tuples(st.integers(0, 120), st.integers(0, 2000)), max_size=20),
)
def test_a_budget_is_what_exact_arithmetic_says(per_minute: int, events: list[tuple[int, int]]) -> None:
    now = 0.0
    budget = Budget(per_minute, lambda: now)
    level = Fraction(per_minute)
    for quiet, units in events:
        now += quiet
        level = min(Fraction(per_minute), level + Fraction(quiet * per_minute, 60))
        wait = max(Fraction(0), (1 - level) * 60 / per_minute)
        assert budget.wait_s() == pytest.approx(float(wait), abs=1e-6)
        budget.spend(units)
        level -= units


class Client:
    """Posts with a key to a server whose clock stands still until it is told."""

    def __init__(self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, **limits_: int) -> None:
        self.now = 0.0
        monkeypatch.setattr(limits, "Budget", lambda per_minute: Budget(per_minute, lambda: self.now))
        settings = ServerSettings(**limits_)
        self.server = ScriptedServer(tokenizer, "hello", settings, ApiKeys(["alice:first", "bob:second"]))

    def post(self, key: str = "first", path: str = "/v1/completions", **body: Any) -> httpx.Response:
        body = {"prompt": [1, 2, 3], "max_tokens": 5} | body
        headers = {"authorization": f"Bearer {key}"}
        return asyncio.run(self.server.request("POST", path, json=body, headers=headers))


def test_requests_a_minute(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(tokenizer, monkeypatch, requests_per_minute=3)
    assert [client.post().status_code for _ in range(5)] == [200, 200, 200, 429, 429]
    refused = client.post()
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert "3 requests a minute" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"] == "20"
    assert client.post("second").status_code == 200  # another key has a budget of its own
    client.now = 19.9
    assert client.post().status_code == 429
    client.now = 20.0
    assert [client.post().status_code for _ in range(2)] == [200, 429]
    client.now = 1000.0
    assert [client.post().status_code for _ in range(4)] == [200, 200, 200, 429]  # no more than a minute is saved up


def test_tokens_a_minute(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(tokenizer, monkeypatch, tokens_per_minute=12)
    assert client.post().status_code == 200  # 8 of 12
    assert client.post(stream=True).status_code == 200  # 16: the last one may overdraw
    refused = client.post()
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "25"  # a debt of 4, and 1 to go on, at one every 5 s
    client.now = 25.0
    assert client.post(prompt=[1], max_tokens=1).status_code == 200
    assert client.post().status_code == 429


def test_a_token_budget_is_charged_for_all_choices_and_not_for_refusals(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(tokenizer, monkeypatch, tokens_per_minute=16)
    assert client.post(max_tokens=10**6).status_code == 400
    assert client.post(prompt=[[1, 2, 3], [4, 5, 6]], max_tokens=4).status_code == 200  # 6 and 8
    assert client.post(prompt=[1], max_tokens=1).status_code == 200  # 16
    assert client.post().status_code == 429


def test_what_computes_nothing_is_free(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(tokenizer, monkeypatch, requests_per_minute=1)
    client.post()
    for _ in range(3):
        headers = {"authorization": "Bearer first"}
        assert asyncio.run(client.server.request("GET", "/v1/models", headers=headers)).status_code == 200


def test_without_keys_each_address_has_a_budget(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_CLIENTS", 2)
    server = ScriptedServer(tokenizer, "hello", ServerSettings(requests_per_minute=1))

    async def post(address: str) -> int:
        transport = httpx.ASGITransport(server.app, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return (await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})).status_code

    addresses = ["10.0.0.1", "10.0.0.2", "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.2", "10.0.0.1"]
    # The first address was quiet longest when the third came, and is forgotten.
    assert [asyncio.run(post(address)) for address in addresses] == [200, 200, 429, 429, 200, 429, 200]
