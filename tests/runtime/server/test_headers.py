"""The headers of answers, the pages of other origins, and the page of the API."""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest
from scripted_server import ScriptedServer

from runtime.server.auth import ApiKeys
from runtime.server.settings import ServerSettings
from runtime.text.tokenizer import Tokenizer

ORIGIN = "https://app.example"


def ask(server: ScriptedServer, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    return asyncio.run(server.request(method, path, headers=headers))


@pytest.fixture
def server(tokenizer: Tokenizer) -> ScriptedServer:
    return ScriptedServer(tokenizer, "hello")


@pytest.mark.parametrize("path", ["/health", "/docs", "/v1/models", "/metrics", "/nowhere"])
def test_browsers_are_told_to_be_careful(server: ScriptedServer, path: str) -> None:
    headers = ask(server, path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    [policy] = headers.get_list("content-security-policy")
    assert policy.startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in policy


@pytest.mark.parametrize("given", ["abc-123", "a" * 128, "trace:1/2.3+4=", "00-4bf92f-01"])
def test_a_request_id_comes_back(server: ScriptedServer, given: str) -> None:
    assert ask(server, "/health", **{"x-request-id": given}).headers.get_list("x-request-id") == [given]
    assert ask(server, "/nowhere", **{"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a" * 129, "two words", "line\tfeed", 'quote"', "<b>", "\xe9"])
def test_an_unfit_request_id_is_replaced(server: ScriptedServer, given: str) -> None:
    request = ask(server, "/health", **{"x-request-id": given.encode("latin-1")})  # type: ignore[arg-type]
    assert re.fullmatch("[0-9a-f]{32}", request.headers["x-request-id"])


def test_the_same_request_id_twice_at_once(server: ScriptedServer) -> None:
    async def both() -> list[httpx.Response]:
        body, headers = {"prompt": "x", "max_tokens": 5}, {"x-request-id": "same"}
        posts = (server.request("POST", "/v1/completions", json=body, headers=headers) for _ in range(2))
        return await asyncio.gather(*posts)

    assert [response.status_code for response in asyncio.run(both())] == [200, 200]


def preflight(server: ScriptedServer, origin: str) -> httpx.Response:
    wanted = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
    return ask(server, "/v1/completions", "OPTIONS", origin=origin, **wanted)


def test_pages_of_other_origins_are_not_let_in(server: ScriptedServer) -> None:
    assert "access-control-allow-origin" not in preflight(server, ORIGIN).headers
    assert "access-control-allow-origin" not in ask(server, "/v1/models", origin=ORIGIN).headers


def test_pages_of_chosen_origins_are(tokenizer: Tokenizer) -> None:
    server = ScriptedServer(tokenizer, "hello", ServerSettings(cors_origin=(ORIGIN,)), ApiKeys(["key"]))
    allowed = preflight(server, ORIGIN)  # without a key, as browsers ask
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in allowed.headers
    refused = ask(server, "/v1/models", origin=ORIGIN)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == ORIGIN  # so that the page can read why
    assert preflight(server, "https://evil.example").status_code == 400


def test_the_page_of_the_api_needs_nothing_from_elsewhere(server: ScriptedServer) -> None:
    response = ask(server, "/docs")
    page = response.text
    assert response.headers["content-type"].startswith("text/html")
    assert "<script" not in page
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"/openapi.json"}
    description = ask(server, "/openapi.json").json()
    assert "/v1/completions" in description["paths"]
    for path, operations in description["paths"].items():
        for method in operations:
            assert f"<h2>{method.upper()} {path}</h2>" in page
    for field in ("prompt", "max_tokens", "stream"):
        assert f"<td>{field}<td>" in page
