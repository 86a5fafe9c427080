"""The server as curl sees it, the client that people try first."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest
from server_process import ServerProcess

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


def curl(*arguments: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """Status and body of an answer."""
    posted = [] if body is None else ["--json", json.dumps(body)]
    command = ["curl", "--silent", "--no-buffer", "--max-time", "60", "--write-out", "\n%{http_code}", *posted]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    text, _, status = done.stdout.rpartition("\n")
    return int(status), text


def test_an_answer_and_the_same_as_a_stream(chat_server: ServerProcess) -> None:
    url, body = f"{chat_server.url}/v1/completions", {"prompt": "Once upon", "max_tokens": 9, "temperature": 0}
    status, text = curl(url, body=body | {"ignore_eos": True})
    assert status == 200
    status, stream = curl(url, body=body | {"ignore_eos": True, "stream": True})
    assert status == 200
    *events, last = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    assert last == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["text"] for event in events]
    assert "".join(pieces) == json.loads(text)["choices"][0]["text"]


def test_a_conversation(chat_server: ServerProcess) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    status, text = curl(f"{chat_server.url}/v1/chat/completions", body=body)
    assert status == 200
    assert json.loads(text)["choices"][0]["message"]["role"] == "assistant"


def test_curl_s_own_content_type_is_refused_with_a_reason(chat_server: ServerProcess) -> None:
    status, text = curl(f"{chat_server.url}/v1/completions", "--data", '{"prompt": "x"}')
    assert status == 415
    assert "application/json" in json.loads(text)["error"]["message"]
