"""Who is let in once there are API keys."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from scripted_server import ScriptedServer

from runtime.server.auth import ApiKeyError, ApiKeys
from runtime.text.tokenizer import Tokenizer

ALICE, BOB = "alice-sesame", "bob-sesame"


@pytest.fixture
def server(tokenizer: Tokenizer) -> ScriptedServer:
    return ScriptedServer(tokenizer, "hello", keys=ApiKeys([f"alice:{ALICE}", BOB]))


def get(server: ScriptedServer, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    return asyncio.run(server.request(method, path, headers=headers))


def bearer(key: str) -> str:
    return f"Bearer {key}"


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()


def routes(routers: Any) -> Iterator[tuple[str, str]]:
    """(method, path) of every route of an application, however it was put in."""
    for route in routers:
        if isinstance(route, APIRoute) or hasattr(route, "methods"):
            for method in route.methods or ():
                yield method, route.path.replace("{name:path}", "scripted")
        elif hasattr(route, "original_router"):
            yield from routes(route.original_router.routes)
        else:
            raise AssertionError(f"a route of an unknown kind: {route!r}")


def test_every_route_asks_for_a_key(server: ScriptedServer) -> None:
    every = set(routes(server.app.routes))
    assert {("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/docs"), ("GET", "/openapi.json")} <= every
    refusals = [
        {},
        {"authorization": bearer("wrong")},
        {"authorization": bearer(ALICE + "x")},
        {"authorization": ALICE},
    ]
    for method, path in every:
        for headers in refusals:
            response = get(server, path, method, **headers)
            if path in ("/health", "/ready"):
                assert response.status_code == 200
            else:
                assert response.status_code == 401, (method, path)
        assert get(server, path, method, authorization=bearer(ALICE)).status_code != 401


@pytest.mark.parametrize("path", ["/nowhere", "/", "/health/", "//health", "/health/x", "/HEALTH", "/ready/../metrics"])
def test_other_paths_ask_for_a_key_too(server: ScriptedServer, path: str) -> None:
    response = get(server, path)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("key", [ALICE, BOB])
def test_a_key_is_let_in(server: ScriptedServer, key: str) -> None:
    for header in (bearer(key), bearer(key).replace("Bearer", "bearer"), basic(key)):
        assert get(server, "/version", authorization=header).status_code == 200


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic", "Basic !", basic(""), basic("wrong"), "Basic /w==", f"Digest {ALICE}"]
)
def test_what_is_no_key_is_not(server: ScriptedServer, header: str) -> None:
    assert get(server, "/version", authorization=header).status_code == 401


def test_a_browser_is_asked_for_a_password(server: ScriptedServer) -> None:
    response = get(server, "/docs", accept="text/html,*/*")
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Basic")


def test_without_keys_everybody_is_let_in(tokenizer: Tokenizer) -> None:
    assert get(ScriptedServer(tokenizer, "hello"), "/metrics").status_code == 200


def test_names_of_keys() -> None:
    keys = ApiKeys([f"alice:{ALICE}", BOB])
    assert keys.name_of(ALICE) == "alice"
    name = keys.name_of(BOB)
    assert name is not None
    assert name.startswith("key-")
    assert BOB not in name
    assert keys.name_of("alice:" + ALICE) is None
    assert ApiKeys([BOB]).name_of(BOB) == name


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["two words"], "API key 1 must be"),
        (["fine", ""], "API key 2 must be"),
        (["kéy"], "API key 1 must be"),
        (["a:one", "a:two"], "API key 2 is there already"),
        (["a:same", "b:same"], "API key 2 is there already"),
    ],
)
def test_keys_that_cannot_be(texts: list[str], message: str) -> None:
    with pytest.raises(ApiKeyError, match=message) as caught:
        ApiKeys(texts)
    assert not any(secret in str(caught.value) for secret in ("same", "two words", "kéy"))


def test_a_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\nalice:{ALICE}\n\n  {BOB}  \n")
    keys = ApiKeys(["carol:third"], file)
    assert keys.name_of(ALICE) == "alice"
    assert keys.name_of(BOB)
    assert keys.name_of("third") == "carol"
    file.write_text("dave:fourth\n")
    keys.reload()
    assert keys.name_of(ALICE) is None
    assert keys.name_of("third") == "carol"
    for broken in ("", "# none\n", "two words\n"):
        file.write_text(broken)
        with pytest.raises(ApiKeyError, match=str(file)):
            keys.reload()
        assert keys.name_of("fourth") == "dave"  # as before
    file.unlink()
    with pytest.raises(ApiKeyError, match="cannot be read"):
        keys.reload()
    assert keys
