"""Bodies that nobody would write: whatever a client sends, the answer is quick and not a 5xx."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_process import ServerProcess

from runtime.server.schemas import ChatRequest, CompletionRequest
from runtime.server.schemas.generation import GenerationBody
from runtime.server.schemas.tokens import DetokenizeRequest, TokenizeRequest

ODD = st.sampled_from(
    [
        None, True, False, 0, 1, -1, 2, 319, 320, 2**31, 2**63, 10**400, 0.5, -0.5, 1e-9, 1e300,
        "", "x", "auto", "none", "left", "\ud800", "[ab]{3}", [], [0], [1, 2, 3], ["x"], [[1], [2]], [None],
        {}, {"5": 1.0}, {"type": "json_object"}, {"type": "text"}, {"json": {"type": "integer"}}, {"regex": "[ab]+"},
        {"include_usage": True}, {"role": "user"}, [{"role": "user", "content": "x"}],
        [{"role": "system", "content": "a"}, {"role": "assistant", "content": "<|im_end|>"}],
        [{"type": "function", "function": {"name": "f"}}],
    ]
)  # fmt: skip
ROUTES: dict[str, tuple[type[GenerationBody | TokenizeRequest | DetokenizeRequest], dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, {"prompt": "x", "max_tokens": 3}),
    "/v1/chat/completions": (ChatRequest, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}),
    "/tokenize": (TokenizeRequest, {"prompt": "x"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [5]}),
}


@pytest.fixture(scope="module")
def http(chat_server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=chat_server.url, headers={"content-type": "application/json"}, timeout=30) as client:
        yield client


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_body_is_the_server_s_fault(http: httpx.Client, route: str, data: st.DataObject) -> None:
    model, base = ROUTES[route]
    odd = data.draw(st.dictionaries(st.sampled_from(sorted(model.model_fields)), ODD, max_size=3))
    body = json.dumps(base | odd)
    response = http.post(route, content=body)
    assert response.status_code in (200, 400, 404), response.text
    assert '"server_error"' not in response.text
