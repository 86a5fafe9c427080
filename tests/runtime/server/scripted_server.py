"""An application in this process around a scripted engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx
from scripted_engine import ScriptedEngine

from runtime.server.app import create_app
from runtime.server.auth import ApiKeys
from runtime.server.catalog import ModelCatalog, ServedModel
from runtime.server.middleware import RecordSink
from runtime.server.settings import ServerSettings
from runtime.server.telemetry import Telemetry
from runtime.text.tokenizer import Tokenizer


class ScriptedServer:
    """Answers every prompt with the given text, byte by byte, or with the given tokens.

    Attributes:
        app: the application.
        engine: its engine, which does what a test tells it.
        telemetry: its metrics.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        script: str | Sequence[int],
        settings: ServerSettings | None = None,
        keys: ApiKeys | None = None,
        sinks: Sequence[RecordSink] = (),
        context_length: int = 64,
    ) -> None:
        tokens = [byte_token(tokenizer, byte) for byte in script.encode()] if isinstance(script, str) else script
        self.engine = ScriptedEngine(lambda _: tokens, context_length=context_length)
        self.telemetry = Telemetry()
        catalog = ModelCatalog([ServedModel("scripted", self.engine, tokenizer, self.telemetry)])
        self.app = create_app(settings or ServerSettings(), catalog, self.telemetry, keys, sinks)

    async def post(self, **body: Any) -> httpx.Response:
        """`POST /v1/completions`, without a socket."""
        return await self.request("POST", "/v1/completions", json={"prompt": "x", **body})

    async def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Any request, without a socket."""
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
            return await client.request(method, path, **options)


def byte_token(tokenizer: Tokenizer, byte: int) -> int:
    """The token that spells this one byte."""
    return next(id for id in range(300) if tokenizer.token_bytes(id) == bytes([byte]))


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a stream, which must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.strip().split("\n\n")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
