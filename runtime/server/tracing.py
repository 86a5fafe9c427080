"""OpenTelemetry: one span a request, with the attributes of the conventions for generative AI (`gen_ai.*`).

Behind the extra `otel`, and off unless `--otlp-endpoint` says where spans go. A span is written when its request is
over, from the request's record; a `traceparent` that the client sent is its parent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.server.request_record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

_OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}


class TracingError(RuntimeError):
    """Spans are asked for and cannot be sent; the message says what to do."""


def open_tracer(endpoint: str | None) -> Tracer | None:
    """Sends spans to `endpoint` (OTLP over HTTP, the full URL), in batches, from a thread of its own. None: none."""
    if endpoint is None:
        return None
    if not endpoint.startswith(("http://", "https://")):
        raise TracingError(f"the OTLP endpoint must be a URL such as http://localhost:4318/v1/traces, is {endpoint!r}")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError:
        raise TracingError("spans need OpenTelemetry; pip install 'osp-runtime[otel]'") from None
    return Tracer(BatchSpanProcessor(OTLPSpanExporter(endpoint)))


class Tracer:
    """Turns records into spans."""

    def __init__(self, processor: SpanProcessor) -> None:
        """Takes what the spans go through."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES count, as everywhere.
        self._provider = TracerProvider(resource=Resource.create({"service.name": "osp-runtime"}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("runtime.server")

    def record(self, record: RequestRecord) -> None:
        """Writes the span of a request that is over. Only those that compute something, by POST, have one."""
        if record.method != "POST":
            return
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {} if record.traceparent is None else {"traceparent": record.traceparent}
        operation = _OPERATIONS.get(record.route or "")
        span = self._tracer.start_span(
            f"{operation} {record.model}" if operation and record.model else f"POST {record.route or ''}".rstrip(),
            context=TraceContextTextMapPropagator().extract(carrier),
            kind=SpanKind.SERVER,
            attributes={name: value for name, value in _attributes(record, operation).items() if value is not None},
            start_time=record.arrived_ns,
        )
        if record.error is not None:
            span.set_status(Status(StatusCode.ERROR, record.error))
        span.end(record.arrived_ns + round(record.elapsed_s * 1e9))

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def _attributes(record: RequestRecord, operation: str | None) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "client.address": record.client,
        "error.type": record.error,
        "osp.request_id": record.id,
    }
    if record.model is not None:
        attributes |= {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "osp-runtime",
            "gen_ai.request.model": record.model,
            "gen_ai.response.model": record.model,
            "gen_ai.response.finish_reasons": record.finish_reasons,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
            "gen_ai.usage.output_tokens": record.completion_tokens,
            "gen_ai.latency.time_to_first_token": record.first_token_s,
        }
    if (sampling := record.sampling) is not None:
        attributes |= {
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k or None,
            "gen_ai.request.seed": sampling.seed,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
            "gen_ai.request.presence_penalty": sampling.presence_penalty,
        }
    return attributes
