"""Spans, as a collector receives them over HTTP."""

from __future__ import annotations

import asyncio
import gzip
import http.server
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from scripted_server import ScriptedServer

from runtime.server.tracing import TracingError, open_tracer
from runtime.text.tokenizer import Tokenizer


class Collector(http.server.HTTPServer):
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[ExportTraceServiceRequest] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/traces"

    def spans(self) -> list[Span]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, daemon=True)
        thread.start()
        yield collector
        collector.shutdown()


def attributes(span: Span) -> dict[str, Any]:
    def value(of: Any) -> Any:
        kind = of.WhichOneof("value")
        return [value(item) for item in of.array_value.values] if kind == "array_value" else getattr(of, kind)

    return {attribute.key: value(attribute.value) for attribute in span.attributes}


def test_a_span_tells_what_was_asked_and_what_it_cost(tokenizer: Tokenizer, collector: Collector) -> None:
    tracer = open_tracer(collector.endpoint)
    assert tracer is not None
    server = ScriptedServer(tokenizer, "hello", sinks=[tracer.record])
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"

    async def requests() -> None:
        body = {"prompt": [1, 2, 3], "max_tokens": 5, "temperature": 0.5, "seed": 7, "top_k": 9, "stream": True}
        headers = {"traceparent": f"00-{trace}-{parent}-01", "x-request-id": "mine"}
        await server.request("POST", "/v1/completions", json=body, headers=headers)
        await server.request("GET", "/health")
        await server.request("POST", "/v1/completions", json={"prompt": "x", "model": "other"})

    asyncio.run(requests())
    tracer.close()
    answered, refused = collector.spans()
    assert (answered.trace_id.hex(), answered.parent_span_id.hex()) == (trace, parent)
    assert answered.name == "text_completion scripted"
    assert answered.kind == Span.SPAN_KIND_SERVER
    assert 0 < answered.end_time_unix_nano - answered.start_time_unix_nano < 30e9
    said = attributes(answered)
    assert 0 < said.pop("gen_ai.latency.time_to_first_token") < 30
    assert said == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "client.address": "127.0.0.1",
        "osp.request_id": "mine",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "osp-runtime",
        "gen_ai.request.model": "scripted",
        "gen_ai.response.model": "scripted",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 9,
        "gen_ai.request.seed": 7,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
    }
    assert refused.parent_span_id == b""
    assert refused.status.code == Status.STATUS_CODE_ERROR
    assert attributes(refused)["error.type"] == "model_not_found"
    assert not any(name.startswith("gen_ai") for name in attributes(refused))


def test_without_an_endpoint_there_are_no_spans() -> None:
    assert open_tracer(None) is None


def test_what_cannot_be_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TracingError, match="must be a URL"):
        open_tracer("localhost:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(TracingError, match=r"pip install 'osp-runtime\[otel\]'"):
        open_tracer("http://localhost:4318/v1/traces")
