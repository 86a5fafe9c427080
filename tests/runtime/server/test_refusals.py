"""What a client gets for requests that cannot be served, over a real socket; and that the server lives on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from checkpoints import SERVED_CONTEXT as CONTEXT
from scripted_server import ScriptedServer
from server_process import ServerProcess

from runtime.server.schemas import CompletionRequest
from runtime.text.tokenizer import Tokenizer

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(autouse=True)
def serves_afterwards(http: httpx.Client) -> Iterator[None]:
    yield
    assert http.post("/v1/completions", json={"prompt": "The cat", "max_tokens": 1}).status_code == 200


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert len(error["message"]) < 2000
    return error


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1, 2", b"nope", b'{"prompt": "\xff"}', b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "list", "word", "not UTF-8", "deep", "number too long"],
)
def test_a_body_that_is_no_json(http: httpx.Client, body: bytes) -> None:
    error_of(http.post("/v1/completions", content=body, headers=JSON), 400)


@pytest.mark.parametrize("body", ["text", 1, None, [], [{"prompt": "x"}]])
def test_json_that_is_no_object(http: httpx.Client, body: object) -> None:
    error_of(http.post("/v1/completions", content=json.dumps(body), headers=JSON), 400)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None),
        ("prompt", 5),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["text", 1]),
        ("prompt", [1, True]),
        ("prompt", [-1]),
        ("prompt", [320]),
        ("prompt", [10**400]),
        ("prompt", ["x"] * 129),
        ("prompt", "x " * CONTEXT),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", "16"),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", 10**9),
        ("max_tokens", 2**31),
        ("max_tokens", CONTEXT),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("stop", ""),
        ("stop", [""]),
        ("stop", 1),
        ("stop", ["x"] * 17),
        ("stop", "x" * 1001),
        ("seed", 2**63),
        ("seed", 0.5),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),  # without stream
        ("user", 1),
        ("model", 1),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("echo", 1),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt_logprobs", 21),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"five": 1}),
        ("logit_bias", {"320": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"9" * 30: 1}),
        ("logit_bias", [1]),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("top_k", -2),
        ("min_p", 1.1),
        ("min_tokens", -1),
        ("min_tokens", 3),  # of two
        ("stop_token_ids", [320]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("truncate_prompt_tokens", -2),
        ("truncation_side", "middle"),
        ("priority", 2**63),
        ("cache_salt", ""),
        ("request_id", ""),
        # Known and not supported.
        ("best_of", 2),
        ("suffix", "end"),
        ("bad_words", ["x"]),
        ("use_beam_search", True),
        ("length_penalty", 0.5),
        ("logprob_token_ids", [1]),
        ("no_stop_trim", True),
        ("return_hidden_states", True),
        # Not known.
        ("max_token", 5),
        ("messages", []),
        ("nope", None),
    ],
)
def test_a_field_that_cannot_be_is_named(http: httpx.Client, field: str, value: object) -> None:
    error = error_of(http.post("/v1/completions", json={"prompt": "The cat", "max_tokens": 2} | {field: value}), 400)
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(http: httpx.Client, value: float) -> None:
    body = f'{{"prompt": "x", "temperature": {"NaN" if value != value else "Infinity"}}}'
    assert error_of(http.post("/v1/completions", content=body, headers=JSON), 400)["param"] == "temperature"


@pytest.mark.parametrize("field", ["prompt", "model", "stop", "\\ud800"])
def test_half_a_surrogate_pair(http: httpx.Client, field: str) -> None:
    body = f'{{"prompt": "x", "max_tokens": 1, "{field}": "\\ud800"}}'
    error = error_of(http.post("/v1/completions", content=body, headers=JSON), {"model": 404}.get(field, 400))
    assert error["param"] == (None if field == "\\ud800" else field)


def test_an_empty_prompt_is_fine_with_a_bos(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": "", "max_tokens": 1})
    assert response.json()["usage"]["prompt_tokens"] == 1


def test_defaults_spelled_out_are_fine(http: httpx.Client) -> None:
    neutral = {
        "n": 1, "best_of": 1, "echo": False, "suffix": None, "logprobs": None, "logit_bias": {}, "stop": None,
        "presence_penalty": 0.0, "frequency_penalty": 0, "top_k": -1, "user": "somebody", "stream_options": None,
    }  # fmt: skip
    assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1} | neutral).status_code == 200


@pytest.mark.parametrize(
    "value",
    [10**4000, -(10**4000), "x" * 10_000, ["x" * 10_000] * 9, [10**4000] * 9, {"x" * 10_000: ["y" * 10_000]}],
    ids=["number", "negative number", "text", "texts", "numbers", "object"],
)
def test_what_a_client_sent_is_cut_in_the_message(tokenizer: Tokenizer, value: object) -> None:
    server = ScriptedServer(tokenizer, "a")

    async def post_all() -> dict[str, httpx.Response]:
        fields = [*CompletionRequest.model_fields, "nope"]
        return {field: await server.post(**{"max_tokens": 1, field: value}) for field in fields}

    takes_any = {"user": str, "guided_regex": str, "guided_choice": list, "guided_json": dict}
    for field, response in asyncio.run(post_all()).items():
        if response.status_code == 200:
            assert takes_any[field] is type(value)
        else:
            error = error_of(response, 404 if (field, type(value)) == ("model", str) else 400)
            assert len(error["message"]) < 600, field


def test_a_million_faults_get_a_short_answer(http: httpx.Client) -> None:
    error = error_of(http.post("/v1/completions", json={f"field{i}": "x" * 2000 for i in range(1000)}), 400)
    assert error["message"].endswith("and 991 more")
    error_of(http.post("/v1/completions", json={"x" * 100_000: 1, "prompt": "x"}), 400)
    error_of(http.post("/v1/completions", json={"prompt": ["x"] * 100_000 + [1]}), 400)
    error_of(http.post("/v1/completions", json={"prompt": "x", "model": "y" * 100_000}), 404)


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_another_content_type(http: httpx.Client, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    error_of(http.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers), 415)


def test_a_charset_is_fine(http: httpx.Client) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    response = http.post("/v1/completions", content=b'{"prompt": "x", "max_tokens": 1}', headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/v1/responses", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/other", 404),
    ],
)
def test_routes_that_are_not_there(http: httpx.Client, method: str, path: str, status: int) -> None:
    error_of(http.request(method, path), status)


def test_health_and_version(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/version").json()["version"]
    assert http.get("/openapi.json").json()["paths"]["/v1/completions"]["post"]["requestBody"]
