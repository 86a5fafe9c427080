"""The log: one line a request, and no secrets in it."""

from __future__ import annotations

import json
import logging
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import running_server

from runtime.server.logging_setup import FIELDS, JsonFormatter, TextFormatter

KEY, PROMPT = "sesame-sesame-sesame", "A secret that nobody may read"


def ask(url: str) -> None:
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": "mine-1"}
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 3, "ignore_eos": True}
    with httpx.Client(base_url=url, headers=headers, timeout=30) as http:
        assert http.post("/v1/completions?token=hidden", json=body).status_code == 200
        assert http.post("/v1/completions", json={**body, "stream": True}).status_code == 200
        assert http.post("/v1/completions", json={**body, "max_tokens": 0}).status_code == 400
        assert http.get("/health").status_code == 200
        assert http.get("/nowhere/%0a%22x").status_code == 404
        assert http.get("/version", headers={"authorization": "Bearer wrong-key"}).status_code == 401


def test_json_lines_tell_what_happened_and_no_secrets(checkpoint: Path) -> None:
    with running_server(str(checkpoint), "--log-format", "json", OSP_API_KEY=f"alice:{KEY}") as server:
        ask(server.url)
        assert server.stop() == 0
        server.log.close()
        text = "".join(server.log.lines)
    entries = [json.loads(line) for line in server.log.lines]
    for entry in entries:
        assert {"time", "level", "logger", "message"} <= set(entry)
        assert datetime.fromisoformat(entry["time"]).tzinfo is not None
    requests = [entry for entry in entries if entry["logger"] == "runtime.server.access_log"]
    assert [(entry["message"], entry["status"]) for entry in requests] == [
        ("POST /v1/completions", 200),
        ("POST /v1/completions", 200),
        ("POST /v1/completions", 400),
        ("GET /nowhere/%0a%22x", 404),
        ("GET /version", 401),
    ]
    whole, streamed, refused, absent, stranger = requests
    for entry in (whole, streamed):
        assert entry["request_id"] == "mine-1"
        assert entry["key"] == "alice"
        assert entry["model"] == "tiny"
        assert entry["prompt_tokens"] > 3
        assert entry["completion_tokens"] == 3
        assert entry["finish"] == "length"
        assert 0 < entry["first_token_ms"] <= entry["duration_ms"] < 30_000
        assert "error" not in entry
    assert refused["error"] == "bad_request"
    assert absent["error"] == "not_found"
    assert stranger["error"] == "invalid_api_key"
    assert "key" not in stranger
    for secret in (KEY, PROMPT, "hidden", "wrong-key"):
        assert secret not in text


def test_prompts_are_logged_when_asked_for(checkpoint: Path) -> None:
    with running_server(str(checkpoint), "--log-prompts", OSP_API_KEY=KEY) as server:
        ask(server.url)
        assert server.stop() == 0
        server.log.close()
    access = [line for line in server.log.lines if "access_log: POST" in line]
    assert len(access) == 3
    for line in access:
        assert re.match(
            r"INFO runtime\.server\.access_log: POST /v1/completions request_id=mine-1 client=127\.0\.0\.1 ", line
        )
        assert PROMPT in line
        assert KEY not in line
    body = json.loads(json.loads(access[0].partition(" body=")[2]))
    assert body["prompt"] == PROMPT


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("here", logging.INFO, "file", 1, message, (), None)
    setattr(made, FIELDS, fields)
    return made


@pytest.mark.parametrize("value", ["two words", 'a "quote"', "line\nfeed", "\x1b[31m", "a=b", "", "emoji 😀", "\ud800"])
def test_a_value_cannot_pretend_to_be_another_line_or_field(value: str) -> None:
    line = TextFormatter().format(record("GET /", path=value, status=200))
    assert "\n" not in line
    assert line.isprintable()
    quoted = re.fullmatch(r'INFO here: GET / path=(".*") status=200', line)
    assert quoted is not None
    assert json.loads(quoted[1]) == value
    assert json.loads(JsonFormatter().format(record("GET /", path=value)))["path"] == value


def test_a_traceback_is_one_line_of_json() -> None:
    try:
        raise LookupError("nothing there")
    except LookupError as error:
        made = record("has failed")
        made.exc_info = (type(error), error, error.__traceback__)
    line = JsonFormatter().format(made)
    assert "\n" not in line
    assert "LookupError: nothing there" in json.loads(line)["traceback"]
